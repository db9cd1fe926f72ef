"""Plain graphs for CUDA. ONNX Runtime captures nothing in which sizes of tensors are computed as it runs: it is told them
beforehand, by a session for each bucket."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from gpu import open_cuda, require_gpu
from models import S, made
from shared import once
from stand_in import host_gpu

from rmt_trt.bundle import Bundle
from rmt_trt.calibration import add_without_data
from rmt_trt.contract import BATCH_AXIS, TEXT_AXIS
from rmt_trt.export import EngineOptions, add_engine_graphs
from rmt_trt.export.verify import TOLERANCES, random_document, relative_error
from rmt_trt.runtime.engines.cuda import CudaEngine

NAMES = ("bert", "gpt2", "llama")
SIZES = {"Shape", "Size", "Range", "ConstantOfShape", "NonZero"}  # what computes sizes, or is as large as they say
LENGTHS = (2 * S + 1, 3 * S + 7, 5 * S)


def plain(name: str, dtype: str) -> Path:
    """The bundle of a model of the catalogue with a plain graph for CUDA."""

    def add(path: Path) -> None:
        shutil.copytree(made(name).bundle, path)
        if dtype.endswith("weights"):
            add_without_data(path, "cuda", dtype, options=EngineOptions(segments=3, accept_drift=True))
        else:
            add_engine_graphs(path, "cuda", dtype, options=EngineOptions(plain=True, check_segments=0, segments=3))

    return once(f"{name}-plain-{dtype}.rmt", add)


def computes_sizes(path: Path, folder: Path, **sizes: int) -> set[str]:
    """The nodes of that kind that are left in a session that was told these sizes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    for axis, size in sizes.items():
        options.add_free_dimension_override_by_name(axis, size)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node
    return SIZES & {node.op_type for node in nodes}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8-weights"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_that_computes_sizes(name: str, dtype: str, tmp_path: Path) -> None:
    bundle = Bundle(plain(name, dtype))
    (entry,) = [graph for graph in bundle.manifest.graphs if (graph.engine, graph.dtype) == ("cuda", dtype)]
    path = bundle.graph_path(entry)
    assert computes_sizes(path, tmp_path)
    assert computes_sizes(path, tmp_path, **{BATCH_AXIS: 4, TEXT_AXIS: S}) == set()


@pytest.mark.parametrize("name", NAMES)
def test_each_bucket_has_a_session_that_knows_its_sizes(name: str) -> None:
    with host_gpu(), open_cuda(plain(name, "fp32"), "fp32") as runtime, made(name).open() as exact:
        batch = [random_document(runtime.spec, length, seed) for seed, length in enumerate(LENGTHS)]
        for found, wanted in zip(runtime.run(batch), exact.run(batch), strict=True):
            assert relative_error(found.memory, wanted.memory) <= TOLERANCES["fp32"]
            assert relative_error(found.logits, wanted.logits) <= TOLERANCES["fp32"]
        engine: Any = runtime._engine
        assert isinstance(engine, CudaEngine)
        sizes = {size: session.get_inputs() for (_, size), session in engine._sessions.items()}
        assert set(sizes) >= {1, 4}
        for size, values in sizes.items():
            assert {tuple(value.shape[:2]) for value in values if value.name == "segment"} == {(size, S)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8-weights", "int4-weights"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_runs_them(name: str, dtype: str) -> None:
    require_gpu()
    with open_cuda(plain(name, dtype), dtype) as runtime, made(name).open() as exact:
        batch = [random_document(runtime.spec, length, seed) for seed, length in enumerate(LENGTHS)]
        for found, wanted in zip(runtime.run(batch), exact.run(batch), strict=True):
            assert relative_error(found.memory, wanted.memory) <= TOLERANCES.get(dtype, 0.5)
