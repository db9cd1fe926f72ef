"""Many documents through a fixed number of slots, answered as they finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError, TokenError
from rmt_trt.runtime.lane import Lane
from rmt_trt.runtime.reading import Opener, Reading, distinct, one_each, size_of
from rmt_trt.runtime.results import RunResult, answered
from rmt_trt.runtime.slots import Slots
from rmt_trt.runtime.tokens import NO_TOKENS, NOTHING, as_array, is_number
from rmt_trt.runtime.track import Track, as_state
from rmt_trt.runtime.turns import Turns

HELD_BACK = 8  # times the slots: documents between the next to be yielded and the newest, with ordered=True


class Many(Iterator[tuple[int, RunResult]]):
    """Iterate for (index, RunResult); `RMTRuntime.run_many` says in which order.

    steps       engine steps so far
    slot_steps  segments of documents in them
    idle_share  the share of slots, over all steps so far, that carried no document

    They can be read at any time. An error ends the iteration; results that were yielded before it stand. Threads that
    share it take turns: each result goes to one of them.
    """

    def __init__(
        self, slots: Slots, tracks: Iterator[tuple[int, Track]], spec: StepSpec, reading: Reading, ordered: bool
    ) -> None:
        self._slots, self._spec, self._reading = slots, spec, reading
        self._opened = self._yielded = 0
        self._turns = Turns("run_many")
        window = HELD_BACK * slots.slots
        ready = (lambda: self._opened - self._yielded < window) if ordered else (lambda: True)
        ended = slots.run(self._counted(tracks), ready)
        self._results = self._in_order(ended) if ordered else self._as_they_end(ended)

    def __next__(self) -> tuple[int, RunResult]:
        with self._turns.take():
            return next(self._results)

    @property
    def steps(self) -> int:
        return self._slots.steps

    @property
    def slot_steps(self) -> int:
        return self._slots.slot_steps

    @property
    def idle_share(self) -> float:
        return self._slots.idle_share

    def _counted(self, tracks: Iterator[tuple[int, Track]]) -> Iterator[tuple[int, Track]]:
        for item in tracks:
            self._opened += 1
            yield item

    def _as_they_end(self, ended: Iterator[Lane]) -> Iterator[tuple[int, RunResult]]:
        for lane in ended:
            yield lane.index, result_of(lane, self._spec, self._reading, self._slots.on_device)

    def _in_order(self, ended: Iterator[Lane]) -> Iterator[tuple[int, RunResult]]:
        held: dict[int, RunResult] = {}
        for lane in ended:
            held[lane.index] = result_of(lane, self._spec, self._reading, self._slots.on_device)
            while self._yielded in held:
                self._yielded += 1
                yield self._yielded - 1, held.pop(self._yielded - 1)


def result_of(lane: Lane, spec: StepSpec, reading: Reading, on_device: bool) -> RunResult:
    """The answer of a document that has ended."""
    mark, final = lane.track.mark, lane.track.final or ()
    keep = reading.alignment == "left" and not on_device
    return answered(
        lane.track,
        spec,
        as_state(mark, mark.before_tail or final, spec.fingerprint) if keep else None,
        logits=lane.answer,
        row=None if on_device else lane.answer,
        on_device=on_device,
    )


def in_slots(slots: Slots, tracks: list[Track], spec: StepSpec, reading: Reading) -> list[RunResult]:
    """The answers of opened documents, in their order; `tracks` is emptied, so that one that has ended is let go."""
    count = len(tracks)
    order = longest_first([track.size for track in tracks])
    waiting = dict(enumerate(tracks))
    tracks.clear()
    ended = slots.run((index, waiting.pop(index)) for index in order)
    results = {lane.index: result_of(lane, spec, reading, slots.on_device) for lane in ended}
    return [results[index] for index in range(count)]


def opened(opener: Opener, found: Iterator[tuple[int, Any, Any]]) -> Iterator[tuple[int, Track]]:
    """Documents opened when their turn comes. Errors: as `Opener.open`, naming the document's index."""
    # What iterator each open document is read from; an entry goes with its track.
    reading: WeakKeyDictionary[Track, Iterator[Any]] = WeakKeyDictionary()
    for index, tokens, length in found:
        if is_number(tokens):
            raise TokenError(
                f"document {index} is the number {tokens!r}; run_many takes documents, each with its tokens. For one "
                f"document use run"
            )
        other = next((track.row for track, source in reading.items() if source is tokens), None)
        if other is not None:
            raise TokenError(
                f"documents {other} and {index} are one and the same iterator, which gives its tokens once only. Pass "
                f"an iterator for each, or a list"
            )
        track = opener.open_one(index, tokens, None, length, f"document {index}")
        if isinstance(tokens, Iterator):
            reading[track] = tokens
        yield index, track
        del track  # not to be kept alive from here


def sources(documents: Any, length: Any, ordered: bool) -> tuple[Iterator[tuple[int, Any, Any]], int | None]:
    """((index, tokens, stated length) in the order in which they are to be started, how many there are if known).

    A list is started longest first, unless the answers are wanted in order. Errors: ContractError, TokenError.
    """
    documents = as_array(documents)
    if isinstance(documents, np.ndarray):
        if documents.ndim != 2:
            raise TokenError(
                f"run_many takes many documents and got an array of shape {documents.shape}; pass a list or an iterator of "
                f"documents, or a 2-D array. For one document use run"
            )
        documents = list(documents)
    if isinstance(documents, (str, *NO_TOKENS)) or not isinstance(documents, Iterable):
        raise TokenError(
            f"run_many takes many documents and got {type(documents).__name__}; pass a list or an iterator of documents, or "
            f"a 2-D array. For one document use run"
        )
    if not isinstance(documents, Sequence):
        if length is not None and not isinstance(length, Iterable):
            raise ContractError(
                f"length is {type(length).__name__}; of an iterator of documents it is an iterator too, a length for each"
            )
        return _endless(documents, length), None
    distinct(list(documents))
    lengths = one_each(length, len(documents), True, "length")
    order = list(range(len(documents)))
    if not ordered:
        order = longest_first([size_of(document, stated) for document, stated in zip(documents, lengths, strict=True)])
    return ((index, documents[index], lengths[index]) for index in order), len(documents)


def longest_first(sizes: Sequence[int | None]) -> list[int]:
    """Places in the order of their sizes, the largest first; those of unknown size before them, as they may be large."""
    return sorted(range(len(sizes)), key=lambda index: (sizes[index] is not None, -(sizes[index] or 0)))


def _endless(documents: Iterable[Any], length: Any) -> Iterator[tuple[int, Any, Any]]:
    lengths = None if length is None else iter(length)
    for index, document in enumerate(documents):
        stated = None if lengths is None else next(lengths, NOTHING)
        if stated is NOTHING:
            raise ContractError(
                f"length ended before the documents: it gave {index}, and document {index} came. Give one for each, None "
                f"where unset"
            )
        yield index, document, stated
