"""Recall of the deployed model: questions answered right through the runtime, by number of segments and dtype.

    python -m rmt_trt.benchmarks.recall BUNDLE_OR_MODEL [QUESTIONS] [--segments 1,16,256,1024,4096] [--count 200]
        [--engine cuda] [--dtype fp32,fp16,bf16]

The same questions for every dtype, out of a file, or made for this. Documents of one length are read together,
piece by piece, at constant memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rmt_trt.benchmarks.budget import Budget
from rmt_trt.benchmarks.command_line import shown
from rmt_trt.benchmarks.machine import describe
from rmt_trt.benchmarks.report import markdown, sections
from rmt_trt.benchmarks.rows import LEFT_OUT, Results, Row
from rmt_trt.benchmarks.tables import screen_table
from rmt_trt.bundle import Bundle
from rmt_trt.commands.app import console, new_app, run_command
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.evaluation.cases import length_of
from rmt_trt.evaluation.measure import read_many
from rmt_trt.runtime import RMTRuntime
from rmt_trt.runtime.segments import cut
from rmt_trt.training.questions import Question, load_questions
from rmt_trt.training.tasks.synthetic import MIN_LENGTH, TASKS, make_document

app = new_app()

FIRST_SEED = 2_000_000  # beyond the seeds of training and of the example's own file
SEEDS = 100_000  # of each number of segments
FRESH = 200  # questions at each number of segments, where they are made


def by_segments(model: RMTRuntime | Bundle, questions: list[Question]) -> dict[int, list[Question]]:
    """Questions by the number of segments that their documents have."""
    spec, groups = model.spec, dict[int, list[Question]]()
    for question in questions:
        count = cut(question.length, spec.segment_length, spec.alignment).count(question.length)
        groups.setdefault(count, []).append(question)
    return dict(sorted(groups.items()))


def fresh(spec: StepSpec, segments: int, count: int) -> list[Question]:
    """`count` questions over documents of so many segments, the two tasks in turn; half of them fill their segments, the
    others lack some tokens of one. The same arguments give the same questions."""
    found = []
    for i in range(count):
        length = length_of(i, segments, spec.segment_length, MIN_LENGTH)
        found.append(Question(make_document(TASKS[i % 2], length, FIRST_SEED + SEEDS * segments + i)))
    return found


def recall(runtime: RMTRuntime, questions: Sequence[Question], slots: int | None = None) -> int:
    """How many of the questions the runtime answers right; `slots` of them are read together."""
    answers = read_many(runtime, [question.document for question in questions], slots)
    return sum(out.label == questions[index].answer for index, out in answers)


@app.command()
def main(
    model: Annotated[Path, typer.Argument(metavar="BUNDLE_OR_MODEL", help="A bundle, or a checkpoint.")],
    source: Annotated[
        Path | None, typer.Argument(metavar="[QUESTIONS]", help="questions.jsonl. [default: made for this]")
    ] = None,
    segments: Annotated[str, typer.Option(help="Numbers of segments, with commas.")] = "1,16,256,1024,4096",
    count: Annotated[
        int | None, typer.Option(min=1, max=SEEDS, help=f"Questions at each. [default: a file's all, {FRESH} made]")
    ] = None,
    engine: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Dtypes, with commas. [default: the bundle's best]")] = None,
    device: Annotated[int, typer.Option(help="GPU index.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Documents read together.")] = 64,
    budget: Annotated[float | None, typer.Option(help="Seconds in all; what no longer fits is left out.")] = None,
    work: Annotated[Path, typer.Option(help="Where the bundle of a checkpoint is made.")] = Path("bench-work"),
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of results.json and results.md.")] = None,
) -> None:
    """Prints one table: questions answered right and seconds, by segments and dtype."""
    from rmt_trt.commands.bench import names, whole_numbers

    limit = Budget(budget)
    numbers, screen = whole_numbers("--segments", segments), console()
    given = load_questions(source) if source is not None else None
    dtypes: tuple[str | None, ...] = names(dtype) if dtype else (None,)
    bundle = _bundle(model, engine, dtypes, work, screen.print)
    asked = _asked(Bundle(bundle), given, source, numbers, count)
    head = {"command": shown(sys.argv[1:], "python -m rmt_trt.benchmarks.recall")}
    results = Results(out, head)
    for wanted in dtypes:
        with (
            results.attempt("recall", wanted or engine, slots),
            RMTRuntime(bundle, engine=engine, dtype=wanted, device=device, max_batch=slots) as runtime,
        ):
            gpu = device if runtime.engine == "cuda" else None
            results.head |= {"machine": describe(gpu), "model": _described(bundle, runtime, dtypes)}
            _measure(runtime, asked, slots, limit, results, screen.print)
    if out is not None:
        (out / "results.md").write_text(markdown(results.head, results.rows), encoding="utf-8")
    paper = Console(highlight=False, markup=False, emoji=False)
    for section in sections(results.head, results.rows):
        paper.print(screen_table(section))


def _measure(
    runtime: RMTRuntime,
    asked: dict[int, list[Question]],
    slots: int,
    budget: Budget,
    results: Results,
    say: Callable[[str], None],
) -> None:
    """A row per number of segments; the time that one will take is judged by the one before."""
    each = 0.0
    for number, questions in asked.items():
        if each * number > budget.left():
            results.add(Row("recall", runtime.dtype, slots, segments=number, failed=LEFT_OUT))
            continue
        started = time.perf_counter()
        right = recall(runtime, questions, slots)
        seconds = time.perf_counter() - started
        each = seconds / number
        say(f"{runtime.dtype}: {number} segments, {right} of {len(questions)} right, {seconds:.1f} s")
        values = {"right": right, "count": len(questions), "seconds": seconds}
        results.add(Row("recall", runtime.dtype, slots, segments=number, values=values))


def _bundle(model: Path, engine: str, dtypes: tuple[str | None, ...], work: Path, say: Callable[[str], None]) -> Path:
    """A bundle as it is; of a checkpoint one that is made for the engine, or found again."""
    if model.is_dir():
        return model
    from rmt_trt.benchmarks.presets import prepare

    wanted = tuple(name or "fp32" for name in dtypes)
    return prepare(model, None, work, "cpu" if engine == "auto" else engine, wanted, say).bundle


def _asked(
    bundle: Bundle, given: list[Question] | None, source: Path | None, numbers: Sequence[int], count: int | None
) -> dict[int, list[Question]]:
    """The questions of each number of segments. Errors: ContractError, when the file has none or too few of one."""
    if given is None:
        return {number: fresh(bundle.spec, number, count or FRESH) for number in numbers}
    groups = by_segments(bundle, given)
    for number in numbers:
        found, wanted = len(groups.get(number, ())), count or 1
        if found < wanted:
            raise ContractError(f"{source} has {found} questions of {number} segments, not {wanted}")
    return {number: groups[number][:count] for number in numbers}


def _described(bundle: Path, runtime: RMTRuntime, dtypes: tuple[str | None, ...]) -> dict[str, object]:
    """The model's part of the head."""
    return {
        "name": bundle.stem,
        "weights": "trained",
        "engine": runtime.engine,
        "dtype": ", ".join(name or runtime.dtype for name in dtypes),
        "segment_length": runtime.spec.segment_length,
    }


if __name__ == "__main__":
    run_command("recall", app)
