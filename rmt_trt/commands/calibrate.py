"""rmt-calibrate: ranges along the recurrence over a user's documents, and quantized graphs for a bundle."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rmt_trt.bundle import MANIFEST, Bundle, check_writable
from rmt_trt.commands import calibrate_mix as mixing
from rmt_trt.commands.app import Debug, Version, console, new_app, run_command, stage_progress
from rmt_trt.commands.eval import parse_part
from rmt_trt.commands.inputs import read_input
from rmt_trt.commands.report import added_line, drift_table, record_lines
from rmt_trt.commands.stages import shown_stages
from rmt_trt.errors import ContractError, EngineError, FormatError, require
from rmt_trt.files import cannot_write, check_folder, check_target, sole_user

if TYPE_CHECKING:
    from rmt_trt.calibration import CollectOptions, Ranges, Source
    from rmt_trt.export import EngineOptions
    from rmt_trt.training.tasks.task import Task

app = new_app()

RANGES, PLOT, PARTIAL = "ranges.json", "ranges.png", "partial.npz"
DOCUMENTS, SEGMENTS = 8, 64  # of tasks
MOST_DOCUMENTS, MOST_SEGMENTS = 10_000, 1 << 24
LABELS = {"collect": "stepping through documents", "graphs": "writing the graph", "verify": "verifying"}


@app.command()
def calibrate(
    bundle: Annotated[Path, typer.Argument(help="NAME.rmt")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A document: ids (.npy; each row of a 2-D array is one) or text. May be given several times."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Documents made anew: memorize, detect, reasoning, with commas.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Background text of --task. [default: synthetic words]")] = None,
    part: Annotated[str | None, typer.Option(help="Part of the text, from and to. [default: 0.0:1.0]")] = None,
    ranges: Annotated[Path | None, typer.Option(help="ranges.json of an earlier run, instead of documents.")] = None,
    dtype: Annotated[
        str, typer.Option(help="int8, fp8; without data int8-dynamic, int8-weights, int4-weights.")
    ] = "int8",
    engine: Annotated[
        str, typer.Option(help="cpu, cuda, tensorrt, tensorrt-rtx; what an engine lacks is refused.")
    ] = "cpu",
    rest: Annotated[
        str | None,
        typer.Option(help="What a static graph leaves in float: fp16 or fp32. [default: fp16; for cpu fp32]"),
    ] = None,
    method: Annotated[str, typer.Option(help="minmax, entropy or percentile (99.999).")] = "minmax",
    documents: Annotated[
        int | None, typer.Option(help=f"At most so many documents. [default: all; of a task {DOCUMENTS}]")
    ] = None,
    segments: Annotated[
        int | None, typer.Option(help=f"At most so many segments of each. [default: all; of a task {SEGMENTS}]")
    ] = None,
    draws: Annotated[
        int, typer.Option(help="Segments looked at in each third of a document, beside first, last and 1, 2, 4, ...")
    ] = 8,
    first_only: Annotated[
        bool, typer.Option("--first-only", help="Look at first segments alone, to see what the others are worth.")
    ] = False,
    max_drift: mixing.MaxDrift = None,
    min_recall: mixing.MinRecall = None,
    sensitivity: mixing.Sensitivity = False,
    mix: mixing.MixFile = None,
    units: mixing.Units = None,
    smooth: mixing.Smooth = None,
    drift_segments: mixing.DriftSegments = 32,
    drift_documents: mixing.DriftDocuments = 2,
    recall_segments: mixing.RecallSegments = "64",
    recall_questions: mixing.RecallQuestions = 100,
    seed: Annotated[int, typer.Option(help="Seed of the draws, and of a task's documents.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a step. [default: all cores]")] = None,
    check: Annotated[int, typer.Option(help="Segments that the verification of the graph goes through.")] = 16,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Hold the graph to this relative L2 error. [default: to 99 % of the answers]"),
    ] = None,
    accept_drift: Annotated[bool, typer.Option("--accept-drift", help="Keep a graph that breaches it.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run into this folder was stopped.")] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help=f"Folder of {RANGES}, {mixing.MIX}, plots.")] = Path(
        "calibration"
    ),
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Takes the ranges of a step's tensors along the recurrence, and adds a quantized graph to BUNDLE."""
    given = _given(data, task, ranges)
    _check_options(given, task, text, documents, segments)
    share = parse_part(part, text)
    for module in ("onnx", "onnxruntime", "torch", "transformers"):
        require(module, "export", "rmt-calibrate")
    from rmt_trt.benchmarks.command_line import shown
    from rmt_trt.calibration import CollectOptions, load_ranges
    from rmt_trt.export import EngineOptions

    want = mixing.wanted(
        max_drift, min_recall, sensitivity, mix, units, smooth, (drift_segments, drift_documents),
        (recall_segments, recall_questions), task, bool(task or data), threads,
    )  # fmt: skip
    calibrated = _is_calibrated(engine, dtype, given, want)
    half = _is_half(rest, engine, calibrated)
    options = CollectOptions(method, draws, seed, threads, first_only)
    _check_verified(check)
    verification = EngineOptions(segments=check, tolerance=tolerance, accept_drift=accept_drift)
    opened, screen = Bundle(bundle), console()
    check_writable(opened.path)
    if not calibrated:
        return _add(bundle, engine, dtype, None, half, verification, screen)
    found = None if ranges is None else load_ranges(ranges)
    if found is not None:
        found.require_model(opened.spec, bundle)
    asked = None if task is None else _open_task(opened, task, text, share)
    want = mixing.fitted(want, opened, (engine, dtype), asked)
    sources: list[Source] = []
    about: dict[str, Any] = {"command": shown(sys.argv[1:], "rmt-calibrate")}
    with contextlib.ExitStack() as held:
        if found is None or want.measures:
            _make_folder(out)
            held.enter_context(sole_user(out, "rmt-calibrate"))
            if asked is not None:
                sources, more = _of_task(opened, asked, documents, segments, seed)
            else:
                sources, more = _of_files(opened, data or [], documents, segments)
            about |= more
        if found is None:
            found = _collect(opened, sources, options, about, out, resume, screen)
        planned = mixing.plan(opened, found, (engine, dtype), want, sources, about, out, resume, screen)
    _add(bundle, engine, dtype, planned, half, verification, screen)


def _given(data: list[Path] | None, task: str | None, ranges: Path | None) -> list[str]:
    """The names of those of the options that were given."""
    return [name for name, value in (("--data", data), ("--task", task), ("--ranges", ranges)) if value]


def _is_calibrated(engine: str, dtype: str, given: list[str], want: mixing.Wanted) -> bool:
    """Whether a graph takes ranges. given: the options that were. Errors: ContractError, for an engine and a dtype without
    graphs, for data or a mix that no one would read, and for no data where it is needed."""
    from rmt_trt.calibration.add import STATIC, WITHOUT_DATA, dtypes_of

    calibrated = (engine, dtype) in STATIC
    if not calibrated and dtype not in WITHOUT_DATA.get(engine, ()):
        raise ContractError(f"no {dtype!r:.60} graph is made for engine {engine!r:.60}; {dtypes_of(engine, dtype)}")
    if calibrated and len(given) != 1 and not (want.measures and len(given) == 2 and "--ranges" in given):
        came = f"{' and '.join(given)} were given" if given else "nothing to calibrate with was given"
        raise ContractError(f"{came}; expected one of --data FILE, --task NAMES and --ranges FILE")
    if given and not calibrated:
        raise ContractError(f"an {dtype} graph reads no data, and {' and '.join(given)} was given. Leave it out")
    if not calibrated and want.mixes:
        raise ContractError(
            f"products are kept in float32, or rescaled, in int8 and fp8 graphs by ranges, not in {dtype}"
        )
    return calibrated


def _is_half(rest: str | None, engine: str, calibrated: bool) -> bool | None:
    """Whether what stays float is float16; None is as usual. Errors: ContractError, where that is not to be chosen."""
    if rest not in (None, "fp16", "fp32"):
        raise ContractError(f"--rest is {rest!r:.60}; expected fp16 or fp32")
    if rest is not None and not calibrated:
        raise ContractError("--rest is for int8 and fp8, graphs with ranges. Leave it out")
    if rest == "fp16" and engine == "cpu":
        raise ContractError("--rest fp16 is for the engines of a GPU; ONNX Runtime computes in float32 on the CPU")
    return None if rest is None else rest == "fp16"


def _check_options(
    given: list[str], task: str | None, text: Path | None, documents: int | None, segments: int | None
) -> None:
    """Errors: ContractError, for options that do not go together."""
    if text is not None and task is None:
        raise ContractError(f"--text {text} hides the facts of a task; give --task too, or the text itself with --data")
    for name, value, most in (("--documents", documents, MOST_DOCUMENTS), ("--segments", segments, MOST_SEGMENTS)):
        if value is not None and not 1 <= value <= most:
            raise ContractError(f"{name} is {value}; expected a number from 1 to {most:,}")


def _check_verified(check: int) -> None:
    """Errors: ContractError, for a number of segments that no verification goes through."""
    from rmt_trt.export.verify_documents import MAX_SEGMENTS

    if check != 0 and not 2 <= check <= MAX_SEGMENTS:
        raise ContractError(
            f"--check is {check}; expected a number from 2 to {MAX_SEGMENTS:,}, or 0 to leave the verification out"
        )


def _make_folder(path: Path) -> None:
    if (path / MANIFEST).exists():
        raise FormatError(
            f"{path} is a bundle, in which nothing but its own files belongs. Choose another folder with -o"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(path, err) from err
    check_folder(path, "the ranges go")
    for name in (RANGES, PLOT, PARTIAL, mixing.MIX, mixing.PLOT, mixing.PARTIAL):
        check_target(path / name)


def _open_task(bundle: Bundle, names: str, text: Path | None, share: tuple[float, float]) -> Task:
    """The task, fit for the model. Errors: ContractError, FormatError."""
    from rmt_trt.evaluation.fit import check_fit
    from rmt_trt.training.tasks import open_task

    tokenizer = bundle.tokenizer()
    if text is not None and tokenizer is None:
        raise ContractError(
            f"{bundle.path} holds no tokenizer, by which --text {text} is to be read. Export it with --tokenizer"
        )
    made = open_task(names, text, None if text is None else tokenizer, share)
    check_fit(bundle.spec, tokenizer, made)
    return made


def _of_task(
    bundle: Bundle, made: Task, documents: int | None, segments: int | None, seed: int
) -> tuple[list[Source], dict[str, Any]]:
    """Documents that no training batch and no evaluation has, and what they are."""
    from rmt_trt.calibration import Source
    from rmt_trt.calibration.documents import task_seed
    from rmt_trt.evaluation.cases import length_of

    count, first = segments or SEGMENTS, task_seed(seed)
    sources = []
    for number in range(documents or DOCUMENTS):
        length = length_of(number, count, bundle.spec.segment_length, made.min_length)
        sources.append(Source(f"{made.name} {number}", made.document(length, first + number).pieces))
    return sources, {"task": made.describe(), "documents": len(sources), "segments": count}


def _of_files(
    bundle: Bundle, files: list[Path], documents: int | None, segments: int | None
) -> tuple[list[Source], dict[str, Any]]:
    """Documents out of files, cut to so many segments each, and what they are."""
    sources: list[Source] = []
    for source in _documents(bundle, files, None if segments is None else segments * bundle.spec.segment_length):
        if documents is not None and len(sources) == documents:
            break
        sources.append(source)
    return sources, {"files": [path.name for path in files], "documents": documents, "segments": segments}


def _documents(bundle: Bundle, files: list[Path], most: int | None) -> Iterator[Source]:
    from rmt_trt.calibration import Source
    from rmt_trt.runtime import RMTRuntime

    for path in files:
        tokens = read_input(path, ids=False, skip=0)
        if isinstance(tokens, str):
            with RMTRuntime(bundle.path, engine="cpu") as runtime:
                tokens = runtime.encode(tokens)
        if tokens.ndim not in (1, 2):
            raise ContractError(f"{path} holds an array of shape {tokens.shape}; expected ids of one document, or rows")
        for number, row in enumerate(tokens[None] if tokens.ndim == 1 else tokens):
            name = str(path) if tokens.ndim == 1 else f"{path}, row {number}"
            yield Source(name, lambda row=row: row[:most])  # type: ignore[misc]


def _collect(
    bundle: Bundle,
    sources: list[Source],
    options: CollectOptions,
    about: dict[str, Any],
    out: Path,
    resume: bool,
    screen: Console,
) -> Ranges:
    """The ranges, written with their plot. An interrupt leaves what a later run goes on from."""
    from rmt_trt.calibration import collect
    from rmt_trt.calibration.plots import draw

    started, partial = time.perf_counter(), out / PARTIAL
    if not resume:
        partial.unlink(missing_ok=True)
    try:
        with stage_progress(screen) as bars:
            bar = bars.add_task(LABELS["collect"], total=None)
            found = collect(
                bundle, sources, options, partial, data=about,
                progress=lambda done, total: bars.update(bar, completed=done, total=total),
            )  # fmt: skip
    except KeyboardInterrupt:
        screen.print("interrupted. Go on with --resume" if partial.exists() else "interrupted")
        raise SystemExit(130) from None
    found.save(out / RANGES)
    written = [RANGES]
    try:
        draw(out / PLOT, found)
        written.append(PLOT)
    except EngineError as err:
        screen.print(f"no plot: {err}")
    tokens = sum(document["tokens"] for document in found.documents)
    screen.print(
        f"{', '.join(f'{out}/{name}' for name in written)}: {len(found.tensors)} tensors over {found.segments} segments of "
        f"{len(found.documents)} documents, {tokens:,} tokens, in {time.perf_counter() - started:.1f} s"
    )
    return found


def _add(
    path: Path,
    engine: str,
    dtype: str,
    planned: mixing.Plan | None,
    half: bool | None,
    options: EngineOptions,
    screen: Console,
) -> None:
    """Adds the graph, and says what it is and how far it was proved. planned: None for a graph that takes no ranges."""
    from rmt_trt.calibration import add_static, add_without_data

    started = time.perf_counter()
    with shown_stages(screen, LABELS) as show:
        if planned is None:
            made = add_without_data(path, engine, dtype, options=options, progress=show)
        else:
            made = add_static(
                path, planned.ranges, engine, dtype, planned.keep, planned.rescale, options, show, planned.record, half
            )
    if made.report is not None:
        screen.print(drift_table(made.report.to_json()))
    for line in record_lines(made.engine, made.dtype, made.to_json()):
        screen.print(line)
    screen.print(f"{path}: {added_line(Bundle(path), made.entries)} added in {time.perf_counter() - started:.1f} s")


def main() -> None:
    """Console entry point."""
    run_command("rmt-calibrate", app)
