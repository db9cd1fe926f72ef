"""A GPU of host memory whose streams do their work late, in any order that the events between them allow.

What is enqueued on a stream is done when somebody waits for it, or before that by chance: a generator of random numbers
decides which stream goes on. So an answer comes out right only where every copy, step and release is ordered behind
what it needs. Memory that nobody holds any more is filled with nonsense where its stream has come that far.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from stand_in import Binding, HostGpu, Memory, Session

from rmt_trt.runtime import buckets, cuda
from rmt_trt.runtime.engines import cuda as engine

NONSENSE = 0x5A


@dataclass(eq=False)
class Mark:
    """A place in a stream's work, as an event recorded it."""

    done: bool = False


class LateEvent:
    """`mark` is where it was recorded last."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.mark: Mark | None = None

    def sync(self) -> None:
        mark = self.mark
        assert mark is not None, "the host waits for an event that was never recorded"
        self._streams.until(lambda: mark.done)


class LateStream:
    """Work in order; a `Mark` in it is either passed (its own) or waited for (another stream's)."""

    handle = 1

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.work: deque[Callable[[], None] | Mark] = deque()
        self.closed = False
        streams.all.append(self)

    def enqueue(self, work: Callable[[], None] | Mark) -> None:
        assert not self.closed, "a stream is used after its release"
        self.work.append(work)
        self._streams.by_chance()

    def check(self) -> None:
        assert not self.closed, "a stream is used after its release"

    def record(self, event: LateEvent) -> None:
        mark = event.mark = Mark()
        self.enqueue(lambda: setattr(mark, "done", True))

    def wait(self, event: LateEvent) -> None:
        assert event.mark is not None, "a stream waits for an event that was never recorded"
        self.enqueue(event.mark)

    def sync(self) -> None:
        self.check()
        self._streams.until(lambda: not self.work)

    def close(self) -> None:
        self.check()
        self.closed = True

    def go_on(self) -> bool:
        """Does the next piece of work, unless there is none or it waits for another stream."""
        if not self.work or (isinstance(self.work[0], Mark) and not self.work[0].done):
            return False
        work = self.work.popleft()
        if not isinstance(work, Mark):
            work()
        return True


class Streams:
    """All streams of a GPU and the chance that moves them."""

    def __init__(self, seed: int) -> None:
        self.all: list[LateStream] = []
        self._chance = random.Random(seed)
        self._eagerness = self._chance.choice((0.0, 0.3, 0.9))

    def by_chance(self) -> None:
        while self._chance.random() < self._eagerness:
            self._chance.choice(self.all).go_on()

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            order = self._chance.sample(self.all, len(self.all))
            assert any(stream.go_on() for stream in order), "every stream waits for another"


class LateMemory(Memory):
    """Device memory that is released, and then anybody's, in the order of a stream."""

    def __init__(self, nbytes: int, stream: LateStream, owner: LateMemory | None = None, start: int = 0) -> None:
        super().__init__(nbytes, owner, start)
        self._stream = stream

    def copy_to(self, target: Memory, *, stream: Any) -> None:
        assert target.size == self.size, f"a copy of {self.size} bytes into {target.size}"
        source, place = self.bytes, target.bytes
        stream.enqueue(lambda: place.__setitem__(..., source))

    def fill(self, value: int, *, stream: Any) -> None:
        place = self.bytes
        stream.enqueue(lambda: place.fill(value))

    def __del__(self) -> None:
        if self.owner is None and not self._stream.closed:
            place = self.bytes
            self._stream.work.append(lambda: place.fill(NONSENSE))


class Shared(np.ndarray):
    """An array in device memory, which lives as long as the array (not as long as views of it)."""

    buffer: LateMemory


class LateGpu(HostGpu):
    """`rmt_trt.runtime.cuda.Gpu` over such streams."""

    def __init__(self, index: int, seed: int) -> None:
        self.index, self.streams, self._aside = index, Streams(seed), []
        self.stream, self.copies = LateStream(self.streams), LateStream(self.streams)
        self._scratch = self.pinned((1 << 10,), np.uint8)

    def event(self) -> Any:
        return LateEvent(self.streams)

    def allocate(self, nbytes: int) -> Any:
        return LateMemory(nbytes, self.stream)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, np.ndarray]:
        memory = LateMemory(int(np.prod(shape)) * np.dtype(dtype).itemsize, self.stream)
        return memory, memory.bytes.view(dtype).reshape(shape)

    def part(self, buffer: Any, start: int, nbytes: int) -> Any:
        return LateMemory(nbytes, self.stream, buffer, start)

    def array(self, buffer: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        self.stream.sync()
        shared = buffer.bytes.view(dtype).reshape(shape).view(Shared)
        shared.buffer = buffer
        return shared


class LateSession(Session):
    """A graph whose runs are work on the GPU's stream."""

    def __init__(self, path: Path, stream: LateStream) -> None:
        super().__init__(path, False, {})
        self._stream = stream

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        run = super().run_with_iobinding
        self._stream.enqueue(lambda: run(binding, options))


@contextmanager
def late_gpu(seed: int, staged: int = 2) -> Iterator[None]:
    """While it is open, engine "cuda" runs on such a GPU, and stages so many segments at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "Gpu", lambda index: LateGpu(index, seed))
        patch.setattr(cuda, "refusal", lambda index: None)
        patch.setattr(engine, "open_session", lambda path, gpu, ours, sizes: LateSession(path, gpu.stream))
        patch.setattr(buckets, "STAGED", staged)
        patch.setattr(onnxruntime, "get_available_providers", lambda: [engine.PROVIDER])
        yield
