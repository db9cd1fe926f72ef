"""The CUDA engine's own code over a GPU made of host memory: which graph is taken when, every backbone, its refusals.

What every engine must do is in test_conformance.py, where this stand-in takes part; what only a GPU shows in test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gpu import WIDE, cuda_bundle, open_cuda, wide_bundle
from models import M, S, made
from stand_in import host_gpu

from rmt_trt import EngineError, RMTRuntime
from rmt_trt.bundle import Bundle
from rmt_trt.export.verify import random_document, relative_error
from rmt_trt.runtime import cuda
from rmt_trt.runtime.engines.cuda import CudaEngine


@pytest.fixture(autouse=True)
def _host() -> Iterator[None]:
    with host_gpu():
        yield


def engine_of(runtime: RMTRuntime) -> CudaEngine:
    engine = runtime._engine
    assert isinstance(engine, CudaEngine)
    return engine


@pytest.mark.parametrize("name", WIDE)
def test_every_backbone_follows_step_onnx(name: str) -> None:
    bundle = wide_bundle(name, "fp32")
    with RMTRuntime(bundle, engine="cpu", threads=1) as cpu, open_cuda(bundle, "fp32") as gpu:
        batch = [random_document(gpu.spec, length, seed) for seed, length in enumerate([4 * S + 3, 1, S, 2 * S] * 3)]
        for wanted, found in zip(cpu.run(batch), gpu.run(batch), strict=True):
            assert relative_error(found.memory, wanted.memory) <= 1e-4
            assert wanted.logits is not None
            assert found.logits is not None
            assert relative_error(found.logits, wanted.logits) <= 1e-4


@pytest.mark.parametrize(("name", "least"), [("bert", 8), ("gpt2", 16)])
def test_large_batches_take_the_graph_made_for_them(name: str, least: int) -> None:
    bundle = Bundle(cuda_bundle(name))
    for_many = {g.file for g in bundle.manifest.graphs if g.engine == "cuda" and g.min_batch == least}
    assert len(for_many) == (2 if name == "bert" else 4)
    with open_cuda(cuda_bundle(name), "fp32") as runtime:
        engine, width = engine_of(runtime), runtime.spec.states[0].shape[1]
        values = np.random.default_rng(0).normal(size=(9, M, width)).astype(np.float32)
        segments = np.stack([random_document(runtime.spec, S, seed) for seed in range(9)])[None]
        alone = [
            engine.fetch(engine.steps(engine.load((values[i : i + 1],)), segments[:, i : i + 1])) for i in range(9)
        ]
        taken = {size: set(bucket.replays) for size, bucket in engine._buckets.items()}
        together = engine.fetch(engine.steps(engine.load((values,)), segments))[0]
        assert {key[2] for key in taken[1] if key[:2] == ("full", "none")} == {1}
        assert set(engine._buckets[16].replays) == {("full", "none", least)}
        assert relative_error(together, np.concatenate([states[0] for states in alone])) <= 1e-5


def test_a_head_costs_only_the_step_that_asks_for_it() -> None:
    with open_cuda(cuda_bundle("gpt2"), "fp32") as runtime:
        runtime.run(random_document(runtime.spec, 5 * S, 0))
        assert set(engine_of(runtime)._buckets[1].replays) == {
            ("full", "none", 1), ("step", "last", 1), ("full", "last", 1),
        }  # fmt: skip


def test_a_full_segment_leaves_the_same_memory_whatever_is_asked_for() -> None:
    with open_cuda(cuda_bundle("gpt2"), "fp32") as runtime:
        engine = engine_of(runtime)
        first = engine.load(tuple(value[None] for value in runtime.initial))
        segment = random_document(runtime.spec, S, 3)[None]
        found = [engine.fetch(engine.step(first, segment, head)[0])[0] for head in ("none", "last", "all", "loglik")]
        for memory in found[1:]:
            assert np.array_equal(memory, found[0])


def test_an_engine_that_fails_in_a_block_leaves_earlier_states_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_cuda(cuda_bundle("bert"), "fp32") as runtime:
        engine = engine_of(runtime)
        first = engine.load(tuple(value[None] for value in runtime.initial))
        before = engine.fetch(first)[0]
        segments = random_document(runtime.spec, 6 * S, 3).reshape(6, 1, S)
        wanted = engine.fetch(engine.steps(first, segments))[0]
        replay = engine._buckets[1].replays["full", "none", 1]
        runs = iter([None, None, RuntimeError("the GPU fell off")])

        def fail(side: int) -> None:
            if (error := next(runs)) is not None:
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(replay, "run", fail)
            with pytest.raises(EngineError, match="failed in a step of 1 documents: the GPU fell off"):
                engine.steps(first, segments)
        assert np.array_equal(engine.fetch(first)[0], before)
        assert np.array_equal(engine.fetch(engine.steps(first, segments))[0], wanted)


def test_one_thread_runs_all_graphs_whoever_calls() -> None:
    with open_cuda(cuda_bundle("bert"), "fp32") as runtime:
        tokens = random_document(runtime.spec, 3 * S + 1, 3)
        with ThreadPoolExecutor(3) as callers:
            for out in callers.map(runtime.run, [tokens] * 6):
                assert np.array_equal(out.memory, runtime.run(tokens).memory)
        used = [session.threads for session in engine_of(runtime)._sessions.values()]
        assert len(set.union(*used)) == 1


def test_an_engine_is_released_after_a_capture_of_another_one() -> None:
    runtime = open_cuda(cuda_bundle("bert"), "fp32")
    stream = engine_of(runtime)._gpu.stream
    with ThreadPoolExecutor(1) as other:
        with cuda.CAPTURING:
            ending = other.submit(runtime.close)
            with pytest.raises(TimeoutError):
                ending.result(0.5)
            assert not stream.closed
        ending.result()
    assert stream.closed


def test_the_best_engine_is_taken_and_named() -> None:
    with RMTRuntime(cuda_bundle("bert")) as runtime:
        assert (runtime.engine, runtime.dtype) == ("cuda", "fp32")
        assert set(runtime.refused) == {"tensorrt", "tensorrt-rtx"}
    with RMTRuntime(made("bert").bundle) as runtime:
        assert runtime.engine == "cpu"
        assert "rmt-export" in runtime.refused["cuda"]
