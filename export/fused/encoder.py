"""Form E as a graph of fused nodes: `[prefix] memory [middle] text [suffix]`, memory read and written in one place.

Two roles. "full": every row has S tokens, nothing is masked. "step": rows of 0 to S tokens, filled up with -1; the
special tokens stand right behind a row's own text and attention ends there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rmt_trt.contract import LOGITS, SEGMENT, StepSpec
from rmt_trt.export.fused import blocks
from rmt_trt.export.fused.blocks import Names
from rmt_trt.export.fused.graph import Graph
from rmt_trt.export.fused.layers import Backbone
from rmt_trt.model.config import ModelConfig


def encoder_step(graph: Graph, config: ModelConfig, spec: StepSpec, backbone: Backbone, role: str, head: str) -> None:
    """Writes the whole step into `graph`."""
    state = spec.states[0]
    memory = graph.input(state.input, ir.DataType.FLOAT, ("batch", *state.shape))
    segment = graph.input(SEGMENT, ir.DataType.INT64, ("batch", spec.segment_length))
    count = None if role == "full" else _count(graph, segment)
    rows = _rows(graph, config, spec, backbone, memory, segment, count)
    lengths = None if count is None else _lengths(graph, config, count)

    embedding_norm = backbone.embedding_norm
    assert embedding_norm is not None and backbone.positions is not None
    positions = graph.weight("positions", backbone.positions)
    value = blocks.skip_norm(graph, rows, positions, None, embedding_norm, "embedding_norm")[0]
    for number, layer in enumerate(backbone.layers):
        name = Names(f"layer{number}")
        mixed = blocks.self_attention(graph, value, layer, backbone, name, lengths, causal=False)
        value = _add_norm(
            graph,
            blocks.product(graph, mixed, layer.out, name("out")),
            value,
            layer.out,
            layer.norm1,
            name("out"),
            name("norm1"),
        )
        inner = blocks.mlp(graph, value, layer, backbone.activation, name)
        value = _add_norm(graph, inner, value, layer.down, layer.norm2, name("down"), name("norm2"))

    first = len(config.prefix_ids)
    written = graph.to_float(graph.slice(value, first, first + config.num_memory))
    if count is not None:
        alive = graph.node("Unsqueeze", graph.node("Greater", count, graph.constant(0, np.int32)), graph.constant([2]))
        written = graph.node("Where", alive, written, memory)
    graph.output(written, state.output, ir.DataType.FLOAT, ("batch", *state.shape))
    if head != "none":
        graph.output(_classes(graph, value, backbone), LOGITS, ir.DataType.FLOAT, ("batch", spec.num_logits))


def _add_norm(
    graph: Graph,
    value: ir.Value,
    skip: ir.Value,
    linear: blocks.Linear,
    norm: blocks.Norm,
    linear_name: str,
    norm_name: str,
) -> ir.Value:
    """norm(value + bias + skip), where the bias is that of the product which gave `value`."""
    bias = None if linear.bias is None else graph.weight(f"{linear_name}.bias", linear.bias)
    return blocks.skip_norm(graph, value, skip, bias, norm, norm_name)[0]


def _count(graph: Graph, segment: ir.Value) -> ir.Value:
    """(batch, 1) int32: text tokens of each row."""
    valid = graph.cast(graph.node("GreaterOrEqual", segment, graph.constant(0)), ir.DataType.INT32)
    return graph.node("ReduceSum", valid, graph.constant([1]), keepdims=1)


def _lengths(graph: Graph, config: ModelConfig, count: ir.Value) -> ir.Value:
    """(batch,) int32: positions that are attended to."""
    around = config.num_memory + config.num_special
    total = graph.node("Add", count, graph.constant(around, np.int32))
    return graph.node("Squeeze", total, graph.constant([1]))


def _rows(
    graph: Graph,
    config: ModelConfig,
    spec: StepSpec,
    backbone: Backbone,
    memory: ir.Value,
    segment: ir.Value,
    count: ir.Value | None,
) -> ir.Value:
    """(batch, L, d): word rows and memory, in the order of the step."""
    word = graph.weight("word", backbone.word)
    text = _text_ids(graph, config, spec, segment, count)
    parts = [graph.to_half(memory), graph.node("Gather", word, text)]
    if config.prefix_ids:
        one = graph.weight("prefix", backbone.word[list(config.prefix_ids)][None])
        batch = graph.node("Shape", segment, start=0, end=1)
        shape = graph.node("Concat", batch, graph.constant([len(config.prefix_ids), backbone.word.shape[1]]), axis=0)
        parts.insert(0, graph.node("Expand", one, shape))
    return graph.node("Concat", *parts, axis=1)


def _text_ids(graph: Graph, config: ModelConfig, spec: StepSpec, segment: ir.Value, count: ir.Value | None) -> ir.Value:
    """(batch, middle + S + suffix) int64: what follows the memory, special tokens in their places."""
    middle, suffix = len(config.middle_ids), len(config.suffix_ids)
    around = {*config.middle_ids, *config.suffix_ids}
    fill = around.pop() if len(around) == 1 and count is None else config.pad_id
    ids = segment
    if middle or suffix:
        ids = graph.node("Pad", segment, graph.constant([0, middle, 0, suffix]), graph.constant(fill))
    special = {place: token for place, token in enumerate(config.middle_ids) if token != fill}
    if count is None:
        special |= {middle + spec.segment_length + i: t for i, t in enumerate(config.suffix_ids) if t != fill}
    for place, token in special.items():
        mask = np.zeros((1, middle + spec.segment_length + suffix), bool)
        mask[0, place] = True
        ids = graph.node("Where", graph.constant(mask, bool), graph.constant(token), ids)
    if count is None:
        return ids
    place = graph.constant(np.arange(-middle, spec.segment_length + suffix)[None], np.int32)
    ids = graph.node("Where", graph.node("Less", place, count), ids, graph.constant(config.pad_id))
    for offset, token in enumerate(config.suffix_ids):  # right behind the row's own text
        behind = graph.node("Equal", place, graph.node("Add", count, graph.constant(offset, np.int32)))
        ids = graph.node("Where", behind, graph.constant(token), ids)
    return ids


def _classes(graph: Graph, value: ir.Value, backbone: Backbone) -> ir.Value:
    """(batch, c) float32: the head over the first row."""
    row = graph.node("Gather", value, graph.constant(0), axis=1)
    for number, (matrix, kind) in enumerate(backbone.head):
        row = blocks.linear(graph, row, matrix, f"head{number}")
        if kind != "none":
            row = blocks.activation(graph, row, kind)
    return graph.to_float(row)
