"""What the figures of several documents come to: at 1, 2, 4, ... segments, and by what stands in a segment. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmt_trt.analysis.trajectory import FIGURES, Trajectory


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some documents' figures; `count` of them were numbers."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """Errors: none; without a number all three are nan."""
        numbers = np.asarray(values, np.float64)
        numbers = numbers[np.isfinite(numbers)]
        if not len(numbers):
            return cls(float("nan"), float("nan"), float("nan"), 0)
        low, median, high = np.quantile(numbers, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high), len(numbers))


@dataclass(frozen=True, eq=False)
class Marks:
    """Where a document's facts and question stand, by segment from 0; a fact across a border stands in both."""

    facts: tuple[int, ...] = ()
    question: tuple[int, ...] = ()

    def kind(self, segment: int) -> str:
        """ "question", "fact", "first" or "noise": what is said of a segment, the first that holds."""
        if segment in self.question:
            return "question"
        if segment in self.facts:
            return "fact"
        return "first" if segment == 0 else "noise"


def by_kind(trajectories: Sequence[Trajectory], marks: Sequence[Marks]) -> dict[str, dict[str, Spread]]:
    """Figures of all segments of a kind (`Marks.kind`), of all documents together."""
    gathered: dict[str, list[dict[str, float]]] = {}
    for trajectory, mark in zip(trajectories, marks, strict=True):
        for segment, one in enumerate(trajectory.figures):
            gathered.setdefault(mark.kind(segment), []).append(one.summary())
    return {
        kind: {name: Spread.of([row[name] for row in gathered[kind]]) for name in FIGURES}
        for kind in ("first", "fact", "noise", "question")
        if kind in gathered
    }


def at_segments(trajectories: Sequence[Trajectory]) -> dict[int, dict[str, Spread]]:
    """Figures after 1, 2, 4, 8, ... segments and after the last one, of the documents that have as many."""
    longest = max(len(trajectory.figures) for trajectory in trajectories)
    numbers = [1 << power for power in range(longest.bit_length())]
    table = {}
    for number in sorted({*numbers, longest}):
        rows = [one.figures[number - 1].summary() for one in trajectories if len(one.figures) >= number]
        table[number] = {name: Spread.of([row[name] for row in rows]) for name in FIGURES}
    return table
