"""The scheduler: a fixed number of slots carries documents of any lengths through an engine, in blocks of full segments.

Whatever is the same for every document is one call: full segments of all slots, many steps deep, are laid out and
handed over at once (`Engine.steps`), and the host does not wait for them. A segment that is short, or whose logits are
wanted, takes its document out of its slot, which goes to the next one at once; such documents are stepped together when
there are enough of them. Full and short ones wait apart: a full segment is always stepped as a full one, so that a
document cut in two parts gives bit for bit what the whole gives.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from rmt_trt.contract import Engine, Head, StepSpec
from rmt_trt.runtime.lane import Held, Lane, Place, gather
from rmt_trt.runtime.reading import Reading
from rmt_trt.runtime.track import Arrays, Track, fetch_finite, lay_out

BLOCK = 64  # segments of a block at the most
FIRST_BLOCK = 2  # of the first one; each takes twice as many, so that an engine does not wait long for its first tokens
BLOCK_BYTES = 4 << 20  # of a block's tokens, unless one segment of every slot takes more


class Slots:
    """Carries documents through an engine; `run` yields them as they end, each with its answer.

    engine     gives the live engine, or raises once the runtime is closed; called under `lock`, which is held for a
               block or a step and no longer, so that runs of several threads interleave
    initial    the states that a document begins with
    on_device  leaves answers and final states where they were computed: nothing is fetched, and no state is kept
    progress   called after each block or step with the tokens handed to the engine so far

    steps       engine steps so far
    slot_steps  segments of documents in them; of `slots` times `steps` the rest were idle slots

    At most 2 * slots documents are open at a time.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        spec: StepSpec,
        lock: threading.RLock,
        slots: int,
        reading: Reading,
        initial: Arrays,
        on_device: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.slots, self.steps, self.slot_steps, self.tokens = slots, 0, 0, 0
        self._engine, self._spec, self._lock = engine, spec, lock
        self._reading, self._initial, self.on_device, self._progress = reading, initial, on_device, progress
        self._start: Held | None = None
        self._active: list[Lane] = []  # with a plain segment next, in a slot
        self._ready: deque[Lane] = deque()  # with a plain segment next, waiting for a slot
        self._full: deque[Lane] = deque()  # with a full segment next, whose logits are wanted
        self._short: deque[Lane] = deque()  # with a short segment next
        self._exhausted = False
        self._next_block = FIRST_BLOCK

    @property
    def idle_share(self) -> float:
        """Idle slots' share of all slots over all steps so far, 0 before the first."""
        return 1 - self.slot_steps / (self.slots * self.steps) if self.steps else 0.0

    def run(self, tracks: Iterator[tuple[int, Track]], may_open: Callable[[], bool] = lambda: True) -> Iterator[Lane]:
        """Yields documents as they end, their tracks at the end. `may_open` holds back the next one while it is False.

        Errors: of the documents and of the engine, after which the others are lost and the runtime is usable.
        """
        while True:
            self._admit(tracks, may_open)
            group = self._due()
            if group:
                ended = self._step(group)
            elif self._active:
                ended = self._block()
            else:
                return
            if self._progress is not None:
                self._progress(self.tokens)
            yield from ended

    def _admit(self, tracks: Iterator[tuple[int, Track]], may_open: Callable[[], bool]) -> None:
        """Fills free slots, first with documents that wait for one, then with new ones."""
        while len(self._active) < self.slots and max(len(self._full), len(self._short)) < self.slots:
            if self._ready:
                self._active.append(self._ready.popleft())
                continue
            waiting = len(self._full) + len(self._short)
            if self._exhausted or len(self._active) + waiting >= 2 * self.slots or not may_open():
                return
            index, track = next(tracks, (0, None))
            if track is None:
                self._exhausted = True
                return
            self._sort(Lane(index, track, self._begin(track), self._spec, self._lookahead()))

    def _lookahead(self) -> int:
        if self._reading.logits == "none":
            return 0
        keeps_row = self._spec.logits == "lm" and self._reading.alignment == "left" and not self.on_device
        return self._spec.segment_length if keeps_row else 1

    def _begin(self, track: Track) -> Place:
        if track.first is not self._initial:
            return Place(self._load(track.first), 0)
        if self._start is None:
            self._start = self._load(self._initial)
        return Place(self._start, 0)

    def _load(self, states: Arrays) -> Held:
        with self._lock:
            return Held(self._engine().load(tuple(value[None] for value in states)), 1)

    def _sort(self, lane: Lane) -> bool:
        """Puts a document where it waits for its next segment; False at its end."""
        lane.fill(1)
        if lane.plain:
            self._ready.append(lane)
            return True
        size = len(lane.next_ids())
        if size:
            (self._full if size == self._spec.segment_length else self._short).append(lane)
        return size > 0

    def _due(self) -> list[Lane]:
        """Documents of a queue to be stepped together now, or none of them: then the slots go on."""
        queue = max(self._short, self._full, key=len)
        if len(queue) < self.slots:
            if len(self._active) == self.slots:
                return []
            if self._exhausted:  # what would come back into a slot is worth a step of its own, the rest waits
                starts = any(not lane.is_last() for lane in self._short)
                queue = self._short if starts or not self._full else self._full
                if self._active and not starts:
                    return []
        return [queue.popleft() for _ in range(min(self.slots, len(queue)))]

    def _block(self) -> list[Lane]:
        """Steps the slots through plain segments, up to the next one of another kind in any of them."""
        lanes = self._active
        largest = max(1, min(self._next_block, BLOCK_BYTES // (8 * len(lanes) * self._spec.segment_length)))
        self._next_block = min(BLOCK, 2 * self._next_block)
        most = min([largest, *(lane.plain for lane in lanes if lane.known)])
        for lane in lanes:
            lane.fill(most)
        count = min([most, *(lane.plain for lane in lanes)])
        segments = np.empty((count, len(lanes), self._spec.segment_length), np.int64)
        for row, lane in enumerate(lanes):
            segments[:, row] = lane.take_block(count)
        with self._lock:
            engine = self._engine()
            states = engine.steps(gather(engine, [lane.place for lane in lanes]).states, segments)
        held = Held(states, len(lanes))
        for row, lane in enumerate(lanes):
            lane.place = Place(held, row)
        self._count(count, len(lanes), segments.size)
        return self._leave()

    def _leave(self) -> list[Lane]:
        """Takes documents without a plain segment next out of their slots; returns those that have ended."""
        for lane in self._active:
            if not lane.plain:
                lane.fill(1)
        leaving = [lane for lane in self._active if not lane.plain]
        if not leaving:
            return []
        self._active = [lane for lane in self._active if lane.plain]
        if self._active:  # the others' rows are not kept alive by those that wait
            with self._lock:
                held = gather(self._engine(), [lane.place for lane in leaving])
            for row, lane in enumerate(leaving):
                lane.place = Place(held, row)
        return self._finish([lane for lane in leaving if not self._sort(lane)])

    def _step(self, group: list[Lane]) -> list[Lane]:
        """Steps documents of a queue together through one segment each; returns those that have ended."""
        wanted = [self._wants(lane) for lane in group]
        if self.on_device and any(wanted) and len(group) > 1:
            # Rows that stay on a device cannot be dealt out to the documents from here: one step each.
            return [ended for lane in group for ended in self._step([lane])]
        last = [lane.is_last() for lane in group]
        batch = lay_out([lane.next_ids() for lane in group])
        head: Head = "last" if any(wanted) else "none"
        with self._lock:
            engine = self._engine()
            states, answer = engine.step(
                gather(engine, [lane.place for lane in group]).states, batch, head, host=not self.on_device
            )
        held = Held(states, len(group))
        tokens = 0
        for row, lane in enumerate(group):
            tokens += len(lane.next_ids())
            lane.advance(Place(held, row))
            if answer is not None and wanted[row]:
                lane.say(answer.rows if self.on_device else answer.rows[row].copy(), last[row])
        self._count(1, len(group), tokens)
        return self._finish([lane for lane in group if not self._sort(lane)])

    def _wants(self, lane: Lane) -> bool:
        """Whether logits are wanted of the segment that comes next: every full one in a queue is there for them."""
        if self._reading.logits == "none":
            return False
        return lane.is_last() or len(lane.next_ids()) == self._spec.segment_length

    def _count(self, steps: int, documents: int, tokens: int) -> None:
        self.steps += steps
        self.slot_steps += steps * documents
        self.tokens += tokens

    def _finish(self, lanes: list[Lane]) -> list[Lane]:
        """Takes the states of documents that have ended from the engine."""
        if not lanes:
            return lanes
        tails = [lane for lane in lanes if lane.before is not None]
        with self._lock:
            engine = self._engine()
            if self.on_device:
                for lane in lanes:
                    lane.finish(engine.share(gather(engine, [lane.place]).states), None)
                return lanes
            final = fetch_finite(engine, gather(engine, [lane.place for lane in lanes]).states, self._spec)
            before: Arrays = ()
            if tails:
                places = [lane.before for lane in tails if lane.before is not None]
                before = fetch_finite(engine, gather(engine, places).states, self._spec)
        rows = {id(lane): row for row, lane in enumerate(tails)}
        for row, lane in enumerate(lanes):
            kept = tuple(value[rows[id(lane)]].copy() for value in before) if id(lane) in rows else None
            lane.finish(tuple(value[row].copy() for value in final), kept)
        return lanes
