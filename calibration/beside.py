"""Steps driven beside the fp32 step over the same documents: how far each has drifted after 1, 2, 4, ... segments.

All go forward together, segment by segment, so that memory does not grow with the length.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rmt_trt.bundle import Bundle
from rmt_trt.calibration.documents import Source
from rmt_trt.calibration.kept import keep, kept
from rmt_trt.contract import PAD, StepSpec
from rmt_trt.errors import ContractError, TokenError
from rmt_trt.runtime.segments import Cut, cut
from rmt_trt.runtime.tokens import PIECE, Document

States = tuple[np.ndarray, ...]
Step = Callable[[States, np.ndarray], tuple[States, np.ndarray]]
SAVE_SECONDS = 5.0
WORK = "a measurement of drift"
MOST_DOCUMENTS, MOST_SEGMENTS = 4096, 1 << 20


@dataclass(frozen=True)
class Through:
    """What steps are driven through: at most so many segments of each document, and so many documents, side by side."""

    segments: int = 32
    documents: int = 2

    def __post_init__(self) -> None:
        for name, most in (("segments", MOST_SEGMENTS), ("documents", MOST_DOCUMENTS)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ContractError(f"--drift-{name} is {value!r:.60}; expected a whole number from 1 to {most:,}")


@dataclass(frozen=True)
class At:
    """Relative L2 errors after so many segments, medians over the documents that have as many. memory: of several states the
    largest."""

    segment: int
    documents: int
    memory: float
    logits: float


@dataclass(frozen=True)
class Drifted:
    """How a step went beside the fp32 one.

    along    after 1, 2, 4, ... segments
    end      behind the last segment of each document; its `segment` is that of the longest
    changed  share of answers, one after each segment of a classifier, one behind each token of a language model, that are
             not the fp32 step's
    ends     documents whose last answer is another
    """

    along: tuple[At, ...]
    end: At
    changed: float
    ends: int

    @property
    def drift(self) -> float:
        """The largest error of the memory, of those after 1, 2, 4, ... segments and at the end; inf where one is not a number."""
        worst = max(at.memory for at in (*self.along, self.end))
        return worst if math.isfinite(worst) else math.inf

    @property
    def logits(self) -> float:
        """The same of the logits."""
        worst = max(at.logits for at in (*self.along, self.end))
        return worst if math.isfinite(worst) else math.inf


def beside(
    bundle: Bundle,
    exact: Step,
    others: Sequence[Step],
    sources: Sequence[Source],
    through: Through = Through(),
    progress: Callable[[int, int], None] = lambda done, total: None,
    partial: Path | None = None,
    key: str = "",
) -> tuple[Drifted, ...]:
    """Drives `exact` and each of `others`, each with states of its own, through the documents, as rows of one batch.

    progress  called with (segments done, segments of the longest document)
    partial   a file in which the work is kept as it goes on, and from which it goes on where it was stopped; it stays
    key       what the steps are, which `partial` must be of

    Errors: ContractError without documents, TokenError for those that the model cannot read, FormatError for a partial file
    of other work.
    """
    rows = [_Row(source, bundle.spec, through.segments) for source in sources[: through.documents]]
    if not rows:
        raise ContractError("no documents to measure drift with; expected at least one")
    start = tuple(np.repeat(value[None], len(rows), axis=0) for value in bundle.initial())
    counts = np.array([row.segments for row in rows])
    longest = int(counts.max())
    work = _Work(0, start, [start for _ in others], [_Tally(len(rows), longest) for _ in others])
    key = json.dumps([key, bundle.spec.fingerprint, [row.about for row in rows], len(others)])
    if partial is not None and partial.exists():
        work.restore(kept(partial, key, WORK))
    saved = time.monotonic()
    for segment in _batches(rows, work.number, longest):
        work.number += 1
        work.reference, wanted = exact(work.reference, segment)
        for place, other in enumerate(others):
            work.states[place], logits = other(work.states[place], segment)
            found = (work.states[place], logits)
            work.tallies[place].count(work.number, counts, (work.reference, wanted), found, segment)
        if partial is not None and (work.number == longest or time.monotonic() - saved >= SAVE_SECONDS):
            keep(partial, key, work.arrays())
            saved = time.monotonic()
        progress(work.number, longest)
    tallies = work.tallies
    return tuple(tally.result(counts) for tally in tallies)


class _Row:
    """A document that is read segment by segment. segments: as many as are read of it."""

    def __init__(self, source: Source, spec: StepSpec, most: int) -> None:
        counting, tokens = Document(source.open(), spec, source.name), 0
        while len(ids := counting.read(PIECE)):
            tokens += len(ids)
        if not tokens:
            raise TokenError(f"{source.name} holds no tokens that the model reads; expected a document to measure with")
        self._plan: Cut = cut(tokens, spec.segment_length, spec.alignment)
        self.segments = min(most, self._plan.count(tokens))
        self.about = (source.name, tokens, self.segments)
        self._reader = Document(source.open(), spec, source.name)

    def skip(self, count: int) -> None:
        """Goes to segment `count`."""
        for number in range(min(count, self.segments)):
            self._reader.skip(self._plan.size(number))

    def read(self, number: int) -> np.ndarray:
        """Segment `number`, from 0; nothing behind the last."""
        return self._reader.read(self._plan.size(number)) if number < self.segments else np.empty(0, np.int64)


def _batches(rows: Sequence[_Row], start: int, longest: int) -> Iterator[np.ndarray]:
    """Segments from `start` on, each (rows, s)."""
    for row in rows:
        row.skip(start)
    for number in range(start, longest):
        ids = [row.read(number) for row in rows]
        segment = np.full((len(rows), max(map(len, ids))), PAD, np.int64)
        for place, one in enumerate(ids):
            segment[place, : len(one)] = one
        yield segment


class _Tally:
    """Errors (octaves and the end, documents) of memory and logits, and counts of answers."""

    def __init__(self, documents: int, longest: int) -> None:
        self._octaves = [1 << power for power in range(longest.bit_length())]
        self._errors = np.full((len(self._octaves) + 1, documents, 2), np.nan)
        self._answers = self._changed = self._ends = 0

    def count(
        self,
        number: int,
        counts: np.ndarray,
        wanted: tuple[States, np.ndarray],
        found: tuple[States, np.ndarray],
        segment: np.ndarray,
    ) -> None:
        """What two steps gave after segment `number`, from 1. counts: the segments of each document."""
        octave = self._octaves.index(number) if number & (number - 1) == 0 else None
        for row in np.flatnonzero(counts >= number):
            logits = [self._valid(one[1][row], segment[row]) for one in (wanted, found)]
            other = int((logits[0].argmax(axis=-1) != logits[1].argmax(axis=-1)).sum())
            self._answers, self._changed = self._answers + logits[0][..., 0].size, self._changed + other
            if number == counts[row]:
                last = [one[-1] if one.ndim == 2 else one for one in logits]
                self._ends += int(last[0].argmax() != last[1].argmax())
            if octave is not None or number == counts[row]:
                pairs = zip(wanted[0], found[0], strict=True)
                errors = np.max([_relative(b[row], a[row]) for a, b in pairs]), _relative(logits[1], logits[0])
                if octave is not None:
                    self._errors[octave, row] = errors
                if number == counts[row]:
                    self._errors[-1, row] = errors

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was counted, by name."""
        return {"errors": self._errors, "counts": np.array([self._answers, self._changed, self._ends])}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `arrays` gave."""
        self._errors = arrays["errors"]
        self._answers, self._changed, self._ends = map(int, arrays["counts"])

    @staticmethod
    def _valid(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """(c,) as it is; of (s, v) the rows that no padding stands at."""
        return logits[ids >= 0] if logits.ndim == 2 else logits

    def result(self, counts: np.ndarray) -> Drifted:
        along = [
            self._at(number, errors[counts >= number])
            for number, errors in zip(self._octaves, self._errors[:-1], strict=True)
        ]
        end = self._at(int(counts.max()), self._errors[-1])
        return Drifted(tuple(along), end, self._changed / self._answers, self._ends)

    @staticmethod
    def _at(number: int, errors: np.ndarray) -> At:
        memory, logits = np.median(np.where(np.isfinite(errors), errors, np.inf), axis=0).tolist()
        return At(number, len(errors), memory, logits)


@dataclass
class _Work:
    """Where the work stands: segments done, the states of each step, what was counted."""

    number: int
    reference: States
    states: list[States]
    tallies: list[_Tally]

    def arrays(self) -> dict[str, np.ndarray]:
        found = {"number": np.array(self.number)}
        for place, states in enumerate([self.reference, *self.states]):
            found |= {f"states.{place}.{number}": value for number, value in enumerate(states)}
        for place, tally in enumerate(self.tallies):
            found |= {f"tally.{place}.{name}": value for name, value in tally.arrays().items()}
        return found

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.number = int(arrays["number"])
        count = len(self.reference)
        self.reference, *self.states = (
            tuple(arrays[f"states.{place}.{number}"] for number in range(count))
            for place in range(len(self.states) + 1)
        )
        for place, tally in enumerate(self.tallies):
            tally.restore({name: arrays[f"tally.{place}.{name}"] for name in ("errors", "counts")})


def _relative(value: np.ndarray, wanted: np.ndarray) -> float:
    """||value - wanted|| / ||wanted||, L2 over all entries, in float64."""
    exact = wanted.astype(np.float64)
    return float(np.linalg.norm(value.astype(np.float64) - exact) / max(float(np.linalg.norm(exact)), 1e-30))
