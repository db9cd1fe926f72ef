"""What a step is given and what it hands on, the same in both forms."""

from __future__ import annotations

import onnx_ir as ir

from rmt_trt.contract import SEGMENT, StepSpec
from rmt_trt.export.fused.graph import Graph


def inputs(graph: Graph, spec: StepSpec) -> tuple[ir.Value, ir.Value]:
    """The memory (batch, m, d) float32 and the segment (batch, S) int64."""
    state = spec.states[0]
    memory = graph.input(state.input, ir.DataType.FLOAT, ("batch", *state.shape))
    return memory, graph.input(SEGMENT, ir.DataType.INT64, ("batch", spec.segment_length))


def text_counts(graph: Graph, segment: ir.Value, dtype: ir.DataType) -> ir.Value:
    """(batch, 1) in an integer dtype: text tokens of each row."""
    valid = graph.cast(graph.node("GreaterOrEqual", segment, graph.constant(0)), dtype)
    return graph.node("ReduceSum", valid, graph.constant([1]), keepdims=1)


def hand_on(graph: Graph, spec: StepSpec, written: ir.Value, memory: ir.Value, alive: ir.Value | None) -> None:
    """The new memory, from what was written, (batch, m, d) float32. A row that is not alive, (batch, 1) bool, is padding
    alone and keeps the memory that it had; None where every row is full."""
    if alive is not None:
        written = graph.node("Where", graph.node("Unsqueeze", alive, graph.constant([2])), written, memory)
    state = spec.states[0]
    graph.output(written, state.output, ir.DataType.FLOAT, ("batch", *state.shape))
