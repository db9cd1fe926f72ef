"""rmt-verify: an engine of a bundle against the PyTorch recurrence, over any number of segments."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmt_trt.bundle import Bundle
from rmt_trt.commands.app import Debug, Version, console, new_app, run_command, stage_progress
from rmt_trt.commands.report import drift_table
from rmt_trt.errors import ContractError, FormatError, require
from rmt_trt.files import check_target, write_file

if TYPE_CHECKING:
    from rmt_trt.model.checkpoint import LoadedModel

app = new_app()


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.rmt.")],
    segments: Annotated[int, typer.Option(help="Segments to go through, one of them short.")] = 16,
    engine: Annotated[str, typer.Option(help="auto, cpu, cuda, tensorrt, tensorrt-rtx.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16, int8, fp8.")] = None,
    device: Annotated[int, typer.Option(help="GPU index.")] = 0,
    model: Annotated[
        Path | None, typer.Option(help="The checkpoint to compare with. [default: the one beside the bundle]")
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative L2 error. [default: of the dtype]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random documents.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the whole report as JSON.")] = None,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Compares memory and logits after every segment; exit 1 when they drift more than the tolerance."""
    for module in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "rmt-verify")
    from rmt_trt.export.verify import check_options, engine_reference, model_reference
    from rmt_trt.export.verify import verify as run_verification
    from rmt_trt.runtime import RMTRuntime

    check_options(segments, tolerance)
    if out is not None:
        check_target(out)
    opened = Bundle(bundle)
    checkpoint = model or _checkpoint_beside(opened)
    screen = console()
    with ExitStack() as stack:
        runtime = stack.enter_context(RMTRuntime(bundle, engine=engine, dtype=dtype, device=device))
        if checkpoint is not None:
            reference, name = model_reference(_same_model(checkpoint, opened).model), "PyTorch recurrence"
        elif runtime.engine == "cpu" and runtime.dtype == "fp32":
            raise FormatError(
                f"{bundle} was exported from {opened.manifest.source.get('file', 'a model')!r}, which is not beside it. Give "
                f"the checkpoint with --model (of a published one, a model.pt written by rmt-export --save-model)"
            )
        else:
            exact = stack.enter_context(RMTRuntime(bundle, engine="cpu", dtype="fp32"))
            reference, name = engine_reference(exact), "fp32 graph on the CPU"
        bars = stack.enter_context(stage_progress(screen))
        task = bars.add_task(f"verifying on {runtime.engine}", total=None)
        report = run_verification(
            runtime, reference, segments, tolerance, seed, name,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )  # fmt: skip
    screen.print(drift_table(report.to_json()))
    if out is not None:
        write_file(out, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    report.require()


def _same_model(checkpoint: Path, bundle: Bundle) -> LoadedModel:
    """The checkpoint, read as the bundle was: what the export was told otherwise holds for the reference too."""
    from rmt_trt.model.checkpoint import LoadOptions, load_model

    spec = bundle.spec
    try:
        loaded = load_model(checkpoint, LoadOptions(alignment=spec.alignment, drop_ids=spec.dropped_ids))
    except (ContractError, FormatError) as err:
        if checkpoint.suffix == ".pt":
            raise
        raise FormatError(
            f"{err}. rmt-verify reads a model.pt: write one with rmt-export {checkpoint} --save-model model.pt and the flags "
            f"of the export"
        ) from err
    if loaded.spec.fingerprint != spec.fingerprint:
        raise FormatError(
            f"{checkpoint} holds other weights than {bundle.path} was exported from. Give the right checkpoint (--model), or "
            f"export again"
        )
    return loaded


def _checkpoint_beside(bundle: Bundle) -> Path | None:
    """The checkpoint that the manifest names, if it still lies beside the bundle."""
    name = bundle.manifest.source.get("file")
    if not isinstance(name, str) or not name or Path(name).name != name:
        return None
    path = bundle.path.resolve().parent / name
    return path if path.exists() and path.suffix == ".pt" else None


def main() -> None:
    """Console entry point."""
    run_command("rmt-verify", app)
