"""A stream: documents on their way, piece by piece, with the state to go on from and the result at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.runtime.reading import Reading
from rmt_trt.runtime.recurrence import Recurrence
from rmt_trt.runtime.results import BatchResult, Piece, RunResult, answered
from rmt_trt.runtime.track import Track
from rmt_trt.runtime.turns import Turns


class Stream(Iterator[Piece]):
    """Iterate for pieces; `state` says where the documents can go on, `result` what they came to.

    With `keep`, the rows of logits="all" and "loglik" are gathered for the result; without it only the newest piece of
    each document is held, and memory stays constant. Threads that share it take turns: each piece goes to one of them.
    """

    def __init__(
        self, recurrence: Recurrence, spec: StepSpec, reading: Reading, batch: bool, keep: bool = False
    ) -> None:
        self._recurrence, self._spec, self._reading, self._batch = recurrence, spec, reading, batch
        self._source = iter(recurrence)
        self._gather = keep and reading.logits in ("all", "loglik")
        self._pieces: dict[int, list[Piece]] = {track.row: [] for track in recurrence.tracks}
        self._ended = False
        self._turns = Turns("the stream")

    def __next__(self) -> Piece:
        with self._turns.take():
            return self._next()

    def _next(self) -> Piece:
        piece = next(self._source, None)
        if piece is None:
            # A step that failed ends the iteration too, but no document with it.
            self._ended = all(track.final is not None for track in self._recurrence.tracks)
            raise StopIteration
        pieces = self._pieces[piece.row]
        if not self._gather:
            pieces.clear()
        pieces.append(piece)
        return piece

    @property
    def state(self) -> Any:
        """A State after the last finished step; of a batch, one per document. It stays right when a step broke off.

        Errors: ContractError with alignment "right" or "center", where a cut changes the segmentation.
        """
        if self._reading.alignment != "left":
            raise ContractError(
                f"this stream cuts documents with alignment='{self._reading.alignment}', where a document in two parts is "
                f"cut differently from the whole. To stop and go on, use alignment='left'"
            )
        states = [self._recurrence.state(track) for track in self._recurrence.tracks]
        return states if self._batch else states[0]

    @property
    def result(self) -> RunResult | BatchResult:
        """The answer, once every piece was taken: of a batch a BatchResult. Errors: ContractError before that."""
        return BatchResult(self.results) if self._batch else self.results[0]

    @property
    def results(self) -> list[RunResult]:
        """The answers as a list, one per document. Errors: as `result`."""
        if not self._ended:
            raise ContractError("the stream has not ended; take every piece before asking for its result")
        return [self._result(track) for track in self._recurrence.tracks]

    def _result(self, track: Track) -> RunResult:
        pieces, left = self._pieces[track.row], self._reading.alignment == "left"
        rows = [piece.logits for piece in pieces if piece.logits is not None]
        scores = [piece.loglik for piece in pieces if piece.loglik is not None]
        logits = None
        if rows and self._gather:
            logits = np.concatenate(rows) if self._spec.logits == "lm" else np.stack(rows)
        elif rows and self._reading.logits == "last":
            logits = rows[-1]
        return answered(
            track,
            self._spec,
            self._recurrence.state(track) if left else None,
            logits,
            rows[-1][-1] if rows and rows[-1].ndim > 1 else rows[-1] if rows else None,
            np.concatenate(scores) if scores and self._gather else None,
            pieces[-1].loglik_sum,
        )
