"""What a user could run instead, in ONNX Runtime: a plain export of the lean step, with ONNX Runtime's own defaults.

On a GPU the memory stays on the device (I/O binding, two buffers in turn) and no run waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rmt_trt.benchmarks.lean import DTYPES, LeanStep
from rmt_trt.benchmarks.peers import Loop, wait
from rmt_trt.errors import EngineError, require
from rmt_trt.model.step import RMTModel

ERRORS_ONLY = 3  # ONNX Runtime's log severity
ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.int64: 7}
_graph_ids = itertools.count(1)


def export_lean(model: RMTModel, dtype: str, opset: int, folder: Path, name: str) -> Path:
    """The lean step by torch.onnx in `dtype`, with a dynamic batch, as `folder/name-lean-DTYPE-OPSET.onnx`; reused."""
    path = folder / f"{name}-lean-{dtype}-{opset}.onnx"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    step = LeanStep(model, dtype)
    memory = model.memory.detach()[None].expand(2, -1, -1).to(DTYPES[dtype])
    segment = torch.zeros((2, model.config.segment_length), dtype=torch.int64)
    batch = torch.export.Dim("batch", min=1)
    for noisy in ("torch.onnx", "onnxscript"):  # they comment on packages and nodes that matter to nobody here
        logging.getLogger(noisy).setLevel(logging.ERROR)
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
        provider |= {"enable_cuda_graph": "1", "user_compute_stream": str(side_stream(device).cuda_stream)}
    made = ort.InferenceSession(str(path), options, providers=[("CUDAExecutionProvider", provider)])
    if made.get_providers()[0] != "CUDAExecutionProvider":
        raise EngineError(f"ONNX Runtime has no CUDA provider here; it took {made.get_providers()}")
    return made


def bound_loop(made: Any, memory: torch.Tensor, segments: torch.Tensor, logits: torch.Tensor | None = None) -> Loop:
    """The loop of `peers`. logits: where a graph that has a head writes it."""
    ort = require("onnxruntime", "cpu", "the ONNX Runtime peer")
    buffers = (memory.clone(), torch.empty_like(memory))
    quiet = ort.RunOptions()
    quiet.add_run_config_entry("disable_synchronize_execution_providers", "1")
    turns: list[tuple[Any, list[torch.Tensor]]] = []  # a binding keeps no tensor alive: the loop does
    for read, written in (buffers, buffers[::-1]):
        binding = made.io_binding()
        bind(binding.bind_input, "memory", read)
        bind(binding.bind_output, "new_memory", written)
        if logits is not None:
            bind(binding.bind_output, "logits", logits)
        turns.append((binding, [read, written, *([] if logits is None else [logits])]))
    rows = list(segments.unbind())

    def loop(count: int) -> torch.Tensor:
        buffers[0].copy_(memory)
        wait(memory)
        for number, segment in enumerate(rows[:count]):
            binding, _ = turns[number % 2]
            bind(binding.bind_input, "segment", segment)
            made.run_with_iobinding(binding, quiet)
        wait(memory)
        return buffers[count % 2]

    return loop


def captured_loop(made: Any, memory: torch.Tensor, segments: torch.Tensor) -> Loop:
    """The same with ONNX Runtime's own CUDA graph: fixed addresses, a segment and the memory copied in beside each run.

    The session was opened with graph=True, so that it runs on `side_stream`, where the copies are made too.
    """
    ort = require("onnxruntime", "cpu", "the ONNX Runtime peer")
    carried, written, fed = memory.clone(), torch.empty_like(memory), segments[0].clone()
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)))  # a graph has its addresses in it
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    binding = made.io_binding()
    bind(binding.bind_input, "memory", carried)
    bind(binding.bind_input, "segment", fed)
    bind(binding.bind_output, "new_memory", written)
    rows, stream = list(segments.unbind()), side_stream(memory.device.index or 0)
    torch.cuda.synchronize()
    made.run_with_iobinding(binding, options)  # captures
    torch.cuda.synchronize()

    def loop(count: int) -> torch.Tensor:
        with torch.cuda.stream(stream):
            carried.copy_(memory)
            for segment in rows[:count]:
                fed.copy_(segment)
                made.run_with_iobinding(binding, options)
                carried.copy_(written)
        torch.cuda.synchronize()
        return carried

    return loop


@functools.cache
def side_stream(device: int) -> Any:
    """A stream that PyTorch and ONNX Runtime share; it lives as long as the process."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def bind(method: Callable[..., None], name: str, tensor: torch.Tensor) -> None:
    """Binds a device tensor, where it lies, as an input or output of a session."""
    device = tensor.device
    method(name, device.type, device.index or 0, ONNX_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())
