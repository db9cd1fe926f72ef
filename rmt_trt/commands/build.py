"""rmt-build: the step of a bundle is compiled to a TensorRT engine, which is added to the bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rmt_trt.bundle import Bundle
from rmt_trt.commands.app import Debug, Version, console, new_app, printable, run_command, stage_progress
from rmt_trt.commands.reference import bundle_model
from rmt_trt.contract import DTYPES
from rmt_trt.errors import ContractError, require
from rmt_trt.files import check_target

if TYPE_CHECKING:
    from rmt_trt.export.tensorrt import BuildOptions, BuiltEngine
    from rmt_trt.model.step import RMTModel

app = new_app()

LABELS = {"graph": "exporting the graph", "check": "checking it on the CPU", "build": "building the engine"}


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.rmt, that the engine is added to.")],
    engine: Annotated[
        str, typer.Option(help="tensorrt-rtx: builds for GPUs that are not here. tensorrt: for the GPU that is.")
    ] = "tensorrt-rtx",
    dtype: Annotated[str, typer.Option(help="fp32, fp16, bf16, several with commas.")] = "fp16",
    compute_capability: Annotated[
        str | None, typer.Option(help="GPUs to build for: 89,120 or 8.9,12.0. [default: that of --device]")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Documents that a step takes at most.")] = 8,
    workspace: Annotated[int | None, typer.Option(help="Memory for intermediate values, in MiB.")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="A file that keeps kernel times between builds; tensorrt only.")
    ] = None,
    optimization_level: Annotated[int | None, typer.Option(help="0, a quick build, to 5, the longest search.")] = None,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave the weights to the graph in the bundle; needs a GPU here.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later versions run it; tensorrt only.")
    ] = False,
    device: Annotated[int, typer.Option(help="GPU index, where the build needs one.")] = 0,
    model: Annotated[
        Path | None, typer.Option(help="The checkpoint of a bundle that does not give its model itself.")
    ] = None,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Compiles the segment step of BUNDLE and adds the engine to it; the bundle is what it was until that is done."""
    for module in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "rmt-build")
    from rmt_trt.export.tensorrt import BuildOptions
    from rmt_trt.export.tensorrt.options import parse_capabilities

    kinds = tuple(dict.fromkeys(dtype.split(",")))
    wrong = [kind for kind in kinds if kind not in DTYPES]
    if wrong:
        raise ContractError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}, or several with commas")
    if timing_cache is not None:
        check_target(timing_cache)
    options = BuildOptions(
        parse_capabilities(compute_capability), max_batch, workspace, timing_cache, optimization_level, strip_weights,
        version_compatible, device,
    )  # fmt: skip
    opened = Bundle(bundle)
    step = bundle_model(opened, model) if model is not None else None
    screen = console()
    for kind in kinds:
        _build(bundle, engine, kind, options, step, screen)


def _build(
    bundle: Path, engine: str, dtype: str, options: BuildOptions, step: RMTModel | None, screen: Console
) -> None:
    """One engine, with its progress, and what was made of it on the screen."""
    from rmt_trt.export.tensorrt import add_engine

    started = time.perf_counter()
    with stage_progress(screen) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(LABELS[stage], total=total)
            bars.update(tasks[stage], completed=done, total=total)

        made = add_engine(bundle, engine, dtype, options, step, show)
    for line in _lines(bundle, made, time.perf_counter() - started):
        screen.print(line)


def _lines(bundle: Path, made: BuiltEngine, seconds: float) -> list[str]:
    from rmt_trt.export.tensorrt.flavours import dotted

    record = made.record
    segment = record.profiles[0]["segment"]
    lines = [
        f"{bundle}: {made.file}, {record.size / 1e6:.1f} MB, in {seconds:.1f} s",
        f"  {record.flavour} {record.version}, {record.dtype}, compute capability {dotted(record.compute_capabilities)}, "
        f"{record.os} {record.machine}; batch {segment['min'][0]} to {segment['max'][0]}, text 1 to {segment['max'][1]}",
    ]
    if record.decomposable:
        names = printable(", ".join(record.decomposable))
        lines.append(f"  attention that may be made of several kernels, where there is no single one: {names:.300}")
    if made.check is not None:
        lines.append(
            f"  its graph was checked on the CPU: largest error {made.check.largest:.1e} over {made.check.segments} segments"
        )
    return [*lines, "  the engine itself was compiled and not run"]


def main() -> None:
    """Console entry point."""
    run_command("rmt-build", app)
