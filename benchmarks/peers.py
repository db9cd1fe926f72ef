"""What a user could run instead, in PyTorch: the lean step eagerly, in a CUDA graph, compiled.

Each opener takes (step, memory, segments) on the device and gives a loop: `loop(n)` steps through the first n segments
from the first memory, waits for the device and gives the memory. All segments lie on the device beforehand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from rmt_trt.benchmarks.lean import LeanStep

Loop = Callable[[int], torch.Tensor]
WARM_STEPS = 3


def wait(tensor: torch.Tensor) -> None:
    """Waits for the tensor's device."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def eager(step: LeanStep, memory: torch.Tensor, segments: torch.Tensor) -> Loop:
    """Plain calls."""
    return _loop(step, memory, segments)


def graph(step: LeanStep, memory: torch.Tensor, segments: torch.Tensor) -> Loop:
    """The step captured once, its memory copied back inside the graph; a segment is copied in before each replay."""
    return _captured(step, memory, segments)


def compiled(step: LeanStep, memory: torch.Tensor, segments: torch.Tensor) -> Loop:
    """torch.compile(mode="max-autotune"), with the CUDA graphs that it makes itself."""
    fast = _compile(step, "max-autotune")

    def call(current: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        output: torch.Tensor = fast(current, segment)
        return output.clone()  # its own output is overwritten by the next call

    return _loop(call, memory, segments)


def compiled_graph(step: LeanStep, memory: torch.Tensor, segments: torch.Tensor) -> Loop:
    """torch.compile(mode="max-autotune-no-cudagraphs") captured by hand, as `graph`."""
    return _captured(_compile(step, "max-autotune-no-cudagraphs"), memory, segments)


# Name in the report, of each variant of a peer; with --quick the first alone.
TORCH_PEERS: dict[str, dict[str, Callable[[LeanStep, torch.Tensor, torch.Tensor], Loop]]] = {
    "eager": {"PyTorch eager": eager},
    "graph": {"PyTorch CUDA graph": graph},
    "compile": {"torch.compile + CUDA graph": compiled_graph, "torch.compile max-autotune": compiled},
}


def _compile(step: LeanStep, mode: str) -> Any:
    """Compiled anew: what was compiled for another batch size would make this one's sizes variable."""
    torch._dynamo.reset()
    algorithms: Any = importlib.import_module("torch._inductor.select_algorithm")
    algorithms.PRINT_AUTOTUNE = False  # a table per matrix product
    return torch.compile(step, mode=mode, dynamic=False)


def _loop(call: Callable[[Any, Any], torch.Tensor], memory: torch.Tensor, segments: torch.Tensor) -> Loop:
    rows = list(segments.unbind())

    @torch.inference_mode()
    def loop(count: int) -> torch.Tensor:
        current = memory
        for segment in rows[:count]:
            current = call(current, segment)
        wait(current)
        return current

    return loop


@torch.inference_mode()
def _captured(call: Callable[[Any, Any], torch.Tensor], memory: torch.Tensor, segments: torch.Tensor) -> Loop:
    carried, fed, rows = memory.clone(), segments[0].clone(), list(segments.unbind())
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_STEPS):
            call(carried, fed)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        carried.copy_(call(carried, fed))

    @torch.inference_mode()
    def loop(count: int) -> torch.Tensor:
        carried.copy_(memory)
        for segment in rows[:count]:
            fed.copy_(segment)
            captured.replay()
        torch.cuda.synchronize()
        return carried

    return loop
