"""A GPU made of host memory, so that the CUDA engine's own code runs where there is none: buckets, copies, bindings.

It keeps the rules that a real one has and refuses what breaks them: addresses of live memory only, aligned to 256
bytes; no input that is an output; copies of equal size; nothing after a release. Graphs run on ONNX Runtime's CPU
provider. Everything is done when it is asked for: the one in `late_gpu.py` shows what happens when it is not.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from rmt_trt.runtime import cuda, native
from rmt_trt.runtime.engines import cuda as engine


class Memory:
    """A buffer of host memory at an aligned address, filled with nonsense."""

    def __init__(self, nbytes: int, owner: Memory | None = None, start: int = 0) -> None:
        if owner is None:
            self._all = np.full(nbytes + cuda.ALIGNMENT, 0xA5, np.uint8)
            start = -self._all.ctypes.data % cuda.ALIGNMENT
        else:
            assert 0 <= start <= owner.size - nbytes, "a part reaches beyond its buffer"
            self._all, start = owner.bytes, start
        self.bytes = self._all[start : start + nbytes]
        self.size, self.owner = nbytes, owner

    @property
    def handle(self) -> int:
        return int(self.bytes.ctypes.data)

    def copy_to(self, target: Memory, *, stream: Stream) -> None:
        stream.check()
        assert target.size == self.size, f"a copy of {self.size} bytes into {target.size}"
        target.bytes[...] = self.bytes

    def fill(self, value: int, *, stream: Stream) -> None:
        stream.check()
        self.bytes[...] = value


class Stream:
    handle = 1

    def __init__(self) -> None:
        self.closed = False

    def check(self) -> None:
        assert not self.closed, "a stream is used after its release"

    def record(self, event: Event) -> None:
        self.check()
        event.recorded = True

    def wait(self, event: Event) -> None:
        self.check()
        assert event.recorded, "a stream waits for an event that was never recorded"

    def sync(self) -> None:
        self.check()

    def close(self) -> None:
        self.check()
        self.closed = True


class Event:
    def __init__(self) -> None:
        self.recorded = False

    def sync(self) -> None:
        assert self.recorded, "the host waits for an event that was never recorded"


class HostGpu(cuda.Gpu):
    """`rmt_trt.runtime.cuda.Gpu` over host memory."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.stream: Any = Stream()
        self.copies: Any = Stream()
        self._aside: list[Any] = []
        self._scratch = self.pinned((1 << 10,), np.uint8)

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def event(self) -> Any:
        return Event()

    def allocate(self, nbytes: int) -> Any:
        self.stream.check()
        return Memory(nbytes)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, np.ndarray]:
        memory = Memory(math.prod(shape) * np.dtype(dtype).itemsize)
        return memory, memory.bytes.view(dtype).reshape(shape)

    def part(self, buffer: Any, start: int, nbytes: int) -> Any:
        return Memory(nbytes, buffer, start)

    def array(self, buffer: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return buffer.bytes.view(dtype).reshape(shape)


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.outputs: dict[str, np.ndarray] = {}

    def bind_input(self, name: str, kind: str, index: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        self.inputs[name] = _at(kind, address, dtype, shape)

    def bind_output(self, name: str, kind: str, index: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        self.outputs[name] = _at(kind, address, dtype, shape)


class Session:
    """A graph on the CPU provider behind the part of an ONNX Runtime session that the engine uses.

    threads  that have run it: a real one keeps its captured graphs for each
    """

    def __init__(self, path: Path, ours: bool, sizes: Mapping[str, int]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        for axis, size in sizes.items():
            options.add_free_dimension_override_by_name(axis, size)
        if ours:
            native.register(options)
        self._inner = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._graphs: dict[str, Binding] = {}
        self.threads: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        self.threads.add(threading.get_ident())
        number = options.get_run_config_entry("gpu_graph_id")
        known = self._graphs.setdefault(number, binding)
        assert known is binding, f"graph {number} was captured with other addresses"
        for given in binding.inputs.values():
            for made in binding.outputs.values():
                assert not np.shares_memory(given, made), "an output lies where an input does"
        names = list(binding.outputs)
        for name, value in zip(names, self._inner.run(names, binding.inputs), strict=True):
            assert value.shape == binding.outputs[name].shape, f"{name} has shape {value.shape}"
            binding.outputs[name][...] = value


def _at(kind: str, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    assert kind == "cuda"
    assert address % cuda.ALIGNMENT == 0, f"address {address:#x} is not aligned"
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


@contextmanager
def host_gpu() -> Iterator[None]:
    """While it is open, engine "cuda" runs on host memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "Gpu", HostGpu)
        patch.setattr(cuda, "refusal", lambda index: None)
        patch.setattr(engine, "open_session", lambda path, gpu, ours, sizes: Session(path, ours, sizes))
        patch.setattr(onnxruntime, "get_available_providers", lambda: [engine.PROVIDER])
        yield
