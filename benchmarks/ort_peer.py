"""What a user could run instead, in ONNX Runtime: a plain export of the lean step, with ONNX Runtime's own defaults.

On a GPU the memory stays on the device (I/O binding, two buffers in turn) and no run waits for the device.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmt_trt.benchmarks.lean import LeanStep
from rmt_trt.errors import EngineError, require
from rmt_trt.model.step import RMTModel

ERRORS_ONLY = 3  # ONNX Runtime's log severity
ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.int64: 7}


def export_lean(model: RMTModel, dtype: str, opset: int, folder: Path, name: str) -> Path:
    """The lean step by torch.onnx in `dtype`, with a dynamic batch, as `folder/name-lean-DTYPE-OPSET.onnx`; reused."""
    path = folder / f"{name}-lean-{dtype}-{opset}.onnx"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    step = LeanStep(model, dtype)
    memory = model.memory.detach()[None].expand(2, -1, -1).to(step.embed.weight.dtype)
    segment = torch.zeros((2, model.config.segment_length), dtype=torch.int64)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            step, (memory, segment), dynamo=True, opset_version=opset, input_names=["memory", "segment"],
            output_names=["new_memory"], dynamic_shapes=({0: batch}, {0: batch}), verbose=False,
        )  # fmt: skip
    temporary = path.with_suffix(".partial.onnx")
    program.save(temporary, external_data=False) if _small(step) else program.save(path, external_data=True)
    if temporary.is_file():
        temporary.replace(path)
    return path


def _small(step: torch.nn.Module) -> bool:
    """Whether the weights fit into a protobuf file."""
    return sum(p.numel() * p.element_size() for p in step.parameters()) < 1 << 30


def session(path: Path, device: int | None, threads: int | None, dtype: str, graph: bool = False) -> Any:
    """An ONNX Runtime session as a user opens one. device: GPU index, or None for the CPU."""
    ort = require("onnxruntime", "cpu", "the ONNX Runtime peer")
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if device is None:
        if threads is not None:
            options.intra_op_num_threads = threads
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ort.preload_dlls()
    provider = {"device_id": str(device)}
    if dtype == "fp32":
        provider["use_tf32"] = "0"  # as exact as ours, which it is compared with
    if graph:
        provider["enable_cuda_graph"] = "1"
    made = ort.InferenceSession(str(path), options, providers=[("CUDAExecutionProvider", provider)])
    if made.get_providers()[0] != "CUDAExecutionProvider":
        raise EngineError(f"ONNX Runtime has no CUDA provider here; it took {made.get_providers()}")
    return made


def bound_loop(made: Any, memory: torch.Tensor, segments: torch.Tensor, outputs: dict[str, torch.Tensor]) -> Any:
    """The loop of `peers`, on a GPU. outputs: further outputs of the graph, each with a buffer that it is bound to."""
    ort = require("onnxruntime", "cpu", "the ONNX Runtime peer")
    buffers = (memory.clone(), torch.empty_like(memory))
    quiet = ort.RunOptions()
    quiet.add_run_config_entry("disable_synchronize_execution_providers", "1")
    index = memory.device.index or 0

    def bind(method: Callable[..., None], name: str, tensor: torch.Tensor) -> None:
        method(name, "cuda", index, ONNX_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())

    bindings = [made.io_binding() for _ in range(2)]
    for turn, binding in enumerate(bindings):
        bind(binding.bind_input, "memory", buffers[turn])
        bind(binding.bind_output, "new_memory", buffers[1 - turn])
        for name, tensor in outputs.items():
            bind(binding.bind_output, name, tensor)
    rows = list(segments.unbind())

    def loop(count: int) -> torch.Tensor:
        buffers[0].copy_(memory)
        torch.cuda.synchronize()
        for number, segment in enumerate(rows[:count]):
            binding = bindings[number % 2]
            bind(binding.bind_input, "segment", segment)
            made.run_with_iobinding(binding, quiet)
        torch.cuda.synchronize()
        return buffers[count % 2]

    return loop


def host_loop(made: Any, memory: np.ndarray, segments: np.ndarray) -> Any:
    """The loop of `peers`, on the CPU."""

    def loop(count: int) -> torch.Tensor:
        current = memory
        for segment in segments[:count]:
            (current,) = made.run(["new_memory"], {"memory": current, "segment": segment})
        return torch.from_numpy(current)

    return loop
