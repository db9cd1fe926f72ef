"""A step in half precision, exported as it stands: what an engine runs when no graph with fused nodes is known."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmt_trt.bundle import GraphEntry
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.export.step_to_onnx import EXTERNAL_DATA_BYTES, OPSET, initial_values, write_graph

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class HalfStep(nn.Module):
    """A step with weights and arithmetic in half precision, whose inputs and outputs are those of the contract.

    A row of padding gives back its states bit for bit, which a cast of the states would not.
    """

    def __init__(self, step: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.step = copy.deepcopy(step).to(dtype)
        self.dtype = dtype

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *states, segment = inputs
        *new, logits = self.step(*(state.to(self.dtype) for state in states), segment)
        alive = (segment >= 0).any(dim=1)
        kept = [
            torch.where(alive.view(-1, *[1] * (state.ndim - 1)), value.to(state.dtype), state)
            for value, state in zip(new, states, strict=True)
        ]
        return (*kept, logits.float())


def plain_graph(
    step: nn.Module,
    spec: StepSpec,
    dtype: str,
    path: Path,
    initial: Mapping[str, Any] | None = None,
    *,
    engine: str = "cuda",
    opset: int = OPSET,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> GraphEntry:
    """Writes `step` (float32) in half precision: role "step", head "all", inputs and outputs as its spec says.

    spec   with the fingerprint of the float32 weights, which stands in the graph's metadata
    dtype  "fp16" or "bf16": of fp32, `step.onnx` is the graph

    Returns its entry, names relative to the folder of `path`. Errors: as `export_step`.
    """
    if dtype not in HALVES:
        raise ContractError(f"dtype is {dtype!r}; a step is exported plainly in {', '.join(HALVES)}")
    half = HalfStep(step, HALVES[dtype]).eval()
    values = initial_values(step, spec, initial)
    write_graph(half, spec, path, values, opset=opset, external_data_bytes=external_data_bytes, recoverable=False)
    data = tuple(sorted(file.name for file in path.parent.iterdir() if file.name == f"{path.name}.data"))
    return GraphEntry(path.name, "step", engine, dtype, "all", opset, data)
