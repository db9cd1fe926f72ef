"""rmt-eval: accuracy of a deployed model by length and by place of the fact, through the runtime."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rmt_trt.commands.app import Debug, Version, console, new_app, run_command
from rmt_trt.commands.bench import names, whole_numbers
from rmt_trt.errors import ContractError, EngineError, FormatError

if TYPE_CHECKING:
    from rmt_trt.evaluation.cases import Case
    from rmt_trt.evaluation.measure import View
    from rmt_trt.evaluation.rows import Results
    from rmt_trt.runtime import RMTRuntime
    from rmt_trt.training.tasks.task import Task

app = new_app()

REPORT = "results.md"
PAPER_WIDTH = 150  # characters of a line that no terminal bounds


@app.command(name="eval")
def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE", help="A bundle, a graph or a checkpoint; with --plot, results files."),
    ],
    task: Annotated[str, typer.Option(help="memorize, detect, reasoning, or several with commas.")] = "detect",
    text: Annotated[
        Path | None, typer.Option(help="Background text, any UTF-8 file. [default: synthetic words]")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Part of the text, from and to. [default: 0.0:1.0]")] = None,
    segments: Annotated[str, typer.Option(help="Numbers of segments, with commas.")] = "1,4,16,64,256",
    positions: Annotated[
        str | None, typer.Option(help="Where the fact stands, in % of the text: 0,50,100. [default: at random places]")
    ] = None,
    samples: Annotated[
        str, typer.Option(help="Documents of each length and place: one number, or one per length.")
    ] = "200",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the documents.")] = 0,
    engine: Annotated[str, typer.Option(help="auto, cpu, cuda, tensorrt, tensorrt-rtx or torch.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16, ... [default: the bundle's best]")] = None,
    device: Annotated[int, typer.Option(help="GPU index.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a step. [default: all cores]")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Documents read together.")] = 64,
    budget: Annotated[float | None, typer.Option(help="Seconds in all; what no longer fits is left out.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows that the folder holds; measure the others.")
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Only draw: several results in one picture.")] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of results.json, results.md and plots.")] = Path(
        "eval"
    ),
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Asks a model questions about long documents: right answers, with intervals, by length and by place of the fact."""
    if plot:
        return _plot(paths, out)
    if len(paths) > 1:
        raise ContractError(
            f"rmt-eval measures one model at a time and got {len(paths)}; with --plot it takes several results"
        )
    if budget is not None and not 0 < budget < float("inf"):
        raise ContractError(f"--budget is {budget:g}; expected seconds, more than 0")
    from rmt_trt.benchmarks.budget import Budget
    from rmt_trt.evaluation.cases import all_cases
    from rmt_trt.evaluation.rows import prepare_folder
    from rmt_trt.files import sole_user
    from rmt_trt.runtime import RMTRuntime

    limit, screen = Budget(budget), console()
    wanted = tuple(dict.fromkeys(names(task)))
    places = None if positions is None else whole_numbers("--positions", positions)
    cases = all_cases(wanted, whole_numbers("--segments", segments), places, whole_numbers("--samples", samples))
    share = parse_part(part, text)
    prepare_folder(out, resume)
    with sole_user(out, "rmt-eval"), RMTRuntime(paths[0], engine, dtype, device, threads, slots) as runtime:
        tasks = _tasks(wanted, text, share, runtime, cases, seed)
        results = _measure(runtime, tasks, cases, seed, device, limit, out, screen)
    _report(results, screen)


def _measure(
    runtime: RMTRuntime,
    tasks: dict[str, Task],
    cases: list[Case],
    seed: int,
    device: int,
    limit: Any,
    out: Path,
    screen: Console,
) -> Results:
    """All rows. An interrupt leaves those that are there, with their report."""
    from rmt_trt.evaluation.measure import Bench, measure_all
    from rmt_trt.evaluation.meters import GPU_ENGINES, Meters
    from rmt_trt.evaluation.rows import open_results

    gpu = device if runtime.engine in GPU_ENGINES else None
    results = open_results(out, _head(runtime, tasks, seed, gpu))
    try:
        with _shown(screen) as view:
            bench = Bench(runtime, tasks, Meters(gpu), runtime.max_batch, seed)
            measure_all(bench, cases, results, limit.left, view)
    except KeyboardInterrupt:
        screen.print(f"interrupted; {out}/results.json holds {len(results.rows)} rows. Go on with --resume")
        if results.rows:
            _report(results, screen)
        raise SystemExit(130) from None
    return results


def _tasks(
    wanted: tuple[str, ...],
    text: Path | None,
    share: tuple[float, float],
    runtime: RMTRuntime,
    cases: list[Case],
    seed: int,
) -> dict[str, Task]:
    """The tasks, each able to make every document that will be asked of it, and fit for the model. Errors: ContractError."""
    from rmt_trt.evaluation.cases import documents
    from rmt_trt.evaluation.fit import check_fit
    from rmt_trt.training.tasks import open_task

    if text is not None and runtime.tokenizer is None:
        raise ContractError(
            f"{runtime.path} holds no tokenizer, by which --text {text} is to be read. Open the bundle's folder if it is a "
            f"graph out of one, or export the model again with --tokenizer tokenizer.json"
        )
    tokenizer = None if text is None else runtime.tokenizer
    tasks = {name: open_task(name, text, tokenizer, share) for name in wanted}
    for one in tasks.values():
        check_fit(runtime.spec, runtime.tokenizer, one)
    for case in cases:
        documents(tasks[case.task], case, runtime.spec, seed, samples=min(4, case.samples))
    return tasks


def _head(runtime: RMTRuntime, tasks: dict[str, Task], seed: int, gpu: int | None) -> dict[str, Any]:
    from rmt_trt.benchmarks.command_line import shown
    from rmt_trt.evaluation.rows import FORMAT

    return {
        "format": FORMAT,
        "command": shown(sys.argv[1:], "rmt-eval"),
        "machine": _machine(gpu),
        "model": {
            "name": runtime.path.name, "fingerprint": runtime.spec.fingerprint, "engine": runtime.engine,
            "dtype": runtime.dtype, "segment_length": runtime.spec.segment_length,
        },
        "tasks": {name: one.describe() for name, one in tasks.items()},
        "labels": list(next(iter(tasks.values())).labels),
        "seed": seed,
    }  # fmt: skip


def _machine(gpu: int | None) -> dict[str, Any]:
    """Names and versions; of a GPU by PyTorch where it is installed, else by the engine's own libraries."""
    from rmt_trt.benchmarks.machine import describe

    try:
        return describe(gpu)
    except (ImportError, AssertionError, RuntimeError):  # no PyTorch, or one that is built without CUDA
        from rmt_trt.runtime.machine import gpu_name

        return describe(None) | ({} if gpu is None else {"gpu": {"name": gpu_name(gpu)}})


@contextmanager
def _shown(screen: Console) -> Iterator[View]:
    """A bar by tokens for the row that is being measured, and a line for each that was."""
    from rmt_trt.evaluation.measure import View

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bars:
        bar = bars.add_task("opening", total=None, rate="")

        def begin(case: Case, tokens: int) -> None:
            bars.reset(bar, total=tokens, description=case.name, rate="")

        def show(tokens: int) -> None:
            elapsed = bars.tasks[bar].elapsed
            bars.update(bar, completed=tokens, rate=f"{tokens / elapsed:,.0f} tokens/s" if elapsed else "")

        yield View(begin, show, screen.print)


def _report(results: Results, screen: Console) -> None:
    """results.md with its plots, and the tables on standard output. Without matplotlib there are no plots, which is said."""
    from rmt_trt.benchmarks.tables import screen_table
    from rmt_trt.evaluation.plots import draw
    from rmt_trt.evaluation.report import markdown, sections
    from rmt_trt.files import write_file

    made: list[str] = []
    try:
        made = draw(results.folder, [results])
    except EngineError as err:
        screen.print(f"no plots: {err}")
    write_file(results.folder / REPORT, markdown(results.head, results.rows, made).encode())
    paper = Console(width=None if sys.stdout.isatty() else PAPER_WIDTH, highlight=False, markup=False, emoji=False)
    for section in sections(results.rows):
        paper.print(screen_table(section))
    screen.print(", ".join(f"{results.folder}/{name}" for name in ("results.json", REPORT, *made)))


def _plot(paths: list[Path], out: Path) -> None:
    from rmt_trt.evaluation.plots import draw
    from rmt_trt.evaluation.rows import read_results
    from rmt_trt.files import cannot_write

    results = [read_results(path) for path in paths]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(out, err) from err
    made = draw(out, results)
    if not made:
        raise FormatError(f"{', '.join(map(str, paths))}: no row was measured, so that there is nothing to draw")
    console().print(", ".join(f"{out}/{name}" for name in made))


def parse_part(value: str | None, text: Path | None) -> tuple[float, float]:
    """(start, stop) of `0.9:1.0`. Errors: ContractError."""
    if value is None:
        return 0.0, 1.0
    if text is None:
        raise ContractError(f"--part {value} is a part of a text; give the text with --text FILE")
    start, colon, stop = value.partition(":")
    try:
        share = float(start), float(stop)
    except ValueError:
        share = (-1.0, -1.0)
    if not colon or not 0 <= share[0] < share[1] <= 1:
        raise ContractError(f"--part is {value!r}; expected two shares of the text in order, such as 0.9:1.0")
    return share


def main() -> None:
    """Console entry point."""
    run_command("rmt-eval", app)
