"""A GPU made of host memory as TensorRT sees it: streams that can be captured, memory whose addresses are known.

What a real GPU does not see, and answers with wrong numbers or a crash, is a `Violation`.
"""

from __future__ import annotations

import enum
import functools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
from late_gpu import LateGpu, LateMemory, LateStream
from stand_in import HostGpu, Memory, Stream

from rmt_trt.runtime import cuda

DEFAULT_STREAMS = (0, 1, 2)  # none, the legacy one, that of a thread
# Another build of the same step rounds in another way: by so much.
ROUNDING = np.float32(1 + 2**-21)
GARBAGE = 0xEE


class Violation(AssertionError):
    """What a real library would not have noticed, and paid for with wrong numbers or a crash."""


class World:
    """What the stand-ins of one machine know of each other.

    violations  what went wrong, also where nobody saw the exception
    calls       how often each call that may fail was made
    flaws       facts of an engine that tests change: streamed weights, not capturable, ...
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.violations: list[str] = []
        self.calls: Counter[str] = Counter()
        self.flaws: dict[str, Any] = {}
        self.captured = self.launched = self.enqueued = 0
        self.streams: dict[int, Any] = {}
        self.memory: weakref.WeakSet[Memory] = weakref.WeakSet()
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()  # runtimes, engines, contexts, graphs
        self.released: list[str] = []
        self.threads: set[int] = set()
        self.under_way: Counter[object] = Counter()  # steps of each context that were enqueued and are not done
        self.compiled: set[str] = set()  # kernels of TensorRT-RTX that this process made
        self.logger: Any = None
        self._faults: dict[str, int] = {}

    def refuse(self, what: str) -> None:
        self.violations.append(what)
        raise Violation(what)

    def check(self) -> None:
        assert not self.violations, self.violations

    def fail(self, call: str, number: int = 1) -> None:
        """Lets the call after next `number - 1` ones of that name fail, as the library says it."""
        self._faults[call] = self.calls[call] + number

    def fails(self, call: str) -> bool:
        self.calls[call] += 1
        failing = self._faults.get(call) == self.calls[call]
        if failing:
            self.say("ERROR", f"stand-in: {call} was made to fail")
        return failing

    def say(self, severity: str, message: str) -> None:
        if self.logger is not None:
            self.logger.log(Severity[severity], message)

    def same_thread(self, thread: int) -> None:
        self.threads.add(threading.get_ident())
        if threading.get_ident() != thread:
            self.refuse("an object of the library is used by another thread than the one that made it")

    def stream(self, handle: int) -> Any:
        if handle in DEFAULT_STREAMS:
            self.refuse("work is enqueued on the default stream")
        if handle not in self.streams:
            self.refuse(f"{handle:#x} is no stream")
        self.streams[handle].open()
        return self.streams[handle]

    def place(self, address: int, nbytes: int) -> tuple[weakref.ref[Memory], int]:
        """The live memory in which so many bytes lie from an address on, and where in it they begin."""
        for memory in tuple(self.memory):
            start = address - memory.handle
            if start >= 0 and start + nbytes <= memory.size:
                return weakref.ref(memory), start
        self.refuse(f"{nbytes} bytes at {address:#x} do not lie in memory of the GPU")
        raise AssertionError

    def live(self, kind: type) -> list[Any]:
        return [one for one in tuple(self.alive) if isinstance(one, kind)]


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Strict:
    """What a stream does beside its work: it has a handle of its own, and refuses what spoils a capture."""

    world: World
    handle: int
    capture: Graph | None = None
    synced = 0

    def enter(self, world: World) -> None:
        self.world, self.handle = world, 0x1000 * (len(world.streams) + 1)
        world.streams[self.handle] = self

    def open(self) -> None:
        if self.closed:  # type: ignore[attr-defined]
            self.world.refuse("a stream is used after its release")

    def guard(self) -> None:
        if self.capture is not None:
            self.capture.spoiled = True
            self.world.refuse("a capture is spoiled: only steps belong into it")

    def create_graph_builder(self) -> GraphBuilder:
        return GraphBuilder(self.world, self)

    def leave(self) -> None:
        for one in tuple(self.world.alive):
            if one._thread == threading.get_ident():  # another engine has a thread of its own
                self.world.violations.append(f"a stream is closed before a {one.kind}")
        self.world.released.append("stream")


class StrictStream(Strict, Stream):
    def check(self) -> None:
        self.guard()
        super().check()

    def sync(self) -> None:
        super().sync()
        self.synced += 1

    def do(self, work: Callable[[], None]) -> None:
        self.check()
        work()

    def close(self) -> None:
        super().close()
        self.leave()


class StrictLateStream(Strict, LateStream):
    def enqueue(self, work: Any) -> None:
        self.guard()
        super().enqueue(work)

    do = enqueue

    def sync(self) -> None:
        self.guard()
        super().sync()
        self.synced += 1

    def close(self) -> None:
        super().close()
        self.leave()


class StrictGpu(HostGpu):
    """`rmt_trt.runtime.cuda.Gpu` over host memory, with its own `captured`."""

    def __init__(self, index: int, world: World) -> None:
        super().__init__(index)
        self.world = world
        self.stream, self.copies = StrictStream(), StrictStream()
        for stream in (self.stream, self.copies):
            stream.enter(world)

    def allocate(self, nbytes: int) -> Any:
        if self.world.fails("allocate"):
            raise cuda.EngineError(f"device {self.index} gave no {nbytes} bytes of memory")
        self.stream.check()
        return watched(self.world, Memory(nbytes))


class StrictLateGpu(LateGpu):
    """The same over streams that do their work late."""

    def __init__(self, index: int, world: World) -> None:
        super().__init__(index, world.seed or 0)
        self.world = world
        self.streams.all.clear()
        self.stream, self.copies = StrictLateStream(self.streams), StrictLateStream(self.streams)
        for stream in (self.stream, self.copies):
            stream.enter(world)

    def allocate(self, nbytes: int) -> Any:
        return watched(self.world, LateMemory(nbytes, self.stream))


def watched(world: World, memory: Memory) -> Memory:
    world.memory.add(memory)
    weakref.finalize(memory, world.released.append, "memory")
    return memory


class GraphBuilder:
    def __init__(self, world: World, stream: Any) -> None:
        self._world, self._stream, self._graph = world, stream, Graph(world)

    def begin_building(self, mode: str) -> None:
        assert mode == "thread_local", f"a capture in mode {mode!r} is spoiled by other threads"
        if self._world.fails("begin_building"):
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self._stream.check()
        self._stream.capture = self._graph

    def end_building(self) -> None:
        if self._graph.spoiled:
            raise RuntimeError("Build process encountered an error and has been invalidated.")
        self._stream.capture = None

    def complete(self) -> Graph:
        assert self._stream.capture is None, "a capture was not ended"
        if not self._graph.steps:
            self._world.refuse("a capture holds nothing")
        self._world.captured += 1
        self._world.alive.add(self._graph)
        return self._graph

    def close(self) -> None:
        """Ends a capture that is under way, as cuda.core does, and complains of a spoiled one all the same."""
        under_way, self._stream.capture = self._stream.capture, None
        if under_way is not None and under_way.spoiled:
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")


class Graph:
    """What was captured: steps with the addresses of that moment. It keeps no memory alive.

    spoiled  something came into the capture that cannot be in one
    """

    kind = "Graph"

    def __init__(self, world: World) -> None:
        self._world, self.closed, self._thread = world, False, threading.get_ident()
        self.steps: list[Step] = []
        self.spoiled = False

    def launch(self, stream: Any) -> None:
        self._world.launched += 1
        if self.closed or stream.closed:
            self._world.refuse("a graph or a stream is used after its release")
        if self._world.fails("launch"):
            raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")
        self._world.same_thread(self._thread)
        for step in self.steps:
            stream.do(step.ready())

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._world.alive.discard(self)
            self._world.released.append(self.kind)


class Step:
    """One run of a context: where its tensors lie, by name, and its scratch memory."""

    def __init__(self, context: Any, places: dict[str, Any], scratch: Any) -> None:
        self._world, self._engine, self._places, self._scratch = context._world, context._file, places, scratch
        self.context, self._key = weakref.ref(context), context._key

    def ready(self) -> Callable[[], None]:
        """The work, its memory held: what is freed later is freed behind it on its stream."""
        if self.context() is None:
            self._world.refuse("a graph is replayed after its context was released")
        arrays = {name: self._array(*place) for name, place in self._places.items()}
        scratch = self._array(*self._scratch)
        self._world.under_way[self._key] += 1
        return lambda: self._run(arrays, scratch)

    def _array(self, memory: weakref.ref[Memory], start: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        held = memory()
        if held is None:
            self._world.refuse("a graph replays the address of memory that was freed")
            raise AssertionError
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return held.bytes[start : start + nbytes].view(dtype).reshape(shape)

    def _run(self, arrays: dict[str, np.ndarray], scratch: np.ndarray) -> None:
        self._world.under_way[self._key] -= 1
        scratch.fill(GARBAGE)
        outputs = [table["name"] for table in self._engine["outputs"]]
        inputs = {table["name"]: arrays[table["name"]] for table in self._engine["inputs"]}
        made = session(self._engine["graph"]).run(outputs, inputs)
        for name, value in zip(outputs, made, strict=True):
            states = self._engine["head"] == "none"
            arrays[name][...] = value * ROUNDING if states else value


@functools.cache
def session(path: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
