"""A document on its way through a model: what is read of it, and the mark from which it can go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rmt_trt.contract import PAD, Alignment, Engine, StepSpec
from rmt_trt.errors import EngineError
from rmt_trt.runtime.segments import Cut
from rmt_trt.runtime.state import State
from rmt_trt.runtime.tokens import Document

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens of one step. `fresh` of the ids are this run's own; the others were pending in the state before.

    tail  whether it is the short last one of alignment "left", behind which no state is kept
    """

    ids: np.ndarray
    fresh: int
    tokens_read: int
    tail: bool


@dataclass(frozen=True, eq=False)
class Mark:
    """How far a document has come; together with the states it makes a `State`.

    `before_tail` holds the states in front of a short last segment, whose tokens are then `pending`.
    """

    position: int
    tokens_read: int
    segments: int
    pending: np.ndarray
    last_logits: np.ndarray | None
    loglik_sum: float | None
    before_tail: Arrays | None = None


class Track:
    """One document on its way through the recurrence.

    row    the document's place among those that came together
    limit  tokens of this run at the most; what lies behind is not read
    size   tokens that the caller's source has, dropped ids included, where that is known without reading
    """

    def __init__(
        self,
        row: int,
        document: Document,
        cut: Cut,
        alignment: Alignment,
        start: State,
        limit: int | None = None,
        size: int | None = None,
    ) -> None:
        self.row, self.document, self.cut, self.alignment = row, document, cut, alignment
        self.limit, self.size = limit, size
        self.first = start.states
        self.steps = 0
        self.tokens = 0
        self.taken = 0
        self.final: Arrays | None = None
        self.mark = Mark(
            start.position, start.tokens_read, start.segments, start.pending, start.last_logits, start.loglik_sum
        )
        self._read_before = start.tokens_read
        self._ahead: list[Segment | None] = []
        self._reads = 0
        self._prefix = start.pending

    @property
    def tokens_read(self) -> int:
        """Tokens taken from the callers' sources for what was read so far, earlier parts and dropped ids included."""
        return self._read_before + self.document.tokens_read

    def read(self, size: int) -> np.ndarray:
        """The next `size` tokens, those that the state left pending first; fewer at the end, none behind it.

        size: at first no fewer than are pending. `taken` counts this run's own.
        """
        prefix, self._prefix = self._prefix, self._prefix[:0]
        wanted = size - len(prefix)
        if self.limit is not None:
            wanted = min(wanted, self.limit - self.taken)
        ids = self.document.read(wanted) if wanted else self._prefix
        self.taken += len(ids)
        return np.concatenate([prefix, ids]) if len(prefix) else ids

    def next_segment(self) -> Segment | None:
        """The segment to step through next, or None at the document's end."""
        return self._ahead.pop() if self._ahead else self._read_segment()

    def peek(self) -> Segment | None:
        """The segment behind it, read ahead."""
        if not self._ahead:
            self._ahead.append(self._read_segment())
        return self._ahead[0]

    def _read_segment(self) -> Segment | None:
        size, before = self.cut.size(self._reads), self.taken
        ids = self.read(size)
        if not len(ids):
            return None
        self._reads += 1
        return Segment(ids, self.taken - before, self.tokens_read, self.alignment == "left" and len(ids) < size)


def as_state(mark: Mark, states: Arrays, fingerprint: str) -> State:
    """What a mark and the states at it make up."""
    return State(
        states=tuple(value.copy() for value in states),
        pending=mark.pending.copy(),
        position=mark.position,
        tokens_read=mark.tokens_read,
        segments=mark.segments,
        last_logits=mark.last_logits,
        loglik_sum=mark.loglik_sum,
        fingerprint=fingerprint,
    )


def lay_out(segments: list[np.ndarray]) -> np.ndarray:
    """One int64 array (batch, longest), rows filled up with padding."""
    if len(segments) == 1:
        return segments[0][None]
    batch = np.full((len(segments), max(map(len, segments))), PAD, np.int64)
    for row, ids in zip(batch, segments, strict=True):
        row[: len(ids)] = ids
    return batch


def fetch_finite(engine: Engine, states: Any, spec: StepSpec) -> Arrays:
    """Host arrays (batch, *shape) of States. Errors: EngineError, when a value in them is not finite."""
    arrays = engine.fetch(states)
    for array, state in zip(arrays, spec.states, strict=True):
        if not np.isfinite(array).all():
            raise EngineError(
                f"engine '{engine.name}' ({engine.dtype}) gave a state '{state.input}' that is not finite. "
                f"The dtype overflows on this model: use fp32 or bf16, and check the weights"
            )
    return arrays
