"""What the TensorRT engine's own code refuses, and how it fails, on a strict stand-in for its libraries and a GPU."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import M, S, made
from tensorrt_stand_in import engine_file, engine_of, tensorrt_host
from tensorrt_world import StrictGpu, World

from rmt_trt import EngineError, RMTRuntime
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.export.verify import random_document
from rmt_trt.runtime.engines import tensorrt_versions


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with tensorrt_host(tmp_path / "cache") as found:
        yield found


# What an engine takes.


def test_more_documents_than_the_profile_takes_are_refused_with_what_to_do(world: World, tmp_path: Path) -> None:
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle, batch=2), max_batch=5) as runtime:
        documents = [random_document(runtime.spec, S, seed) for seed in range(3)]
        with pytest.raises(
            ContractError, match=r"stream got 3 documents; .* max_batch=2 together\. Build .* --max-batch 3"
        ):
            runtime.stream(documents)
        with pytest.raises(ContractError, match=r"slots is 3; expected .* from 1 to 2\. Build .* --max-batch 3"):
            runtime.run_many(documents, slots=3)
        states = engine_of(runtime).load(tuple(np.stack([value] * 3) for value in runtime.initial))
        with pytest.raises(
            ContractError, match=r"a step of 3 documents; engine '.*' takes at most 2\. .* --max-batch 3"
        ):
            engine_of(runtime).steps(states, np.stack(documents)[None])


def test_an_engine_for_fewer_documents_than_asked_for_lowers_max_batch_and_says_so(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "rmt_trt"),
        RMTRuntime(engine_file(tmp_path, made("bert").bundle, batch=2)) as runtime,
    ):
        assert runtime.max_batch == 2
        assert "max_batch is 2, for which the engine was built, not 64" in caplog.text


# What goes wrong.


def told(call: str) -> str:
    return f"stand-in: {call} was made to fail"


@pytest.mark.parametrize(
    "call",
    [
        "deserialize_cuda_engine", "create_runtime_config", "create_runtime_cache", "set_runtime_cache",
        "create_execution_context", "set_device_memory", "set_input_shape", "infer_shapes", "set_tensor_address",
        "execute_async_v3",
    ],
)  # fmt: skip
def test_what_fails_while_an_engine_is_opened_says_why_and_leaves_nothing(
    call: str, world: World, tmp_path: Path
) -> None:
    path = engine_file(tmp_path, made("bert").bundle)
    world.fail(call)
    with pytest.raises(EngineError, match=rf"TensorRT-RTX 1\.7\.1\.116 .*{told(call)}"):
        RMTRuntime(path)
    gc.collect()
    assert not list(world.alive), "something of the library is still there"
    assert not [memory for memory in world.memory if memory.size], "memory of the GPU is still there"
    assert all(stream.closed for stream in world.streams.values())
    with RMTRuntime(path) as runtime:
        runtime.run(random_document(runtime.spec, 2 * S, 0))


@pytest.mark.parametrize("number", range(1, 5))
def test_a_gpu_without_memory_leaves_nothing_either(number: int, world: World, tmp_path: Path) -> None:
    path = engine_file(tmp_path, made("bert").bundle)
    world.fail("allocate", number)
    with pytest.raises(EngineError, match=r"gave no \d+ bytes of memory"):
        RMTRuntime(path)
    gc.collect()
    assert not list(world.alive)
    assert all(stream.closed for stream in world.streams.values())


def test_a_replay_that_fails_is_an_engine_error_and_earlier_states_stay(world: World, tmp_path: Path) -> None:
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle)) as runtime:
        tokens = random_document(runtime.spec, 6 * S, 0)
        wanted = runtime.run(tokens)
        world.fail("launch", 4)
        with pytest.raises(EngineError, match="TensorRT failed in a step of 1 documents: CUDA_ERROR_LAUNCH_FAILED"):
            runtime.run(tokens)
        assert np.array_equal(runtime.run(tokens).memory, wanted.memory)


@pytest.mark.parametrize("call", ["set_tensor_address", "execute_async_v3"])
def test_a_step_that_is_not_enqueued_is_an_engine_error(call: str, world: World, tmp_path: Path) -> None:
    world.flaws["streamable_weights_size"] = 1
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle)) as runtime:
        tokens = random_document(runtime.spec, 6 * S, 0)
        wanted = runtime.run(tokens)
        world.fail(call, 4)
        with pytest.raises(EngineError, match=told(call)):
            runtime.run(tokens)
        assert np.array_equal(runtime.run(tokens).memory, wanted.memory)


def spoiled(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def test_an_engine_file_that_was_altered_is_not_loaded(world: World, tmp_path: Path) -> None:
    path = spoiled(engine_file(tmp_path, made("bert").bundle), lambda data: data[:-1] + b"?")
    with pytest.raises(FormatError, match=r"is not the engine that its record describes \(SHA-256 differs\)"):
        RMTRuntime(path)
    assert not world.calls["deserialize_cuda_engine"]


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"outputs": []}, r"the engine has the tensors \['memory', 'segment'\]; its record says"),
        ({"inputs": [{"name": "memory", "dtype": "float16", "shape": [-1, M, 32]}, {"name": "segment", "dtype": "int64", "shape": [-1, -1]}]}, r"the engine's 'memory' is .*HALF of shape \(-1, 4, 32\); its record says float32"),
        ({"profile": {"memory": {"min": [1, M, 32], "opt": [2, M, 32], "max": [2, M, 32]}, "segment": {"min": [1, 1], "opt": [2, S], "max": [2, S]}}}, r"the engine takes .* for 'memory'; its record says"),
    ],
)  # fmt: skip
def test_an_engine_that_is_not_what_its_record_says_is_refused(
    lie: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    world.flaws["engine"] = lie
    with pytest.raises(FormatError, match=message):
        RMTRuntime(engine_file(tmp_path, made("bert").bundle))


def test_an_engine_file_that_cannot_be_read_to_its_end_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Torn:
        def __init__(self, file: Any) -> None:
            self._file = file

        def read(self, count: int) -> bytes:
            if self._file.tell() > 40:
                raise OSError(5, "Input/output error")
            return bytes(self._file.read(min(count, 30)))

        def seek(self, offset: int, whence: int) -> int:
            return int(self._file.seek(offset, whence))

    kept = tensorrt_versions._file_reader
    monkeypatch.setattr(tensorrt_versions, "_file_reader", lambda trt: lambda file: kept(trt)(Torn(file)))
    with pytest.raises(EngineError, match=r"cannot load .*Input/output error"):
        RMTRuntime(engine_file(tmp_path, made("bert").bundle))


def test_an_engine_file_is_read_in_pieces(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_versions, "READ_BYTES", 7)
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle)) as runtime:
        runtime.run(random_document(runtime.spec, S, 0))


@pytest.mark.parametrize(
    ("error", "seen", "message"),
    [
        (ZeroDivisionError("by zero"), EngineError, r"captured no CUDA graph\. The driver says: by zero"),
        (EngineError("the library's own words"), EngineError, "^the library's own words$"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ],
)
@pytest.mark.parametrize("spoils", [False, True])
def test_a_capture_has_ended_whatever_is_raised_in_it_and_that_is_what_is_said(
    spoils: bool, error: BaseException, seen: type[BaseException], message: str
) -> None:
    gpu = StrictGpu(0, World())

    def work() -> None:
        if spoils:
            with pytest.raises(EngineError, match="a capture is spoiled"):
                gpu.wait()
        raise error

    with pytest.raises(seen, match=message):
        gpu.captured(work)
    assert gpu.stream.capture is None
    gpu.wait()
