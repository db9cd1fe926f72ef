"""A document in the scheduler: its tokens in blocks, and where its states lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmt_trt.contract import Engine, StepSpec
from rmt_trt.runtime.track import Arrays, Mark, Track

EMPTY = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Held:
    """An engine's States of `size` documents."""

    states: Any
    size: int


@dataclass(frozen=True, eq=False)
class Place:
    """Where one document's states lie: a row of States."""

    held: Held
    row: int


class Lane:
    """One document between its first token and its answer.

    A full segment of which no logits are wanted is *plain*: plain ones are stepped in blocks, the others one by one.

    plain      plain segments that come next, among the tokens that were read
    known      whether the document's end was read, so that no more segments than these are plain
    lookahead  tokens that must be seen behind a full segment before it is known to be plain: none where no logits are
               wanted; one, to know that it is not the last; a segment of them, where a short last one keeps a state
               in front of it, with the row of logits that scores its first token
    """

    def __init__(self, index: int, track: Track, place: Place, spec: StepSpec, lookahead: int) -> None:
        self.index, self.track, self.place = index, track, place
        self.full = 0
        self.short = 0
        self.before: Place | None = None
        self.tail = EMPTY
        self.last_row: np.ndarray | None = None
        self.answer: Any = None
        self._size, self._language = spec.segment_length, spec.logits == "lm"
        self._lookahead = lookahead
        self.plain, self.known = 0, False
        self._ids, self._at = EMPTY, 0

    @property
    def left(self) -> int:
        """Tokens that were read and not stepped through."""
        return len(self._ids) - self._at

    @property
    def steps(self) -> int:
        """Segments stepped through."""
        return self.full + self.short

    def fill(self, segments: int) -> None:
        """Reads on until `segments` plain ones, or one of another kind, lie ready, or the document has ended."""
        wanted = segments * self._size + self._lookahead - self.left
        if self.known or wanted <= 0:
            return
        rest = self._ids[self._at :]
        new = self.track.read(wanted)
        self.known = len(new) < wanted
        self._ids, self._at = (np.concatenate([rest, new]) if len(rest) else new), 0
        self._look()

    def _look(self) -> None:
        full = self.track.cut.size(self.steps) == self._size
        self.plain = max(0, (self.left - self._lookahead) // self._size) if full else 0

    def take_block(self, segments: int) -> np.ndarray:
        """Moves past as many plain segments: (segments, S) int64."""
        start, self._at = self._at, self._at + segments * self._size
        self.full += segments
        self.plain -= segments
        return self._ids[start : self._at].reshape(segments, self._size)

    def next_ids(self) -> np.ndarray:
        """The segment that comes next, (n,) int64; empty behind the document's end. After `fill(1)`."""
        return self._ids[self._at : self._at + min(self.left, self.track.cut.size(self.steps))]

    def is_last(self) -> bool:
        """Whether the segment that comes next is the last. After `fill(1)`, where a lookahead tells."""
        return self.known and self.left <= self.track.cut.size(self.steps)

    def advance(self, new: Place) -> None:
        """Moves past the segment that comes next, whose states lie at `new`."""
        ids = self.next_ids()
        if len(ids) == self._size:
            self.full += 1
        else:
            self.short += 1
            if self.track.alignment == "left":
                self.before, self.tail = self.place, ids
        self._at += len(ids)
        self.place = new
        self._look()

    def say(self, row: Any, last: bool) -> None:
        """Takes the logits of a segment's last token, after `advance`; `last` says that it was the document's last."""
        if self._language and not len(self.tail):
            self.last_row = row
        if last:
            self.answer = row

    def finish(self, final: Arrays, before: Arrays | None) -> None:
        """Moves the track to the document's end. final, before: its states there, and in front of a short last segment."""
        old, track = self.track.mark, self.track
        last, total = (old.last_logits, old.loglik_sum) if not self.full else (self.last_row, None)
        track.mark = Mark(
            old.position + track.taken,
            track.tokens_read,
            old.segments + self.full,
            self.tail.copy(),
            last,
            total,
            before,
        )
        track.steps, track.tokens, track.final = self.steps, track.taken, final


def gather(engine: Engine, places: Sequence[Place]) -> Held:
    """The States of some documents, in their order; those that lie so already are given as they are."""
    parts: dict[int, Held] = {}
    offsets: dict[int, int] = {}
    total = 0
    for place in places:
        if id(place.held) not in parts:
            parts[id(place.held)], offsets[id(place.held)] = place.held, total
            total += place.held.size
    rows = np.array([offsets[id(place.held)] + place.row for place in places], np.int64)
    if len(parts) == 1 and total == len(rows) and (rows == np.arange(total)).all():
        return places[0].held
    return Held(engine.take([held.states for held in parts.values()], rows), len(rows))
