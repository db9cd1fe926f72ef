"""How a time is taken: warm first, a synchronised call between two readings of the clock, the median of repeats."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Call = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How often a call is repeated: `repeat` times, but at most for `seconds` in all, and `at_least` times even so."""

    repeat: int = 20
    seconds: float = 4.0
    at_least: int = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of `repeats` calls and how they spread."""

    median: float
    p10: float
    p90: float
    p99: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """samples: seconds, at least one."""
        p10, median, p90, p99 = (float(value) for value in np.percentile(samples, [10, 50, 90, 99]))
        return cls(median, p10, p90, p99, float(min(samples)), float(max(samples)), len(samples))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(call: Call, effort: Effort, warm: Call | None = None) -> Timing:
    """Times `call`, which must return only when its work is done, on whatever device.

    warm  runs once before the clock is read; None runs the call itself
    """
    (warm or call)()
    return measure_in_turn([call], effort)[0]


def measure_in_turn(calls: Sequence[Call], effort: Effort) -> list[Timing]:
    """Times several calls, one after another in each round, so that a change of the machine's pace meets all of them.

    The calls are warm already. Each gets the time of `effort`.
    """
    samples: list[list[float]] = [[] for _ in calls]
    for done in range(1, effort.repeat + 1):
        for call, taken in zip(calls, samples, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
        if done >= effort.at_least and max(sum(taken) for taken in samples) > effort.seconds:
            break
    return [Timing.of(taken) for taken in samples]
