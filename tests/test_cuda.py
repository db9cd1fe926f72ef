"""The CUDA engine on an NVIDIA GPU: every backbone in every dtype, buckets, DLPack, constant memory.

What every engine must do stands in test_conformance.py, where this engine runs in fp32. `RMT_REQUIRE=cuda pytest -m gpu`
fails where there is no GPU; without it these tests are skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gpu import WIDE, cuda_bundle, open_cuda, require_gpu, wide_bundle
from models import M, S, made

from rmt_trt import EngineError, RMTRuntime, TokenError
from rmt_trt.bundle import Bundle
from rmt_trt.export.verify import TOLERANCES, random_document, relative_error
from rmt_trt.runtime import cuda
from rmt_trt.runtime.engines.cuda import CudaEngine

pytestmark = pytest.mark.gpu
DTYPES = ("fp32", "fp16", "bf16")
LENGTHS = (7 * S + 3, 1, S, 4 * S, S + 1, 2 * S - 1, 5 * S, 3)


@pytest.fixture(autouse=True)
def _gpu() -> None:
    require_gpu()


@pytest.fixture
def runtime() -> Iterator[RMTRuntime]:
    with open_cuda(cuda_bundle("bert"), "fp32") as opened:
        yield opened


def engine_of(runtime: RMTRuntime) -> CudaEngine:
    engine = runtime._engine
    assert isinstance(engine, CudaEngine)
    return engine


def documents(runtime: RMTRuntime, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    return [random_document(runtime.spec, length, seed) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WIDE)
def test_every_backbone_follows_the_fp32_graph_on_the_cpu(name: str, dtype: str) -> None:
    bundle = wide_bundle(name, dtype)
    assert Bundle(bundle).graph("cuda", dtype, "none", "full") is not None
    with RMTRuntime(bundle, engine="cpu", threads=4) as cpu, open_cuda(bundle, dtype) as gpu:
        assert (gpu.engine, gpu.dtype) == ("cuda", dtype)
        for length in (1, S, 19 * S + 3):
            tokens = random_document(gpu.spec, length, 5)
            pieces = (runtime.stream(tokens, memory=True, alignment="left") for runtime in (cpu, gpu))
            for wanted, found in zip(*pieces, strict=True):
                assert relative_error(found.memory, wanted.memory) <= TOLERANCES[dtype]
                assert relative_error(found.logits, wanted.logits) <= TOLERANCES[dtype]
            assert relative_error(gpu.run(tokens, alignment="left").memory, wanted.memory) <= TOLERANCES[dtype]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9])
def test_every_number_of_documents_gives_what_each_gets_alone(runtime: RMTRuntime, count: int) -> None:
    batch = documents(runtime, (LENGTHS * 2)[:count])
    for found, tokens in zip(runtime.run(batch), batch, strict=True):
        alone = runtime.run(tokens)
        assert relative_error(found.memory, alone.memory) <= 1e-5
        assert relative_error(found.logits, alone.logits) <= 1e-5


def test_many_documents_get_bit_for_bit_what_equal_batches_give() -> None:
    with open_cuda(wide_bundle("bert", "fp16"), "fp16") as runtime:
        batch = documents(runtime, (4 * S, 6 * S, 3 * S, 8 * S))
        together = dict(runtime.run_many(batch, slots=4, alignment="left"))
        for row, tokens in enumerate(batch):
            four = runtime.run([tokens] * 4, alignment="left")
            assert np.array_equal(together[row].memory, four[0].memory)
            assert np.array_equal(together[row].logits, four[3].logits)


def test_rows_of_padding_give_their_states_back(runtime: RMTRuntime) -> None:
    engine = engine_of(runtime)
    values = np.random.default_rng(0).normal(size=(3, M, runtime.spec.states[0].shape[1])).astype(np.float32)
    segment = np.full((3, S), -1, np.int64)
    segment[1, :5] = 7
    new, answer = engine.step(engine.load((values,)), segment, "last")
    found = engine.fetch(new)[0]
    assert np.array_equal(found[0], values[0])
    assert np.array_equal(found[2], values[2])
    assert not np.array_equal(found[1], values[1])
    assert answer is not None
    assert answer.rows.shape == (3, runtime.spec.num_logits)


def test_states_are_values_that_later_steps_leave_alone(runtime: RMTRuntime) -> None:
    engine = engine_of(runtime)
    first = engine.load(tuple(np.stack([value] * 2) for value in runtime.initial))
    before = engine.fetch(first)[0]
    segments = np.stack(
        [np.stack([random_document(runtime.spec, S, n), random_document(runtime.spec, S, n + 50)]) for n in range(5)]
    )
    second = engine.steps(first, segments)
    kept = engine.fetch(second)[0]
    engine.steps(second, segments)
    assert np.array_equal(engine.fetch(first)[0], before)
    assert np.array_equal(engine.fetch(second)[0], kept)
    one_by_one: Any = first
    for segment in segments:
        one_by_one, _ = engine.step(one_by_one, segment, "none")
    assert np.array_equal(engine.fetch(one_by_one)[0], kept)
    mixed = engine.fetch(engine.take([first, second], np.array([3, 0, 1, 2, 2])))[0]
    assert np.array_equal(mixed, np.concatenate([before, kept])[[3, 0, 1, 2, 2]])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_document_in_parts_gives_the_whole_bit_for_bit(name: str, dtype: str) -> None:
    with open_cuda(wide_bundle(name, dtype), dtype) as runtime:
        tokens = random_document(runtime.spec, 3 * S + 7, 2)
        whole = runtime.run(tokens, alignment="left")
        for cut in (1, S - 1, S, S + 1, 2 * S + 5, 3 * S, 3 * S + 6):
            state = runtime.run(tokens[:cut], alignment="left").state
            parts = runtime.run(tokens[cut:], state=state, alignment="left")
            assert np.array_equal(parts.memory, whole.memory), cut
            assert np.array_equal(parts.logits, whole.logits), cut


def test_a_state_goes_from_one_engine_to_another(runtime: RMTRuntime) -> None:
    tokens = random_document(runtime.spec, 5 * S + 3, 3)
    with RMTRuntime(cuda_bundle("bert"), engine="cpu", threads=1) as cpu:
        state = cpu.run(tokens[: 3 * S + 1], alignment="left").state
        wanted = cpu.run(tokens, alignment="left")
    assert relative_error(runtime.run(tokens[3 * S + 1 :], state=state, alignment="left").memory, wanted.memory) <= 1e-4


def test_log_likelihoods_are_computed_on_the_device() -> None:
    bundle = cuda_bundle("gpt2")
    assert Bundle(bundle).graph("cuda", "fp32", "loglik", "step") is not None
    with RMTRuntime(bundle, engine="cpu", threads=1) as cpu, open_cuda(bundle, "fp32") as gpu:
        batch = documents(gpu)
        for wanted, found in zip(cpu.run(batch, logits="loglik"), gpu.run(batch, logits="loglik"), strict=True):
            assert wanted.loglik is not None
            assert found.loglik is not None
            np.testing.assert_allclose(found.loglik, wanted.loglik, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tokens_on_the_device_are_read_through_dlpack(runtime: RMTRuntime, dtype: torch.dtype) -> None:
    tokens = random_document(runtime.spec, 3 * S + 7, 4)
    wanted = runtime.run(tokens)
    on_device = torch.from_numpy(tokens).to("cuda", dtype)
    assert np.array_equal(runtime.run(on_device).memory, wanted.memory)
    batch = torch.stack([on_device, on_device])
    assert np.array_equal(runtime.run(batch)[1].logits, runtime.run(np.stack([tokens, tokens]))[1].logits)
    with pytest.raises(TokenError, match=r"strides \(2,\).*contiguous"):
        runtime.run(torch.stack([on_device, on_device], dim=1)[:, 0])


def test_answers_stay_on_the_device_as_dlpack(runtime: RMTRuntime) -> None:
    tokens = random_document(runtime.spec, 3 * S + 7, 4)
    wanted, found = runtime.run(tokens), runtime.run(tokens, on_device=True)
    memory, logits = torch.from_dlpack(found.memory), torch.from_dlpack(found.logits)
    assert (memory.is_cuda, logits.is_cuda) == (True, True)
    runtime.run(tokens[:S])  # what comes later does not change them
    assert np.array_equal(memory[0].cpu().numpy(), wanted.memory)
    assert np.array_equal(logits[0].cpu().numpy(), wanted.logits)


def test_answers_on_the_device_outlive_the_runtime() -> None:
    with open_cuda(cuda_bundle("bert"), "fp32") as runtime:
        tokens = random_document(runtime.spec, 3 * S + 7, 4)
        wanted, found = runtime.run(tokens), runtime.run(tokens, on_device=True)
    assert np.array_equal(torch.from_dlpack(found.memory)[0].cpu().numpy(), wanted.memory)
    assert np.array_equal(torch.from_dlpack(found.logits)[0].cpu().numpy(), wanted.logits)


def test_device_memory_does_not_grow_with_the_length(runtime: RMTRuntime) -> None:
    def free() -> int:
        torch.cuda.synchronize()
        return int(torch.cuda.mem_get_info()[0])

    tokens = random_document(runtime.spec, 2000 * S + 3, 1)
    runtime.run(tokens[: 2 * S + 3])
    before = free()
    for _ in range(3):
        runtime.run(tokens)
        assert free() == before


def test_threads_get_what_each_gets_alone(runtime: RMTRuntime) -> None:
    batch = documents(runtime)
    wanted = [runtime.run(tokens) for tokens in batch]
    found: dict[int, Any] = {}

    def work(row: int) -> None:
        found[row] = runtime.run(batch[row])

    threads = [threading.Thread(target=work, args=(row,)) for row in range(len(batch))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row, alone in enumerate(wanted):
        assert np.array_equal(found[row].memory, alone.memory)


def test_the_bare_replay_leaves_states_alone(runtime: RMTRuntime) -> None:
    tokens = random_document(runtime.spec, 4 * S, 1)
    wanted = runtime.run(tokens)
    engine_of(runtime).replay(1, 7)
    assert np.array_equal(runtime.run(tokens).memory, wanted.memory)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineError, match=r"device 99 was asked for; the CUDA driver sees \d+"):
        open_cuda(cuda_bundle("bert"), "fp32", device=99)


def test_a_second_device_gives_the_same() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    tokens = random_document(made("bert").spec, 5 * S + 3, 1)
    with open_cuda(cuda_bundle("bert"), "fp32") as first, open_cuda(cuda_bundle("bert"), "fp32", device=1) as second:
        assert np.array_equal(first.run(tokens).memory, second.run(tokens).memory)
        on_second = torch.from_numpy(tokens).to("cuda:1")
        assert np.array_equal(first.run(on_second).memory, second.run(tokens, on_device=False).memory)
        shared = torch.from_dlpack(second.run(tokens, on_device=True).memory)
        assert shared.device.index == 1


def test_the_dtype_that_a_bundle_lacks_is_refused_with_the_command_that_adds_it() -> None:
    with pytest.raises(EngineError, match=r"no graphs for CUDA in bf16 .* rmt-export .* --engine cuda --dtype bf16"):
        RMTRuntime(cuda_bundle("bert"), engine="cuda", dtype="bf16")
    with RMTRuntime(cuda_bundle("bert")) as best:
        assert (best.engine, best.dtype) == ("cuda", "fp32")


def test_what_is_captured_is_done_when_it_is_launched_and_not_before() -> None:
    gpu = cuda.Gpu(0)
    with gpu.current():
        source, target = gpu.to_device([np.arange(1000), np.zeros(1000, np.int64)])
        graph = gpu.captured(lambda: gpu.copy(source, target))
        assert not gpu.to_host([(target, (1000,), np.int64)])[0].any()
        for start in (0, 7):
            gpu.copy(gpu.to_device([np.arange(start, start + 1000)])[0], source)
            graph.launch(gpu.stream)
            assert np.array_equal(gpu.to_host([(target, (1000,), np.int64)])[0], np.arange(start, start + 1000))
        graph.close()
    gpu.close()


def test_a_capture_that_goes_wrong_leaves_the_stream_usable() -> None:
    def broken() -> None:
        raise RuntimeError("in the middle")

    gpu = cuda.Gpu(0)
    with gpu.current():
        buffer = gpu.zeros(64)
        # To wait within a capture is what a driver refuses: by its own error, or by giving no graph.
        for work, message in ((broken, "in the middle"), (gpu.wait, "captured no CUDA graph|STREAM_CAPTURE")):
            with pytest.raises(EngineError, match=message):
                gpu.captured(work)
        assert not gpu.to_host([(buffer, (8,), np.int64)])[0].any()
    gpu.close()


def test_what_another_thread_does_spoils_no_capture() -> None:
    gpu, other = cuda.Gpu(0), cuda.Gpu(0)
    with gpu.current():
        source, target = gpu.zeros(64), gpu.zeros(64)
        gpu.wait()

        def meanwhile() -> None:
            with other.current():
                for _ in range(20):
                    other.pinned((1 << 12,), np.uint8)
                    other.zeros(1 << 20)
                    other.wait()

        def work() -> None:
            thread = threading.Thread(target=meanwhile)
            thread.start()
            gpu.copy(source, target)
            thread.join()
            gpu.copy(target, source)

        graph = gpu.captured(work)
        graph.launch(gpu.stream)
        gpu.wait()
        graph.close()
    for one in (gpu, other):
        one.close()
