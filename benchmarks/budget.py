"""What is measured within a given time: tasks in the order of their importance, and which of them still fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rmt_trt.benchmarks.rows import LEFT_OUT, Kind, Results, Row


@dataclass(frozen=True)
class Task:
    """A measurement that is still to be made.

    seconds  expected, until one of the same `cost` was made: then in proportion to what that one took
    spare    made only if all that follows and is not spare fits as well
    """

    kind: Kind
    name: str
    call: Callable[[], object]
    seconds: float
    batch: int = 1
    cost: str = ""
    spare: bool = False


class Budget:
    """Seconds that a whole run may take, counted from `started` (`time.perf_counter`); None sets no bound.

    A plan and no limit: a measurement that takes longer than expected is not broken off.
    """

    def __init__(self, seconds: float | None = None, started: float | None = None) -> None:
        self.seconds = seconds
        self._started = time.perf_counter() if started is None else started
        self._pace: dict[str, float] = {}

    def left(self) -> float:
        """Seconds that are left; infinite without a bound."""
        return float("inf") if self.seconds is None else self.seconds - (time.perf_counter() - self._started)

    def expected(self, task: Task) -> float:
        """Seconds that a task will take, by what is known now."""
        return task.seconds * self._pace.get(task.cost, 1.0)

    def fits(self, task: Task, following: Sequence[Task]) -> bool:
        """Whether a task is to be made now, `following` being what comes after it."""
        reserved = sum(self.expected(other) for other in following if not other.spare) if task.spare else 0.0
        return self.expected(task) + reserved <= self.left()

    def learn(self, task: Task, seconds: float) -> None:
        """Takes note of what a task took."""
        if task.cost:
            self._pace[task.cost] = seconds / task.seconds


def carry_out(tasks: Sequence[Task], budget: Budget, results: Results, say: Callable[[str], None]) -> None:
    """Makes the measurements that fit, one after another; the others, and what fails, become rows with the reason."""
    for number, task in enumerate(tasks):
        if not budget.fits(task, tasks[number + 1 :]):
            results.add(Row(task.kind, task.name, task.batch, failed=LEFT_OUT))
            continue
        say(f"{task.kind}: {task.name}, batch {task.batch}")
        started, before = time.perf_counter(), len(results.rows)
        with results.attempt(task.kind, task.name, task.batch):
            task.call()
        if not any(row.failed for row in results.rows[before:]):  # a failure says nothing about the next one's time
            budget.learn(task, time.perf_counter() - started)
