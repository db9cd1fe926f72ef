"""The order of the CUDA engine's work on its streams, on a GPU of host memory that does everything late."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu import cuda_bundle
from late_gpu import LateStream, late_gpu
from models import S

from rmt_trt import EngineError, RMTRuntime
from rmt_trt.export.verify import random_document, relative_error
from rmt_trt.runtime import cuda
from rmt_trt.runtime.engines.cuda import GraphReplay

LENGTHS = (9 * S + 3, 1, 13 * S, S + 1, 4 * S)
SEEDS = range(6)


@pytest.fixture(scope="module")
def wanted() -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Documents and the memory that the CPU engine gives each."""
    with RMTRuntime(cuda_bundle("bert"), engine="cpu", threads=1) as runtime:
        documents = [random_document(runtime.spec, length, seed) for seed, length in enumerate(LENGTHS)]
        yield documents, [runtime.run(tokens, alignment="left").memory for tokens in documents]


def worst(seed: int, documents: list[np.ndarray], memories: list[np.ndarray], way: str) -> float:
    """The largest error of a memory with a GPU whose streams go on in the order of a seed."""
    with late_gpu(seed), RMTRuntime(cuda_bundle("bert"), engine="cuda") as runtime:
        found: dict[int, Any] = {}
        if way == "run":
            found = {row: runtime.run(tokens, alignment="left").memory for row, tokens in enumerate(documents)}
        elif way == "run_many":
            found = {row: out.memory for row, out in runtime.run_many(documents, slots=2, alignment="left")}
        elif way == "on_device":
            many = runtime.run_many(documents, slots=2, alignment="left", on_device=True)
            found = {row: out.memory for row, out in many}  # lies there while others are stepped
        else:
            stream = runtime.stream(documents, alignment="left", memory=True)
            for piece in stream:
                found[piece.row] = piece.memory
        return max(relative_error(found[row].reshape(memory.shape), memory) for row, memory in enumerate(memories))


@pytest.mark.parametrize("way", ["run", "run_many", "on_device", "stream"])
@pytest.mark.parametrize("seed", SEEDS)
def test_answers_do_not_depend_on_when_the_gpu_does_its_work(
    seed: int, way: str, wanted: tuple[list[np.ndarray], list[np.ndarray]]
) -> None:
    assert worst(seed, *wanted, way) <= 1e-5


@pytest.mark.parametrize("error", [RuntimeError("launch failed"), KeyboardInterrupt()], ids=["failure", "ctrl-c"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_that_breaks_off_leaves_earlier_states_and_later_runs_alone(
    seed: int,
    error: BaseException,
    wanted: tuple[list[np.ndarray], list[np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents, memories = wanted
    with late_gpu(seed), RMTRuntime(cuda_bundle("bert"), engine="cuda") as runtime:
        kept = runtime.run(documents[0], alignment="left", on_device=True)
        left, run = [7], GraphReplay.run

        def breaking(replay: GraphReplay, side: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise error
            run(replay, side)

        monkeypatch.setattr(GraphReplay, "run", breaking)
        with pytest.raises(EngineError if isinstance(error, RuntimeError) else KeyboardInterrupt):
            runtime.run(documents[2], alignment="left")
        assert left == [0]
        for tokens, memory in zip(documents, memories, strict=True):
            assert relative_error(runtime.run(tokens, alignment="left").memory, memory) <= 1e-5
        assert relative_error(kept.memory.reshape(memories[0].shape), memories[0]) <= 1e-5


@pytest.mark.parametrize("missing", ["wait of the copies", "wait of the steps", "wait of the host"])
def test_a_missing_wait_is_seen(
    missing: str, wanted: tuple[list[np.ndarray], list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above can find: without any of the three waits of a stage some order gives wrong answers."""
    if missing == "wait of the host":
        monkeypatch.setattr("late_gpu.LateEvent.sync", lambda event: None)
    else:
        kept = LateStream.wait

        def wait(stream: LateStream, event: Any) -> None:
            if (stream is stream._streams.all[-1]) != (missing == "wait of the copies"):
                kept(stream, event)

        monkeypatch.setattr(LateStream, "wait", wait)
    assert any(not worst(seed, *wanted, "run") <= 1e-5 for seed in range(12))


def test_memory_that_is_let_go_of_is_freed_where_the_device_is_next_used(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[str] = []
    monkeypatch.setattr(cuda, "made_current", lambda device: nullcontext())

    class Buffer:
        def __init__(self, handle: int, size: int, owner: Any = None) -> None:
            self.handle, self.size, self.owner = handle, size, owner

        from_handle = classmethod(lambda cls, handle, size, owner=None: cls(handle, size, owner))

        def __del__(self) -> None:
            if self.owner is None:
                freed.append("freed")

    gpu = bare_gpu(lambda nbytes, stream: Buffer(256, nbytes))
    gpu._core = SimpleNamespace(Buffer=Buffer)
    buffer = gpu.allocate(64)
    part = gpu.part(buffer, 0, 8)
    del buffer
    with gpu.current():
        assert freed == []
    del part
    assert freed == []
    with gpu.current():
        assert freed == ["freed"]


def test_the_device_that_a_caller_chose_stays_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [7]

    def set_to(context: int) -> None:
        current[0] = context

    driver = SimpleNamespace(cuCtxGetCurrent=lambda: (0, current[0]), cuCtxSetCurrent=set_to)
    bindings = SimpleNamespace(driver=driver)
    stand_ins = {"cuda": SimpleNamespace(bindings=bindings), "cuda.bindings": bindings, "cuda.bindings.driver": driver}
    for name, module in stand_ins.items():  # the packages themselves need not be installed
        monkeypatch.setitem(sys.modules, name, module)
    device = SimpleNamespace(set_current=lambda: set_to(1))
    with cuda.made_current(device):
        assert current == [1]
    assert current == [7]
    set_to(0)
    with cuda.made_current(device):
        pass
    assert current == [1]


def test_a_gpu_without_memory_says_so_in_an_engine_error() -> None:
    def refuse(nbytes: int, stream: Any) -> Any:
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")

    with pytest.raises(EngineError, match=r"device 3 gave no 4096 bytes.*max_batch.*CUDA_ERROR_OUT_OF_MEMORY"):
        bare_gpu(refuse).allocate(4096)


def test_a_step_that_failed_on_the_gpu_is_an_engine_error_where_it_is_waited_for() -> None:
    gpu = bare_gpu(lambda nbytes, stream: None)

    def fail() -> None:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    gpu.stream = SimpleNamespace(sync=fail)
    with pytest.raises(EngineError, match=r"device 3 failed in a step.*CUDA_ERROR_ILLEGAL_ADDRESS"):
        gpu.to_host([])


def bare_gpu(allocate: Any) -> Any:
    """A `Gpu` without a device, whose memory comes from a function."""
    gpu: Any = object.__new__(cuda.Gpu)
    gpu.index, gpu.stream, gpu._aside = 3, None, []
    gpu.device = SimpleNamespace(memory_resource=SimpleNamespace(allocate=allocate))
    gpu._scratch = (None, np.zeros(1024, np.uint8))
    return gpu
