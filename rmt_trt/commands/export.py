"""rmt-export: a trained checkpoint becomes a verified bundle; graphs or engines for a GPU are added to it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from rmt_trt.bundle import MANIFEST, Bundle, check_writable
from rmt_trt.commands import engine_options
from rmt_trt.commands.app import Debug, Version, console, new_app, run_command
from rmt_trt.commands.engine_options import (
    ComputeCapability,
    Device,
    EngineFlags,
    HardwareCompatible,
    HeadOption,
    MaxBatch,
    OptimizationLevel,
    StripWeights,
    TimingCache,
    VersionCompatible,
    Workspace,
    build_engines,
    parse_dtypes,
)
from rmt_trt.commands.reference import bundle_model
from rmt_trt.commands.report import added_line, drift_table, record_lines
from rmt_trt.commands.stages import shown_stages
from rmt_trt.contract import ALIGNMENTS, DTYPES, Alignment
from rmt_trt.errors import ContractError, FormatError, require
from rmt_trt.files import check_folder, check_target

if TYPE_CHECKING:
    from rmt_trt.export import EngineOptions, ExportOptions
    from rmt_trt.export.tensorrt import BuildOptions
    from rmt_trt.model.checkpoint import LoadedModel, LoadOptions
    from rmt_trt.model.step import RMTModel

app = new_app()

LABELS = {
    "load": "reading the checkpoint", "export": "exporting the segment step", "verify": "verifying",
    "graphs": "writing graphs", "check": "checking them on the CPU", "native": "checking native products",
    "hopper": "checking those for one kind of GPU",
}  # fmt: skip
ENGINES = ("cpu", "cuda", *engine_options.ENGINES)
GRAPH_DTYPES = ("fp32", "fp16", "bf16")


@app.command()
def export(
    model: Annotated[
        Path,
        typer.Argument(help="model.pt, a checkpoint as the published RMT trainers write it, or a bundle to add to."),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The bundle to write. [default: MODEL's name.rmt]")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="cpu: step.onnx alone. cuda: also graphs made for ONNX Runtime's CUDA provider. tensorrt, tensorrt-rtx: "
            "also engines, as rmt-build makes them."
        ),
    ] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the engine's graphs or engines: fp32, fp16, bf16, several with commas. [default: fp16]"),
    ] = None,
    compute_capability: ComputeCapability = None,
    max_batch: MaxBatch = None,
    head: HeadOption = None,
    workspace: Workspace = None,
    timing_cache: TimingCache = None,
    optimization_level: OptimizationLevel = None,
    strip_weights: StripWeights = False,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = None,
    device: Device = None,
    plain: Annotated[bool, typer.Option("--plain", help="Fuse nothing in the engine's graphs.")] = False,
    native: Annotated[
        bool,
        typer.Option(
            "--native/--no-native",
            help="Beside fused graphs in half precision, write graphs with rmt-trt's own operators, which are faster.",
        ),
    ] = True,
    checkpoint: Annotated[
        Path | None, typer.Option("--model", help="The checkpoint of a bundle that does not give its model itself.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Backbone config.json, or a folder that holds one.")] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Form E: positions of a full segment, all counted (512).")
    ] = None,
    segment_size: Annotated[int | None, typer.Option(help="Form D: text tokens of a segment.")] = None,
    alignment: Annotated[str | None, typer.Option(help="left, right or center: which segment may be short.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, or a folder that holds one.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="alpha of the LoRA weights in the checkpoint.")] = None,
    drop_ids: Annotated[str | None, typer.Option(help="Ids dropped from documents: 0,101,102; '' for none.")] = None,
    max_segments: Annotated[
        int | None, typer.Option(help="Segments it was trained on; a record, never a limit.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the classes in order: no,yes.")] = None,
    segments: Annotated[int, typer.Option(help="Segments that the verification goes through.")] = 16,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative L2 error, with --engine cuda that of its graphs. [default: of the dtype]"),
    ] = None,
    accept_drift: Annotated[bool, typer.Option("--accept-drift", help="Keep a bundle that breaches it.")] = False,
    save_model: Annotated[
        Path | None, typer.Option(help="Also write the checkpoint as model.pt, flags included.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that exists.")] = False,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Exports the segment step of MODEL to ONNX and proves it along the recurrence.

    The bundle appears only when the exported graph gives the numbers of the PyTorch recurrence. With --engine cuda, graphs
    made for that engine are added, with --engine tensorrt or tensorrt-rtx engines; to a bundle that exists too.
    """
    flags = EngineFlags(
        compute_capability, max_batch, head, workspace, timing_cache, optimization_level, strip_weights,
        version_compatible, hardware_compatible, device,
    )  # fmt: skip
    dtypes = _dtypes(engine, dtype, plain, native, flags)
    compiled = engine in engine_options.ENGINES
    existing = model.is_dir() and (model.suffix == ".rmt" or (model / MANIFEST).is_file())
    target = model if existing else out or default_bundle(model)
    if existing:
        _refuse(
            model,
            {
                "--out": out, "--config": config, "--input-size": input_size, "--segment-size": segment_size,
                "--alignment": alignment, "--tokenizer": tokenizer, "--lora-alpha": lora_alpha, "--drop-ids": drop_ids,
                "--max-segments": max_segments, "--labels": labels, "--save-model": save_model,
                "--overwrite": overwrite or None,
                **({"--tolerance": tolerance, "--accept-drift": accept_drift or None} if compiled else {}),
            },
            dtypes,
        )  # fmt: skip
        check_writable(model)
    else:
        _check_new(model, target, overwrite, save_model, alignment, checkpoint)
    for module in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "rmt-export")
    from rmt_trt.export import EngineOptions, ExportOptions
    from rmt_trt.model.checkpoint import LoadOptions

    build = _checked_build(engine, dtypes, flags, model if existing else None) if compiled else None
    # Graphs for the CUDA engine have a tolerance of their own.
    bound = None if engine == "cuda" else tolerance
    options = ExportOptions(segments=segments, tolerance=bound, accept_drift=accept_drift, overwrite=overwrite)
    graphs = EngineOptions(
        segments=segments, tolerance=tolerance, accept_drift=accept_drift, plain=plain, native=native
    )
    screen = console()
    if existing:
        given = Bundle(model).manifest.model is not None and not compiled  # a build takes it itself, where it needs one
        step = bundle_model(Bundle(model), checkpoint) if checkpoint or given else None
    else:
        loading = LoadOptions(
            config=config, input_size=input_size, segment_size=segment_size, alignment=cast("Alignment | None", alignment),
            tokenizer=tokenizer, lora_alpha=lora_alpha, drop_ids=whole_numbers(drop_ids), max_segments=max_segments,
            labels=None if labels is None else tuple(labels.split(",")),
        )  # fmt: skip
        step = _export(model, target, loading, options, save_model, screen).model
    if build is not None:
        build_engines(target, engine, dtypes, build, step, screen)
        return
    for kind in dtypes:
        _add(target, engine, kind, step, graphs, screen)


def _checked_build(engine: str, dtypes: tuple[str, ...], flags: EngineFlags, bundle: Path | None) -> BuildOptions:
    """The options of the engines to build, after all was looked at that would stop a build."""
    from rmt_trt.export.tensorrt import check_build

    build = flags.options()
    check_build(engine, dtypes, build, None if bundle is None else Bundle(bundle))
    return build


def _dtypes(engine: str, dtype: str | None, plain: bool, native: bool, flags: EngineFlags) -> tuple[str, ...]:
    """The dtypes of what is to be added; none for the CPU engine, which runs step.onnx. Errors: ContractError."""
    if engine not in ENGINES:
        raise ContractError(
            f"--engine is {engine!r}; rmt-export makes graphs for cpu, cuda, engines for {', '.join(engine_options.ENGINES)}"
        )
    compiled = engine in engine_options.ENGINES
    if flags.given() and not compiled:
        names = flags.given()
        raise ContractError(
            f"{', '.join(names)} {'go' if len(names) > 1 else 'goes'} with --engine {' or '.join(engine_options.ENGINES)}; "
            f"nothing is compiled for '{engine}'"
        )
    if not native and engine != "cuda":
        raise ContractError(
            f"--no-native goes with --engine cuda; nothing of ours is in what '{engine}' runs. Leave it out"
        )
    if plain and engine != "cuda":
        what = "step.onnx" if engine == "cpu" else "the graphs that TensorRT compiles"
        raise ContractError(f"--plain goes with --engine cuda; nothing is fused in {what}. Leave it out")
    if engine == "cpu":
        if dtype not in (None, "fp32"):
            raise ContractError(f"--dtype {dtype} goes with --engine cuda; the CPU engine runs step.onnx in fp32")
        return ()
    return parse_dtypes("fp16" if dtype is None else dtype, DTYPES if compiled else GRAPH_DTYPES)


def _refuse(bundle: Path, flags: Mapping[str, Any], dtypes: tuple[str, ...]) -> None:
    """Errors: ContractError, for flags that are nothing to a bundle that exists, and when there is nothing to add."""
    given = [name for name, value in flags.items() if value is not None]
    if given or not dtypes:
        what = f"{', '.join(given)} {'go' if len(given) > 1 else 'goes'} with a checkpoint, and " if given else ""
        raise ContractError(
            f"{what}{bundle} is a bundle already. Add graphs to it with: rmt-export {bundle} --engine cuda --dtype fp16; "
            f"engines with --engine tensorrt-rtx or tensorrt"
        )


def _check_new(
    model: Path, target: Path, overwrite: bool, save_model: Path | None, alignment: str | None, checkpoint: Path | None
) -> None:
    """Says before minutes of work what would stop it; most is checked again when it is written."""
    if checkpoint is not None:
        raise ContractError(f"--model goes with a bundle that exists; here {model} is the checkpoint. Leave it out")
    if target.exists() and not overwrite:
        raise FormatError(f"{target} exists already. Choose another name (-o), or replace it with --overwrite")
    if target.resolve().parent.is_dir():
        check_folder(target.resolve().parent, "the bundle goes")
    if save_model is not None:
        check_target(save_model)
    if alignment is not None and alignment not in ALIGNMENTS:
        raise ContractError(f"--alignment is {alignment!r}; expected one of {', '.join(ALIGNMENTS)}")


def _export(
    model: Path, target: Path, flags: LoadOptions, options: ExportOptions, save_model: Path | None, screen: Console
) -> LoadedModel:
    """Checkpoint -> bundle, with its progress and its verdict on the screen."""
    from rmt_trt.export import export_model
    from rmt_trt.model.checkpoint import load_model
    from rmt_trt.model.checkpoint import save_model as write_model

    started = time.perf_counter()
    with shown_stages(screen, LABELS) as show:
        show("load", 0, 1)
        loaded = load_model(model, flags)
        show("load", 1, 1)
        report = export_model(loaded, target, options, source=model, progress=show)
    if save_model is not None:
        write_model(save_model, loaded.model, loaded.tokenizer)
    screen.print(drift_table(report.to_json()))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    verdict = "verified" if report.passed else "KEPT ALTHOUGH IT DRIFTS"
    screen.print(
        f"{target}: {verdict}, {size / 1e6:.1f} MB, in {time.perf_counter() - started:.1f} s. "
        f"Try: rmt-run {target} {'book.txt' if loaded.tokenizer else 'tokens.npy'}"
    )
    return loaded


def _add(target: Path, engine: str, dtype: str, step: RMTModel | None, options: EngineOptions, screen: Console) -> None:
    """Adds the graphs of one dtype, and says what they are and how far they were proved."""
    from rmt_trt.export import add_engine_graphs

    started = time.perf_counter()
    with shown_stages(screen, LABELS) as show:
        made = add_engine_graphs(target, engine, dtype, step, options, show)
    for report in (made.report, *(own.report for own in made.own.values())):
        if report is not None:
            screen.print(drift_table(report.to_json()))
    for line in record_lines(engine, dtype, made.to_json()):
        screen.print(line)
    screen.print(f"{target}: {added_line(Bundle(target), made.entries)} added in {time.perf_counter() - started:.1f} s")
    if made.report is None:
        screen.print(f"  where the engine runs: rmt-verify {target} --engine {engine} --dtype {dtype} --record")


def default_bundle(model: Path) -> Path:
    """NAME.rmt beside the checkpoint."""
    named = model if model.name not in ("", "..") else model.resolve()
    return named.with_name((named.stem if named.is_file() else named.name) + ".rmt")


def whole_numbers(text: str | None) -> tuple[int, ...] | None:
    """Ids of a flag such as --drop-ids 0,101. Errors: ContractError."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as err:
        raise ContractError(f"--drop-ids is {text!r}; expected whole numbers with commas, such as 0,101,102") from err


def main() -> None:
    """Console entry point."""
    run_command("rmt-export", app)
