"""What a user could run instead, in PyTorch: a step called plainly, in a CUDA graph, compiled.

Each opener takes (step, memory, segments, mode of torch.compile), tensors on the device, and gives a loop: `loop(n)`
steps through the first n segments from the first memory, waits for the device and gives the memory. All segments lie
on the device beforehand. A step gives the new memory, or it and logits, which are computed and let go.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[torch.Tensor, torch.Tensor], Any]
Loop = Callable[[int], torch.Tensor]
Opener = Callable[[Step, torch.Tensor, torch.Tensor, str], Loop]
WARM_STEPS = 3


def wait(tensor: torch.Tensor) -> None:
    """Waits for the tensor's device."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def eager(step: Step, memory: torch.Tensor, segments: torch.Tensor, mode: str) -> Loop:
    """Plain calls."""
    return _loop(step, memory, segments)


def graph(step: Step, memory: torch.Tensor, segments: torch.Tensor, mode: str) -> Loop:
    """The step captured once, its memory copied back inside the graph; a segment is copied in before each replay."""
    return _captured(step, memory, segments)


def compiled_graph(step: Step, memory: torch.Tensor, segments: torch.Tensor, mode: str) -> Loop:
    """torch.compile without CUDA graphs of its own, captured by hand, as `graph`."""
    return _captured(_compile(step, "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode), memory, segments)


def compiled(step: Step, memory: torch.Tensor, segments: torch.Tensor, mode: str) -> Loop:
    """torch.compile as it is; in mode "max-autotune" with the CUDA graphs that it makes itself."""
    fast = _compile(step, mode)

    def call(current: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return _memory(fast(current, segment)).clone()  # its own output is overwritten by the next call

    return _loop(call, memory, segments)


# Of each way to run a step: its variants by the name in the report, COMPILE for the mode; with --quick the first alone.
COMPILE = "torch.compile MODE"
TORCH_PEERS: dict[str, dict[str, Opener]] = {
    "eager": {"eager": eager},
    "graph": {"CUDA graph": graph},
    "compile": {f"{COMPILE} + CUDA graph": compiled_graph, COMPILE: compiled},
}


def _compile(step: Step, mode: str) -> Any:
    """Compiled anew: what was compiled for another batch size would make this one's sizes variable."""
    torch._dynamo.reset()
    algorithms: Any = importlib.import_module("torch._inductor.select_algorithm")
    algorithms.PRINT_AUTOTUNE = False  # a table per matrix product
    return torch.compile(step, mode=mode, dynamic=False)


def _memory(found: Any) -> torch.Tensor:
    """The new memory of what a step gave."""
    memory: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return memory


def _loop(call: Step, memory: torch.Tensor, segments: torch.Tensor) -> Loop:
    rows = list(segments.unbind())

    @torch.inference_mode()
    def loop(count: int) -> torch.Tensor:
        current = memory
        for segment in rows[:count]:
            current = _memory(call(current, segment))
        wait(current)
        return current

    return loop


@torch.inference_mode()
def _captured(call: Step, memory: torch.Tensor, segments: torch.Tensor) -> Loop:
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
        carried.copy_(_memory(call(carried, fed)))

    @torch.inference_mode()
    def loop(count: int) -> torch.Tensor:
        carried.copy_(memory)
        for segment in rows[:count]:
            fed.copy_(segment)
            captured.replay()
        torch.cuda.synchronize()
        return carried

    return loop
