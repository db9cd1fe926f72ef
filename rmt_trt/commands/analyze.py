"""rmt-analyze: what a model's memory does over time, in figures from any engine and attention maps from PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

import rmt_trt
from rmt_trt.commands.app import Debug, Version, console, new_app, run_command, stage_progress
from rmt_trt.commands.eval import parse_part
from rmt_trt.commands.inputs import read_input
from rmt_trt.errors import ContractError, FormatError, require
from rmt_trt.files import cannot_write, check_folder

if TYPE_CHECKING:
    from rmt_trt.analysis.measure import Measured
    from rmt_trt.model.step import RMTModel
    from rmt_trt.runtime import RMTRuntime
    from rmt_trt.training.tasks.task import Task

app = new_app()

SEGMENTS, DOCUMENTS, ATTENTION = 64, 8, 4
MOST_ATTENTION = 1024  # documents of so many segments are held as a whole


@app.command()
def analyze(
    model: Annotated[Path, typer.Argument(metavar="MODEL_OR_BUNDLE", help="A bundle (NAME.rmt) or a checkpoint.")],
    task: Annotated[
        str | None, typer.Option(help="Documents of memorize, detect, reasoning, or several with commas.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Background text, any UTF-8 file. [default: synthetic words]")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Part of the text, from and to. [default: 0.0:1.0]")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="A document of your own instead: ids.npy (rows are documents), or a text file.")
    ] = None,
    segments: Annotated[
        int | None, typer.Option(help=f"Segments of a document. [default: {SEGMENTS}; of --tokens all]")
    ] = None,
    documents: Annotated[int, typer.Option(help="How many documents of the task.")] = DOCUMENTS,
    place: Annotated[
        float | None, typer.Option(help="Where the facts stand, 0 to 1. [default: at random places]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first document; the others follow.")] = 0,
    attention: Annotated[
        int, typer.Option(help="Segments of the documents of the attention maps; 0 leaves the maps out.")
    ] = ATTENTION,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="The checkpoint of a bundle's attention maps. [default: the one beside it, or the bundle's own model]",
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, cpu, cuda, tensorrt, tensorrt-rtx or torch.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16, int8, fp8.")] = None,
    device: Annotated[int, typer.Option(help="GPU index.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a step. [default: all cores]")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the tables and pictures.")] = Path("analysis"),
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Follows the memory through documents: similarity, norm, entropy, rank; and draws where attention goes."""
    _check_options(task, text, part, tokens, segments, documents, place, attention)
    require("matplotlib", "analyze", "rmt-analyze's pictures")
    from rmt_trt.analysis.report import write_report
    from rmt_trt.runtime import RMTRuntime

    screen = console()
    given = None if tokens is None else read_input(tokens, ids=False, skip=0)
    rows = documents if given is None else given.shape[0] if getattr(given, "ndim", 1) == 2 else 1
    with RMTRuntime(model, engine, dtype, device, threads, max_batch=max(1, rows)) as runtime:
        opened = None if task is None else _open_task(task, text, part, runtime)
        module = _module(model, reference) if opened is not None and attention else None
        _make_folder(out)
        with stage_progress(screen) as bars:
            if opened is not None:
                measured = _of_task(runtime, opened, segments or SEGMENTS, documents, seed, place, bars)
            else:
                measured = _of_tokens(runtime, given, segments, bars)
            facts = _write(out, runtime, measured)
            if opened is not None and module is not None:
                facts["attention"] = _maps(out, module, opened, attention, documents, seed, place, bars)
                write_report(out, facts)
    screen.print(f"{out}/analysis.md, analysis.json, trajectory.csv and pictures")


def _check_options(
    task: str | None, text: Path | None, part: str | None, tokens: Path | None, segments: int | None, documents: int,
    place: float | None, attention: int,
) -> None:  # fmt: skip
    """What can be said before anything is opened. Errors: ContractError."""
    if (task is None) == (tokens is None):
        raise ContractError("give either --task, of which documents are made, or --tokens FILE, a document of your own")
    if tokens is not None and (text, part, place) != (None, None, None):
        raise ContractError("--text, --part and --place go with --task; --tokens FILE is read as it is")
    for name, value in (("--segments", segments), ("--documents", documents)):
        if value is not None and value < 1:
            raise ContractError(f"{name} is {value}; expected at least 1")
    if place is not None and not 0 <= place <= 1:
        raise ContractError(f"--place is {place}; expected 0, the very start, to 1, right before the question")
    if attention and not 3 <= attention <= MOST_ATTENTION:
        raise ContractError(
            f"--attention is {attention}; a fact, noise and the question take 3 segments at least. Give up to {MOST_ATTENTION}, "
            f"or 0, which leaves the maps out"
        )


def _make_folder(path: Path) -> None:
    """Errors: FormatError, when the folder cannot be made or written."""
    if path.exists() and not path.is_dir():
        raise FormatError(f"--out is {path}, a file; expected a folder, which is made where it is missing")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(path, err) from err
    check_folder(path, "the results go")


def _open_task(name: str, text: Path | None, part: str | None, runtime: RMTRuntime) -> Task:
    """The task, fit for the model. Errors: ContractError."""
    from rmt_trt.evaluation.fit import check_fit
    from rmt_trt.training.tasks import open_task

    if text is not None and runtime.tokenizer is None:
        raise ContractError(
            f"{runtime.path} holds no tokenizer, by which --text {text} is to be read. Export the model again with "
            f"--tokenizer tokenizer.json"
        )
    opened = open_task(name, text, None if text is None else runtime.tokenizer, parse_part(part, text))
    check_fit(runtime.spec, runtime.tokenizer, opened)
    return opened


def _module(path: Path, reference: Path | None) -> RMTModel:
    """The model in PyTorch, for the maps. Errors: EngineError without PyTorch, FormatError when it cannot be had."""
    from rmt_trt.runtime.source import open_source

    source = open_source(path)
    if source.kind == "checkpoint":
        if reference is not None:
            raise ContractError(f"--model goes with a bundle; {path} is a checkpoint, from which the maps are drawn")
        return source.model  # type: ignore[no-any-return]
    without = "--attention 0 leaves the maps out"
    if source.bundle is None:
        raise FormatError(f"{path} is no bundle's folder, in which the model of the attention maps would be; {without}")
    for library in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        require(library, "export", f"the attention maps ({without}) come from the PyTorch recurrence, which")
    from rmt_trt.commands.reference import bundle_model

    try:
        return bundle_model(source.bundle, reference)
    except FormatError as err:
        raise FormatError(f"{err} ({without})") from err


def _of_task(
    runtime: RMTRuntime, task: Task, segments: int, documents: int, seed: int, place: float | None, bars: Progress
) -> Measured:
    from rmt_trt.analysis.measure import check_amount, of_task

    check_amount(runtime, documents, documents * segments)  # before they are made
    length = segments * runtime.spec.segment_length
    made = [task.document(length, number, place) for number in range(seed, seed + documents)]
    bar = bars.add_task(f"following the memory on {runtime.engine}", total=documents * segments)
    return of_task(runtime, task, made, seed, lambda done: bars.update(bar, completed=done))


def _of_tokens(runtime: RMTRuntime, tokens: Any, segments: int | None, bars: Progress) -> Measured:
    from rmt_trt.analysis.measure import of_tokens

    bar = bars.add_task(f"following the memory on {runtime.engine}", total=None)
    return of_tokens(runtime, tokens, segments, lambda done: bars.update(bar, completed=done))


def _maps(
    out: Path, module: RMTModel, task: Task, segments: int, documents: int, seed: int, place: float | None,
    bars: Progress,
) -> dict[str, Any]:  # fmt: skip
    from rmt_trt.analysis.operations import draw_operations

    bar = bars.add_task("attention maps", total=documents)
    return draw_operations(
        out, module, task, segments, documents, seed, place, lambda done: bars.update(bar, completed=done)
    )


def _write(out: Path, runtime: RMTRuntime, measured: Measured) -> dict[str, Any]:
    """Writes figures, curves and report; returns the report's values."""
    from rmt_trt.analysis.pictures import draw_trajectories
    from rmt_trt.analysis.report import CSV, TRAJECTORY_PICTURE, trajectory_facts, write_csv, write_report
    from rmt_trt.benchmarks.command_line import shown

    spec, name = runtime.spec, runtime.path.stem
    task = "" if measured.task is None else f", documents of {measured.task.get('task')}"
    write_csv(out / CSV, measured.trajectories, measured.marks)
    draw_trajectories(
        out / TRAJECTORY_PICTURE, measured.trajectories, measured.marks,
        f"{name}{task}, {runtime.engine} {runtime.dtype}",
    )  # fmt: skip
    facts: dict[str, Any] = {
        "command": shown(sys.argv[1:], "rmt-analyze"),
        "rmt-trt": rmt_trt.__version__,
        "model": {
            "name": name, "fingerprint": spec.fingerprint, "form": spec.form, "segment_length": spec.segment_length,
            "memory": list(spec.states[0].shape),
        },
        "engine": runtime.engine, "dtype": runtime.dtype, "task": measured.task,
        "documents": list(measured.documents), "trajectory": trajectory_facts(measured.trajectories, measured.marks),
    }  # fmt: skip
    write_report(out, facts)
    return facts


def main() -> None:
    """Console entry point."""
    run_command("rmt-analyze", app)
