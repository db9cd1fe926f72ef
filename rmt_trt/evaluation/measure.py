"""The measurement: documents of each case through `RMTRuntime.run_many`, and the answers counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmt_trt.evaluation.cases import Case, documents
from rmt_trt.evaluation.fit import answer_of
from rmt_trt.evaluation.meters import TENTH, Marks, Meters
from rmt_trt.evaluation.rows import Results, Row
from rmt_trt.runtime import RMTRuntime
from rmt_trt.runtime.many import Many
from rmt_trt.training.tasks.task import Document, Task

LEFT_OUT = "left out: budget"
PIECE = 1 << 15  # tokens that are made at a time: 256 KB of each open document


class OutOfTime(Exception):
    """A case that would take longer than the time that is left."""


@dataclass(frozen=True)
class Bench:
    """What a case is measured with. `slots`: documents that are stepped together."""

    runtime: RMTRuntime
    tasks: Mapping[str, Task]
    meters: Meters
    slots: int
    seed: int


@dataclass(frozen=True)
class View:
    """How the work is shown: `begin` a case of so many tokens, `show` the tokens of it so far, `say` a line."""

    begin: Callable[[Case, int], None]
    show: Callable[[int], None]
    say: Callable[[str], None]


def measure_all(bench: Bench, cases: Sequence[Case], results: Results, left: Callable[[], float], view: View) -> None:
    """Adds a row for each case that the results lack; one that no longer fits into the seconds left is left out.

    The first guess is the quickest pace so far; a row that turns out to be too slow is broken off after its first tenth.
    Errors: of the runtime; rows so far stand.
    """
    pace = float("inf")
    for case in cases:
        if any(row.answers(case) for row in results.rows):
            view.say(f"{case.name}: measured before")
            continue
        work = case.samples * case.segments
        try:
            if pace < float("inf") and pace * work > left():
                raise OutOfTime
            row = measure(bench, case, left(), view)
        except OutOfTime:
            row = Row(case.task, case.segments, case.position, left_out=LEFT_OUT)
            view.say(f"{case.name}: {LEFT_OUT}")
        else:
            pace = min(pace, row.seconds / work)
            view.say(summary(case, row))
        results.add(row)


def measure(bench: Bench, case: Case, seconds: float, view: View) -> Row:
    """A case's row. Errors: OutOfTime, once it can be seen that it takes more than `seconds`; those of the runtime."""
    runtime, task = bench.runtime, bench.tasks[case.task]
    asked = documents(task, case, runtime.spec, bench.seed)
    total = sum(document.length for document in asked)
    view.begin(case, total)
    marks, started = Marks(bench.meters, total), time.perf_counter()

    def progress(tokens: int) -> None:
        marks.at(tokens)
        view.show(tokens)
        passed = time.perf_counter() - started
        if tokens >= TENTH * total and passed * total > seconds * tokens:
            raise OutOfTime

    many = read_many(runtime, asked, bench.slots, progress)
    given = {index: answer_of(runtime.spec, task, out.logits) for index, out in many}
    passed = time.perf_counter() - started
    longest = max(document.length for document in asked)
    wrong = tuple(index for index, document in enumerate(asked) if given[index] != document.label)
    return Row(
        case.task,
        case.segments,
        case.position,
        count=len(asked),
        right=len(asked) - len(wrong),
        tokens=total,
        longest=longest,
        seconds=passed,
        slots=min(bench.slots, len(asked)),
        steps=many.steps,
        idle_share=many.idle_share,
        wrong=wrong,
        memory=marks.end(),
        text=_of_this_length(task, longest),
    )


def read_many(
    runtime: RMTRuntime,
    asked: Sequence[Document],
    slots: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Many:
    """Documents through the runtime, `slots` of them together, each in pieces that are made as it is read."""
    pieces = [document.pieces(PIECE) for document in asked]
    lengths = [document.length for document in asked]
    return runtime.run_many(pieces, slots=slots, length=lengths, on_progress=progress)


def summary(case: Case, row: Row) -> str:
    """A row as one line."""
    low, high = row.interval
    return (
        f"{case.name}: {row.right} of {row.count} right ({low:.1%} to {high:.1%}), {row.seconds:.1f} s, "
        f"{row.tokens_per_second:,.0f} tokens/s"
    )


def _of_this_length(task: Task, length: int) -> dict[str, Any]:
    """What a task says of a length, the length itself apart, beyond what it says of itself."""
    known = {**task.describe(), "length": length}
    return {name: value for name, value in task.describe(length).items() if known.get(name) != value}
