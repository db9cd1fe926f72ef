"""The recurrence: documents go through an engine segment by segment, and nothing but the states is carried.

The engine maps states in to states out. This file decides which documents take part in a step, lays their segments
into one int64 array padded with -1, and keeps, per document, the mark from which it can go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rmt_trt.contract import PAD, Alignment, Engine, StepSpec
from rmt_trt.errors import EngineError
from rmt_trt.runtime.loglik import log_likelihood
from rmt_trt.runtime.results import Piece
from rmt_trt.runtime.segments import Cut
from rmt_trt.runtime.state import State
from rmt_trt.runtime.tokens import Document

LOGITS_MODES = ("last", "all", "loglik", "none")


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens of one step. `fresh` of the ids are this run's own; the others were pending in the state before."""

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
    before_tail: tuple[np.ndarray, ...] | None = None


class Track:
    """One document on its way through the recurrence."""

    def __init__(
        self, row: int, document: Document, cut: Cut, alignment: Alignment, start: State, limit: int | None = None
    ) -> None:
        self.row, self.document, self.cut, self.alignment = row, document, cut, alignment
        self.limit = limit  # tokens of this run at the most; what lies behind is not read
        self.first = start.states
        self.read_before = start.tokens_read
        self.steps = 0
        self.tokens = 0
        self.final: tuple[np.ndarray, ...] | None = None
        self.mark = Mark(
            start.position, start.tokens_read, start.segments, start.pending, start.last_logits, start.loglik_sum
        )
        self._ahead: list[Segment | None] = []
        self._reads = 0
        self._taken = 0
        self._prefix = start.pending

    def next_segment(self) -> Segment | None:
        """The segment to step through next, or None at the document's end."""
        return self._ahead.pop() if self._ahead else self._read()

    def peek(self) -> Segment | None:
        """The segment behind it, read ahead."""
        if not self._ahead:
            self._ahead.append(self._read())
        return self._ahead[0]

    def _read(self) -> Segment | None:
        size = self.cut.size(self._reads)
        prefix, self._prefix = self._prefix, self._prefix[:0]
        wanted = size - len(prefix)
        if self.limit is not None:
            wanted = min(wanted, self.limit - self._taken)
        ids = self.document.read(wanted) if wanted else self._prefix
        if not len(ids) and not len(prefix):
            return None
        self._reads += 1
        self._taken += len(ids)
        whole = np.concatenate([prefix, ids]) if len(prefix) else ids
        tail = self.alignment == "left" and len(whole) < size
        return Segment(whole, len(ids), self.read_before + self.document.tokens_read, tail)


class Recurrence:
    """Drives documents through an engine; iterating yields a `Piece` per document and step.

    logits  "all": every row of every segment. "last": of the last segment (and where a state is kept). "loglik":
            per token, reduced at once. "none".
    memory  whether pieces carry the states, which costs a fetch per step.
    `engine` gives the live engine, or raises once the runtime is closed. The lock is held during each call of it and no
    longer, so that runs of several threads interleave.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        spec: StepSpec,
        tracks: list[Track],
        lock: threading.RLock,
        logits: str,
        memory: bool = False,
    ) -> None:
        self.tracks = tracks
        self._engine, self._spec, self._lock = engine, spec, lock
        self._logits, self._memory = logits, memory
        # Replaced as one value after each step, so that an interrupt never sees states of one segment and marks of
        # another: (engine states, tracks in the states' row order, their marks).
        self._now: tuple[Any, list[Track], list[Mark]] | None = None

    def __iter__(self) -> Iterator[Piece]:
        if not self.tracks:
            return
        initial = tuple(np.stack(values) for values in zip(*(track.first for track in self.tracks), strict=True))
        with self._lock:
            states = self._engine().load(initial)
        live = list(self.tracks)
        while live:
            segments = [track.next_segment() for track in live]
            states, live, current = self._retire(states, live, segments)
            if not live:
                break
            wanted = [self._wants(track, segment) for track, segment in zip(live, current, strict=True)]
            before = self._before_tails(states, current)
            batch = lay_out([segment.ids for segment in current])
            with self._lock:
                states, logits = self._engine().step(states, batch, any(wanted))
            yield from self._commit(states, live, current, wanted, before, logits)

    def state(self, track: Track) -> State:
        """The state of a document after the last finished step, whose pieces may still be on their way."""
        mark, states = track.mark, track.final
        if states is None and self._now is not None and track in self._now[1]:
            index = self._now[1].index(track)
            mark = self._now[2][index]
            states = self._fetch(self._now[0], [index])[0] if mark.before_tail is None else None
        return as_state(mark, mark.before_tail or states or track.first, self._spec.fingerprint)

    def _wants(self, track: Track, segment: Segment) -> bool:
        if self._logits == "none":
            return False
        if self._spec.logits == "classifier" or self._logits in ("all", "loglik"):
            return True
        following = track.peek()  # a row is needed of the last segment and of the last full one
        return following is None or (following.tail and not segment.tail)

    def _retire(
        self, states: Any, live: list[Track], segments: list[Segment | None]
    ) -> tuple[Any, list[Track], list[Segment]]:
        """Takes documents that have ended out of the batch; their states are fetched."""
        going = [index for index, segment in enumerate(segments) if segment is not None]
        if len(going) == len(live):
            return states, live, [segment for segment in segments if segment is not None]
        ended = [index for index, segment in enumerate(segments) if segment is None]
        for index, values in zip(ended, self._fetch(states, ended), strict=True):
            live[index].final = values
        if going:
            with self._lock:
                states = self._engine().take(states, np.array(going, np.int64))
        return states, [live[index] for index in going], [segment for segment in segments if segment is not None]

    def _before_tails(self, states: Any, current: list[Segment]) -> dict[int, tuple[np.ndarray, ...]]:
        rows = [index for index, segment in enumerate(current) if segment.tail]
        return dict(zip(rows, self._fetch(states, rows), strict=True)) if rows else {}

    def _commit(
        self,
        states: Any,
        live: list[Track],
        current: list[Segment],
        wanted: list[bool],
        before: dict[int, tuple[np.ndarray, ...]],
        logits: np.ndarray | None,
    ) -> Iterator[Piece]:
        """Moves every document's mark past its segment, then yields the pieces."""
        carried = self._fetch(states, list(range(len(live)))) if self._memory else [()] * len(live)
        pieces, marks = [], []
        for index, (track, segment) in enumerate(zip(live, current, strict=True)):
            rows = None if logits is None or not wanted[index] else self._rows(logits[index], segment)
            piece, mark = self._advance(track, segment, rows, before.get(index))
            pieces.append(replace(piece, states=carried[index]))
            marks.append(mark)
        self._now = (states, live, marks)
        for track, segment, mark in zip(live, current, marks, strict=True):
            track.mark = mark
            track.steps += 1
            track.tokens += segment.fresh
        yield from pieces

    def _rows(self, logits: np.ndarray, segment: Segment) -> np.ndarray:
        return logits if self._spec.logits == "classifier" else logits[: len(segment.ids)]

    def _advance(
        self, track: Track, segment: Segment, rows: np.ndarray | None, before: tuple[np.ndarray, ...] | None
    ) -> tuple[Piece, Mark]:
        old = track.mark
        stop = old.position + segment.fresh
        language = self._spec.logits == "lm"
        piece = Piece(track.row, old.segments, stop - segment.fresh, stop)
        total = old.loglik_sum if self._logits == "loglik" else None
        last = None
        if rows is not None:
            if self._logits == "loglik":
                scores = self._scores(track, segment, rows)
                total = None if total is None else total + float(np.nansum(scores))
                piece = replace(piece, loglik=scores[len(segment.ids) - segment.fresh :].copy(), loglik_sum=total)
            elif language and self._logits == "all":
                piece = replace(piece, logits=rows[len(segment.ids) - segment.fresh :].copy())
            else:
                piece = replace(piece, logits=(rows[-1] if language else rows).copy())
            last = rows[-1].copy() if language else None
        if segment.tail:
            return piece, replace(
                old, position=stop, tokens_read=segment.tokens_read, pending=segment.ids.copy(), before_tail=before
            )
        return piece, Mark(stop, segment.tokens_read, old.segments + 1, segment.ids[:0], last, total)

    def _scores(self, track: Track, segment: Segment, rows: np.ndarray) -> np.ndarray:
        """Log-likelihood of every token of a segment; its first one is scored by the row before it."""
        scores = np.full(len(segment.ids), np.nan)
        scores[1:] = log_likelihood(rows[:-1], segment.ids[1:])
        if track.mark.last_logits is not None:
            scores[:1] = log_likelihood(track.mark.last_logits[None], segment.ids[:1])
        return scores

    def _fetch(self, states: Any, rows: list[int]) -> list[tuple[np.ndarray, ...]]:
        """Host copies of some documents' states, each (*shape)."""
        with self._lock:
            engine = self._engine()
            arrays = engine.fetch(engine.take(states, np.array(rows, np.int64)))
        for array, state in zip(arrays, self._spec.states, strict=True):
            if not np.isfinite(array).all():
                raise EngineError(
                    f"engine '{engine.name}' ({engine.dtype}) gave a state '{state.input}' that is not finite. "
                    f"The dtype overflows on this model: use fp32 or bf16, and check the weights"
                )
        return [tuple(array[index].copy() for array in arrays) for index in range(len(rows))]


def lay_out(segments: list[np.ndarray]) -> np.ndarray:
    """One int64 array (batch, longest), rows filled up with padding."""
    if len(segments) == 1:
        return segments[0][None]
    batch = np.full((len(segments), max(map(len, segments))), PAD, np.int64)
    for row, ids in zip(batch, segments, strict=True):
        row[: len(ids)] = ids
    return batch


def as_state(mark: Mark, states: tuple[np.ndarray, ...], fingerprint: str) -> State:
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
