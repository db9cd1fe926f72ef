"""The recurrence: documents go through an engine segment by segment, and nothing but the states is carried.

The engine maps states in to states out. This file decides which documents take part in a step, lays their segments
into one int64 array padded with -1, and moves each document's mark. It serves whoever wants something of each segment:
streams, callbacks, all logits, log-likelihoods. Whoever wants the answer alone goes through `slots.py`, in blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from rmt_trt.contract import Answer, Engine, Head, StepSpec
from rmt_trt.errors import EngineError
from rmt_trt.runtime.loglik import log_likelihood
from rmt_trt.runtime.results import Piece
from rmt_trt.runtime.state import State
from rmt_trt.runtime.track import Arrays, Mark, Segment, Track, as_state, fetch_finite, lay_out


class Recurrence:
    """Drives documents through an engine; iterating yields a `Piece` per document and step.

    logits  what the engine is asked for. "all": every row of every segment. "last": the last row of the last segment
            (and of the last full one of a language model, which a state keeps). "loglik": per token. "none".
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
        logits: Head,
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
                states, answer = self._engine().step(states, batch, self._logits if any(wanted) else "none")
            yield from self._commit(states, live, current, wanted, before, answer)

    def state(self, track: Track) -> State:
        """The state of a document after the last finished step, whose pieces may still be on their way."""
        mark, states = track.mark, track.final
        if states is None and self._now is not None and track in self._now[1]:
            index = self._now[1].index(track)
            mark = self._now[2][index]
            states = self._fetch(self._now[0], [index])[0] if mark.before_tail is None else None
        return as_state(mark, mark.before_tail or states or track.first, self._spec.fingerprint)

    def _wants(self, track: Track, segment: Segment) -> bool:
        if self._logits != "last":
            return self._logits != "none"
        following = track.peek()
        if following is None:
            return True
        # A state is kept in front of a tail, with the row that scores the tail's first token.
        return self._spec.logits == "lm" and following.tail

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
                states = self._engine().take([states], np.array(going, np.int64))
        return states, [live[index] for index in going], [segment for segment in segments if segment is not None]

    def _before_tails(self, states: Any, current: list[Segment]) -> dict[int, Arrays]:
        rows = [index for index, segment in enumerate(current) if segment.tail]
        return dict(zip(rows, self._fetch(states, rows), strict=True)) if rows else {}

    def _commit(
        self,
        states: Any,
        live: list[Track],
        current: list[Segment],
        wanted: list[bool],
        before: dict[int, Arrays],
        answer: Answer | None,
    ) -> Iterator[Piece]:
        """Moves every document's mark past its segment, then yields the pieces."""
        carried: list[Arrays] = self._fetch(states, list(range(len(live)))) if self._memory else [()] * len(live)
        pieces, marks = [], []
        for index, (track, segment) in enumerate(zip(live, current, strict=True)):
            said = answer if wanted[index] else None
            piece, mark = self._advance(track, segment, index, said, before.get(index))
            pieces.append(replace(piece, states=carried[index]))
            marks.append(mark)
        self._now = (states, live, marks)
        for track, segment, mark in zip(live, current, marks, strict=True):
            track.mark = mark
            track.steps += 1
            track.tokens += segment.fresh
        yield from pieces

    def _advance(
        self, track: Track, segment: Segment, index: int, answer: Answer | None, before: Arrays | None
    ) -> tuple[Piece, Mark]:
        """A document's piece and its new mark. index: its row in the answer."""
        old, count = track.mark, len(segment.ids)
        stop, own = old.position + segment.fresh, count - segment.fresh
        language = self._spec.logits == "lm"
        piece = Piece(track.row, old.segments, stop - segment.fresh, stop)
        total, last = old.loglik_sum if self._logits == "loglik" else None, None
        if answer is not None:
            rows = answer.rows[index]
            if language:
                last = (rows[count - 1] if self._logits == "all" else rows).copy()
            if self._logits == "loglik":
                scores = self._scores(track, segment, index, answer)
                total = None if total is None else total + float(np.nansum(scores))
                piece = replace(piece, loglik=scores[own:].copy(), loglik_sum=total)
            elif language and self._logits == "all":
                piece = replace(piece, logits=rows[own:count].copy())
            else:
                piece = replace(piece, logits=rows.copy())
        if segment.tail:
            return piece, replace(
                old, position=stop, tokens_read=segment.tokens_read, pending=segment.ids.copy(), before_tail=before
            )
        return piece, Mark(stop, segment.tokens_read, old.segments + 1, segment.ids[:0], last, total)

    def _scores(self, track: Track, segment: Segment, index: int, answer: Answer) -> np.ndarray:
        """Log-likelihood of every token of a segment (n,) float64; its first one is scored by the row before it."""
        if answer.scores is None:
            raise EngineError(
                f"engine '{self._engine().name}' gave no log-likelihoods where head='loglik' was asked for"
            )
        scores = answer.scores[index, : len(segment.ids)].astype(np.float64)
        if track.mark.last_logits is not None:
            scores[:1] = log_likelihood(track.mark.last_logits[None], segment.ids[:1])
        return scores

    def _fetch(self, states: Any, rows: list[int]) -> list[Arrays]:
        """Host copies of some documents' states, each (*shape)."""
        with self._lock:
            engine = self._engine()
            arrays = fetch_finite(engine, engine.take([states], np.array(rows, np.int64)), self._spec)
        return [tuple(array[index].copy() for array in arrays) for index in range(len(rows))]
