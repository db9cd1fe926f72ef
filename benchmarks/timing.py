"""How a time is taken: warm first, a synchronised call between two readings of the clock, the median of repeats."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Effort:
    """How often a call is repeated: `repeat` times, but no longer than `seconds` in all, and at least 3 times unless one
    call alone takes longer than `seconds`."""

    repeat: int = 20
    seconds: float = 4.0


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


def measure(call: Callable[[], object], effort: Effort, warm: Callable[[], object] | None = None) -> Timing:
    """Times `call`, which must return only when its work is done, on whatever device.

    warm  runs once before the clock is read; None runs the call itself
    """
    (warm or call)()
    samples: list[float] = []
    while len(samples) < effort.repeat:
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
        spent = sum(samples)
        if spent > effort.seconds and (len(samples) >= 3 or samples[0] > effort.seconds):
            break
    return Timing.of(samples)
