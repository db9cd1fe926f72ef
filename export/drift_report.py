"""What a verification found along the recurrence: some of its segments, all of its octaves, and the verdict.

However long the run was, a report holds a bounded number of segments: each of the first 1,024, and 512 of each octave
behind them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from rmt_trt.errors import VerificationError
from rmt_trt.export.drift import Level, Trend, judge, level

KEPT_OF_OCTAVE = 512
RANDOM = "random ids"


@dataclass(frozen=True)
class Drift:
    """What an engine's step differs by after a segment (1 is the first).

    memory, logits  relative L2 errors: the largest of the states', and the logits'
    cosine          of the states and the reference's, the lowest
    agreement       the share of the segment's answers that are the reference's; agreed: of all answers so far
    """

    segment: int
    tokens: int
    memory: float
    logits: float
    cosine: float = math.nan
    agreement: float = math.nan
    agreed: float = math.nan


@dataclass(frozen=True)
class Octave:
    """The segments from `first` to `last`, twice as many as in the octave before.

    memory, logits  median errors; *_noise: standard error of the median in doublings; *_largest: the largest
    tokens          up to `last`; cosine: the lowest; agreement: the share of the octave's answers
    """

    first: int
    last: int
    tokens: int
    memory: float
    memory_noise: float
    memory_largest: float
    logits: float
    logits_noise: float
    logits_largest: float
    cosine: float
    agreement: float

    def level(self, of: Literal["memory", "logits"]) -> Level:
        """The part of it that a trend is judged by."""
        values = (getattr(self, f"{of}{part}") for part in ("", "_noise", "_largest"))
        return Level(self.first, self.last, *values)


@dataclass(frozen=True)
class Report:
    """What a verification found. `rows` has a Drift for every segment up to the 1,024th, for every second one up to the
    2,048th, every fourth up to the 4,096th, and so on, and for the last, the worst and the first beyond the tolerance;
    `octaves` is made of all of them. `batch_*` is the worst of a batch of unequal lengths and of runs without a stop, which
    take other graphs of an engine than a stream of pieces does.

    memory_effect: by how much the logits of the last segment change when its memory is reset. Where it is tiny, the
    logits say nothing about the memory.
    tolerance: of the errors, or None where they are only told. agreement: the share of answers in the document and the batch
    that are the reference's; needed: the least of it, or None. document: what was read.
    """

    engine: str
    dtype: str
    reference: str
    segments: int
    tolerance: float | None
    rows: tuple[Drift, ...]
    batch_memory: float
    batch_logits: float
    memory_effect: float
    agreement: float = 1.0
    needed: float | None = None
    octaves: tuple[Octave, ...] = ()
    document: str = RANDOM

    @property
    def worst(self) -> float:
        """The largest error of all; nan if one is."""
        errors = [(self.batch_memory, self.batch_logits), *((row.memory, row.logits) for row in self.rows)]
        return float(np.max(errors))

    @property
    def passed(self) -> bool:
        if not math.isfinite(self.worst) or (self.tolerance is not None and self.worst > self.tolerance):
            return False
        return self.needed is None or self.agreement >= self.needed

    def trend(self, of: Literal["memory", "logits"]) -> Trend:
        """Whether an error saturates, grows or dies out. Growth alone fails no report."""
        return judge([octave.level(of) for octave in self.octaves], self.tolerance)

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite, which JSON does not have, become None."""
        trends = {of: self.trend(of) for of in ("memory", "logits")}
        told = {of: asdict(trend) | {"words": trend.words} for of, trend in trends.items()}
        value = asdict(self) | {"trend": told, "worst": self.worst, "passed": self.passed}
        return _finite(value)  # type: ignore[no-any-return]

    def require(self) -> None:
        """Errors: VerificationError, when the report did not pass."""
        if not self.passed and self.tolerance is None:
            raise VerificationError(
                f"engine '{self.engine}' ({self.dtype}) gives {self.agreement:.2%} of the {self.reference}'s answers, fewer than "
                f"{self.needed or 0:.0%}, with an error of {self.worst:.1e}. Measure its recall on your task with rmt-eval; keep "
                f"it with --accept-drift, or set a limit of the error instead with --tolerance",
                self.to_json(),
            )
        if not self.passed and self.tolerance is not None:
            bad = next((r for r in self.rows if not max(r.memory, r.logits) <= self.tolerance), None)
            where = (
                f"after segment {bad.segment} (memory {bad.memory:.1e}, logits {bad.logits:.1e})"
                if bad
                else "in a batch"
            )
            raise VerificationError(
                f"engine '{self.engine}' ({self.dtype}) drifts from the {self.reference} by {self.worst:.1e}, more than "
                f"{self.tolerance:.1e}, first {where}. Set another limit with --tolerance, or keep it with --accept-drift",
                self.to_json(),
            )


@dataclass
class Same:
    """How many answers there were, and how many of them were the reference's."""

    answers: int = 0
    equal: int = 0

    @property
    def share(self) -> float:
        return self.equal / self.answers if self.answers else 0.0

    def count(self, logits: np.ndarray | None, wanted: np.ndarray) -> None:
        """logits (c,) or (n, v). An engine that gave none agrees in nothing."""
        answers = wanted.argmax(axis=-1)
        self.answers += answers.size
        self.equal += 0 if logits is None else int((logits.argmax(axis=-1) == answers).sum())

    def add(self, other: Same) -> None:
        self.answers += other.answers
        self.equal += other.equal


class Curve:
    """Takes the segments of a run one after another, and keeps what a Report needs: the errors of the octave that goes on
    (8 bytes each) and a bounded number of rows."""

    def __init__(self, tolerance: float | None) -> None:
        self._tolerance = tolerance
        self._rows: dict[int, Drift] = {}
        self._worst: dict[str, Drift] = {}
        self._last: Drift | None = None
        self._octaves: list[Octave] = []
        self._start = 1
        self._errors = {"memory": array("d"), "logits": array("d")}
        self._cosine, self._same, self._all = math.inf, Same(), Same()

    def add(self, tokens: int, memory: float, logits: float, cosine: float, same: Same) -> None:
        """The next segment. tokens: up to its end; same: its answers."""
        number = 1 if self._last is None else self._last.segment + 1
        if number == 2 * self._start:
            self._close()
        self._all.add(same)
        self._same.add(same)
        row = Drift(number, tokens, memory, logits, cosine, same.share, self._all.share)
        self._errors["memory"].append(memory)
        self._errors["logits"].append(logits)
        self._cosine = float(np.minimum(self._cosine, cosine))
        if number % max(1, (1 << number.bit_length() - 1) // KEPT_OF_OCTAVE) == 0:
            self._rows[number] = row
        self._worse("memory", memory, row)
        self._worse("logits", logits, row)
        if self._tolerance is not None and not max(memory, logits) <= self._tolerance:
            self._worst.setdefault("first", row)
        self._last = row

    def rows(self) -> tuple[Drift, ...]:
        """In order."""
        special = {row.segment: row for row in (*self._worst.values(), self._last) if row is not None}
        return tuple(row for _, row in sorted((self._rows | special).items()))

    def octaves(self) -> tuple[Octave, ...]:
        """In order. Once it is called, nothing more may be added."""
        if self._errors["memory"]:
            self._close()
        return tuple(self._octaves)

    def _worse(self, of: Literal["memory", "logits"], error: float, row: Drift) -> None:
        """An error that is not finite is worse than any other, and nothing is worse than that."""
        worst = self._worst.get(of)
        if worst is None or (math.isfinite(getattr(worst, of)) and not error <= getattr(worst, of)):
            self._worst[of] = row

    def _close(self) -> None:
        assert self._last is not None
        memory, logits = (level(values, self._start) for values in self._errors.values())
        one = Octave(
            self._start, self._last.segment, self._last.tokens,
            memory.median, memory.noise, memory.largest, logits.median, logits.noise, logits.largest,
            self._cosine, self._same.share,
        )  # fmt: skip
        self._octaves.append(one)
        self._start *= 2
        self._errors = {"memory": array("d"), "logits": array("d")}
        self._cosine, self._same = math.inf, Same()


def cosine(values: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The lowest cosine of an array and the one that was wanted, over all entries, in float64; nan if an entry is not
    finite. Of two arrays of zeros it is 1."""
    return float(np.min([_cosine(value, want) for value, want in zip(values, wanted, strict=True)]))


def _cosine(value: np.ndarray, wanted: np.ndarray) -> float:
    one, other = value.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    if lengths == 0:
        return float(not (one.any() or other.any()))
    return min(1.0, float(one @ other) / lengths) if math.isfinite(lengths) else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
