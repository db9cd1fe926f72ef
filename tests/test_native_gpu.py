"""Graphs with rmt-trt's own operators on an NVIDIA GPU: beside those without, captured, over many segments, together.

Both libraries are needed: the GPU's ONNX Runtime, and ours, which a C compiler builds when rmt-trt is installed.
`RMT_REQUIRE=cuda,native pytest -m gpu` fails where one is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from gpu import open_cuda, require_gpu, wide_bundle
from hardware import require_native
from models import S

from rmt_trt import RMTRuntime
from rmt_trt.export.verify import TOLERANCES, random_document, relative_error
from rmt_trt.runtime import native
from rmt_trt.runtime.engines.cuda import CudaEngine, GraphReplay

pytestmark = pytest.mark.gpu
DTYPES = ("fp16", "bf16")


@pytest.fixture(autouse=True)
def _gpu() -> None:
    require_gpu()
    require_native()


@contextmanager
def opened(dtype: str, own: bool = True, name: str = "bert") -> Iterator[RMTRuntime]:
    """A runtime with our own operators or without, and proof that it is so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.SWITCH, "1" if own else "0")
        runtime = open_cuda(wide_bundle(name, dtype), dtype)
    with runtime:
        engine = engine_of(runtime)
        files = [Path(engine._graphs[key].file).name for key, _ in engine._sessions]
        assert files
        assert all(("-native-" in file) is own for file in files)
        yield runtime


def engine_of(runtime: RMTRuntime) -> CudaEngine:
    engine = runtime._engine
    assert isinstance(engine, CudaEngine)
    return engine


def batch_of(runtime: RMTRuntime, size: int, segments: int) -> list[np.ndarray]:
    return [random_document(runtime.spec, segments * S, seed) for seed in range(size)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama", "qwen2"])
def test_native_products_give_what_onnx_runtimes_give(name: str, dtype: str) -> None:
    with (
        opened(dtype, name=name) as own,
        opened(dtype, own=False, name=name) as other,
        RMTRuntime(wide_bundle(name, dtype), engine="cpu", threads=4) as exact,
    ):
        for size in (1, 3, 16):
            batch = batch_of(own, size, 20)
            for found, beside, wanted in zip(own.run(batch), other.run(batch), exact.run(batch), strict=True):
                # Without products of our own the same to the last bit, where rounding hides another order of sums.
                assert found.memory.tobytes() != beside.memory.tobytes() or name in ("llama", "qwen2")
                assert relative_error(found.memory, beside.memory) <= TOLERANCES[dtype]
                assert relative_error(found.memory, wanted.memory) <= TOLERANCES[dtype]
                assert relative_error(found.logits, wanted.logits) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_documents_of_unequal_lengths_get_what_each_gets_alone(name: str, dtype: str) -> None:
    with opened(dtype, name=name) as runtime:
        batch = [
            random_document(runtime.spec, length, seed) for seed, length in enumerate((1, S + 3, 4 * S, 20 * S - 1))
        ]
        for found, tokens in zip(runtime.run(batch), batch, strict=True):
            assert relative_error(found.memory, runtime.run(tokens).memory) <= TOLERANCES[dtype]


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_captured_replays_give_what_a_run_without_capture_gives(name: str, dtype: str, size: int) -> None:
    with opened(dtype, name=name) as runtime:
        engine = engine_of(runtime)
        first = [found.memory for found in runtime.run(batch_of(runtime, size, 20))]
        again = [found.memory for found in runtime.run(batch_of(runtime, size, 20))]
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        bucket = engine._buckets[size]
        replay = bucket.replays[engine._key("full", "none", size)]
        assert isinstance(replay, GraphReplay)
        shape = (size, *runtime.spec.states[0].shape)

        def after(run: Callable[[], None]) -> np.ndarray:
            target = bucket.sides[1][0]
            engine._gpu.copy(engine._gpu.zeros(int(np.prod(shape)) * 4), target)
            run()
            return engine._gpu.to_host([(target, shape, np.float32)])[0].copy()

        def both() -> list[np.ndarray]:
            plainly = onnxruntime.RunOptions()
            plainly.add_run_config_entry("gpu_graph_id", "-1")  # neither captured nor replayed
            with engine._gpu.current():
                return [
                    after(lambda: replay.run(0)),
                    after(lambda: replay.session.run_with_iobinding(replay.bindings[0], plainly)),
                    after(lambda: replay.run(0)),
                ]

        replayed, plain, replayed_again = engine._worker.submit(both).result()
        assert np.abs(plain).max() > 0
        assert np.array_equal(replayed, plain)
        assert np.array_equal(replayed, replayed_again)


def test_device_memory_does_not_grow_over_segments_nor_over_sessions() -> None:
    def free() -> int:
        torch.cuda.synchronize()
        return int(torch.cuda.mem_get_info()[0])

    with opened("fp16") as runtime:
        batch = batch_of(runtime, 8, 500)
        runtime.run([tokens[: 3 * S] for tokens in batch])
        before = free()
        for _ in range(3):
            runtime.run(batch)
            assert free() == before
    left = []
    for _ in range(4):  # what a session held goes with it, its working memory for products too
        with opened("fp16") as runtime:
            runtime.run(batch_of(runtime, 8, 2))
        left.append(free())
    assert left[-1] >= left[0] - (8 << 20)  # less than a session's 32 MiB for each that came and went


def test_runtimes_with_native_products_and_without_live_in_one_process() -> None:
    with ExitStack() as stack:
        runtimes = [stack.enter_context(opened("fp16", own)) for own in (True, False, True)]
        short = stack.enter_context(opened("bf16"))
        batch = batch_of(runtimes[0], 8, 5)
        wanted = [[found.memory for found in runtime.run(batch)] for runtime in runtimes]
        assert all(np.array_equal(a, b) for a, b in zip(wanted[0], wanted[2], strict=True))
        assert not np.array_equal(wanted[0][0], wanted[1][0])
        short.run(batch)
        for runtime, before in zip(runtimes, wanted, strict=True):  # in turns
            assert all(np.array_equal(a.memory, b) for a, b in zip(runtime.run(batch), before, strict=True))
        runtimes[0].close()
        for runtime, before in list(zip(runtimes, wanted, strict=True))[1:]:
            assert all(np.array_equal(a.memory, b) for a, b in zip(runtime.run(batch), before, strict=True))
