"""What tests on an NVIDIA GPU share: whether there is one, and bundles with graphs for it."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
from hardware import require_hardware
from models import made, make_model
from shared import once

from rmt_trt import RMTRuntime
from rmt_trt.export import ExportOptions, add_engine_graphs, export_model
from rmt_trt.model.checkpoint import LoadedModel
from rmt_trt.model.step import model_spec
from rmt_trt.runtime import cuda, native
from rmt_trt.runtime.engines.cuda import PROVIDER

# Sizes that the fused kernels take: heads of 32, and for NeoX 16 rotated dimensions of 32.
WIDTH = 128
# Larger weights let the rounding errors of half precision grow along a decoder's recurrence beyond what a test can tell
# from a fault; with these, forgetting the memory still changes the logits by 3 % and more.
SCALE = 2.5
WIDE: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 128, "intermediate_size": 256},
    "roberta": {"hidden_size": 128, "intermediate_size": 256},
    "distilbert": {"dim": 128, "hidden_dim": 256},
    "gpt2": {"n_embd": 128},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 256, "rotary_pct": 0.5},
    "llama": {"hidden_size": 128, "intermediate_size": 256},
    "qwen2": {"hidden_size": 128, "intermediate_size": 256},
}


def require_gpu() -> None:
    """Skips the test where there is no GPU that ONNX Runtime can use; RMT_REQUIRE=cuda makes that a failure."""
    require_hardware("cuda", _no_gpu())


def require_hopper() -> None:
    """Skips the test where there is no GPU of compute capability 9.0, or no library with kernels for it; RMT_REQUIRE=hopper
    makes that a failure."""
    require_hardware("hopper", _no_gpu() or native.lacking((native.HOPPER, native.NEED), 0))


def _no_gpu() -> str | None:
    reason = cuda.refusal(0)
    if reason is None and PROVIDER not in onnxruntime.get_available_providers():
        reason = f"onnxruntime {onnxruntime.__version__} has no {PROVIDER}"
    return reason


@functools.cache
def cuda_bundle(name: str, dtype: str = "fp32") -> Path:
    """The bundle of a model of the catalogue with graphs for CUDA in a dtype: a copy, which nobody may change."""
    return with_graphs(made(name).bundle, f"{name}-cuda-{dtype}.rmt", dtype)


@functools.cache
def wide_bundle(name: str, dtype: str) -> Path:
    """The same of a wider model, so that every kernel of the CUDA provider takes it."""

    def export(path: Path) -> None:
        model = make_model(name, scale=SCALE, backbone=WIDE[name], width=WIDTH)
        export_model(LoadedModel(model, model_spec(model), None), path, ExportOptions(segments=4))

    return with_graphs(once(f"{name}-wide.rmt", export), f"{name}-wide-{dtype}.rmt", dtype)


def with_graphs(bundle: Path, name: str, dtype: str) -> Path:
    """A copy of a bundle with graphs for CUDA."""

    def add(path: Path) -> None:
        shutil.copytree(bundle, path)
        add_engine_graphs(path, "cuda", dtype)

    return once(name, add)


def open_cuda(bundle: Path, dtype: str, **options: Any) -> RMTRuntime:
    return RMTRuntime(bundle, engine="cuda", dtype=dtype, **options)
