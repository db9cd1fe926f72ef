"""Form E as a graph of fused nodes: `[prefix] memory [middle] text [suffix]`, memory read and written in one place.

Attention does not know the order of its rows, positions are added to them: so the rows stand here as memory first,
which saves copies, and each has the position of the published order.

Two roles. "full": every row has S tokens, nothing is masked. "step": rows of 0 to S tokens, filled up with -1; the
special tokens stand right behind a row's own text and attention ends there.

Of the last layer only the memory's rows are read, and by a head the first row of the published order: for the others nothing
is computed behind attention, and where nothing is masked and queries have a product of their own, no queries.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from rmt_trt.contract import LOGITS, StepSpec
from rmt_trt.export.fused import blocks, hopper
from rmt_trt.export.fused.blocks import Names
from rmt_trt.export.fused.graph import Graph
from rmt_trt.export.fused.kept import Kept, rows_of
from rmt_trt.export.fused.layers import Backbone, Layer
from rmt_trt.export.fused.memory import hand_on, inputs, text_counts
from rmt_trt.export.fused.native import Native, encoder_layers
from rmt_trt.model.config import ModelConfig


def encoder_step(
    graph: Graph,
    config: ModelConfig,
    spec: StepSpec,
    backbone: Backbone,
    role: str,
    head: str,
    separate: bool,
    native: Native | None = None,
) -> None:
    """Writes the whole step into `graph`. separate: query, key and value by three products. native: by which of our own
    operators."""
    memory, segment = inputs(graph, spec)
    count = None if role == "full" else text_counts(graph, segment, ir.DataType.INT32)
    lengths = None if count is None else _lengths(graph, config, count)
    embedding_norm = backbone.embedding_norm
    assert embedding_norm is not None
    positions = _positions(graph, config, backbone)
    if count is None and hopper.embeds(native, backbone):
        value = hopper.embed(
            graph, memory, segment, _frame(config, spec), backbone.word, positions, embedding_norm, "embedding_norm"
        )[0]
    else:
        rows = _rows(graph, config, spec, backbone, memory, segment, count)
        value = blocks.skip_norm(graph, rows, positions, None, embedding_norm, "embedding_norm")[0]
    kept = Kept(max(config.num_memory, _first(config) + 1), 0)  # of every head, so that memory is rounded alike
    carried: ir.Value | None = None
    if native is None:
        value = _layers(graph, value, backbone, lengths, separate, kept)
    elif native.hopper:
        memories = (0, config.num_memory)
        value, carried = hopper.encoder_layers(graph, native, value, backbone, lengths, kept, memories)
    else:
        value = encoder_layers(graph, native, value, backbone, lengths, separate, kept)

    if carried is None:
        carried = value if kept.size == config.num_memory else graph.slice(value, 0, config.num_memory)
        carried = graph.to_float(carried)
    alive = None if count is None else graph.node("Greater", count, graph.constant(0, np.int32))
    hand_on(graph, spec, carried, memory, alive)
    if head != "none":
        graph.output(_classes(graph, config, value, backbone), LOGITS, ir.DataType.FLOAT, ("batch", spec.num_logits))


def _layers(
    graph: Graph, value: ir.Value, backbone: Backbone, lengths: ir.Value | None, separate: bool, kept: Kept
) -> ir.Value:
    """(batch, L, d) -> (batch, K, d): the K rows that are kept of the last layer."""
    for number, layer in enumerate(backbone.layers):
        name = Names(f"layer{number}")
        few = kept if number + 1 == len(backbone.layers) else None
        mixed, value = _attention(graph, value, layer, backbone, name, lengths, separate, few)
        mixed = blocks.product(graph, mixed, layer.out, name("out"))
        bias = blocks.bias(graph, name(f"out.bias.{separate:d}"), blocks.out_bias(layer, separate))
        value = blocks.skip_norm(graph, mixed, value, bias, layer.norm1, name("norm1"))[0]
        inner = blocks.mlp(graph, value, layer, backbone.activation, name)
        bias = blocks.bias(graph, name("down.bias"), layer.down.bias)
        value = blocks.skip_norm(graph, inner, value, bias, layer.norm2, name("norm2"))[0]
    return value


def _attention(
    graph: Graph, value: ir.Value, layer: Layer, backbone: Backbone, name: Names, lengths: ir.Value | None, separate: bool,
    kept: Kept | None,
) -> tuple[ir.Value, ir.Value]:  # fmt: skip
    """What attention gives for the kept rows, or for all, and these rows."""
    residual = rows_of(graph, kept, value)
    if separate and blocks.asks_few(lengths):
        mixed = blocks.separate_attention(graph, value, layer, backbone, name, lengths, causal=False, queries=residual)
        return mixed, residual
    attention = blocks.separate_attention if separate else blocks.packed_attention
    return rows_of(graph, kept, attention(graph, value, layer, backbone, name, lengths, causal=False)), residual


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
    """(batch, L, d): memory, then the words of `[prefix] [middle] text [suffix]`."""
    words = graph.node("Gather", graph.weight("word", backbone.word), _ids(graph, config, spec, segment, count))
    return graph.node("Concat", graph.to_half(memory), words, axis=1)


def _frame(config: ModelConfig, spec: StepSpec) -> list[int]:
    """What stands in the rows of a full segment, as `hopper.embed` takes it."""
    text = hopper.text_at(0, spec.segment_length)
    front = hopper.memory_at(spec.segment_length, config.num_memory)
    return [*front, *config.prefix_ids, *config.middle_ids, *text, *config.suffix_ids]


def _positions(graph: Graph, config: ModelConfig, backbone: Backbone) -> ir.Value:
    """(L, d): the rows' positions in the published order, `[prefix] memory [middle] text [suffix]`."""
    assert backbone.positions is not None
    before, behind = len(config.prefix_ids), len(config.prefix_ids) + config.num_memory
    rows = backbone.positions
    return graph.weight("positions", torch.cat([rows[before:behind], rows[:before], rows[behind:]]))


def _ids(graph: Graph, config: ModelConfig, spec: StepSpec, segment: ir.Value, count: ir.Value | None) -> ir.Value:
    """(batch, prefix + middle + S + suffix) int64. In role "step" the suffix stands right behind the row's own text."""
    front, suffix = [*config.prefix_ids, *config.middle_ids], list(config.suffix_ids)
    behind = suffix if count is None else [config.pad_id] * len(suffix)
    fixed = np.array([*front, *[config.pad_id] * spec.segment_length, *behind])[None]
    place = np.arange(-len(front), spec.segment_length + len(suffix))[None]
    ids = segment
    if fixed.shape[1] > spec.segment_length:  # a batch of any size leaves no other way to widen the rows
        ids = graph.node("Gather", segment, graph.constant(place[0].clip(0, spec.segment_length - 1)), axis=1)
        text = graph.constant((place >= 0) & (place < spec.segment_length), bool)
        ids = graph.node("Where", text, ids, graph.constant(fixed))
    if count is None:
        return ids
    within = graph.node("Less", graph.constant(place, np.int32), count)
    ids = graph.node("Where", within, ids, graph.constant(config.pad_id))
    for offset, token in enumerate(suffix):
        here = graph.node("Equal", graph.constant(place - offset, np.int32), count)
        ids = graph.node("Where", here, graph.constant(token), ids)
    return ids


def _classes(graph: Graph, config: ModelConfig, value: ir.Value, backbone: Backbone) -> ir.Value:
    """(batch, c) float32: the head over the first row of the published order."""
    row = graph.node("Gather", value, graph.constant(_first(config)), axis=1)
    for number, (matrix, kind) in enumerate(backbone.head):
        row = blocks.linear(graph, row, matrix, f"head{number}")
        if kind != "none":
            row = blocks.activation(graph, row, kind)
    return graph.to_float(row)


def _first(config: ModelConfig) -> int:
    """Where the first row of the published order stands."""
    return config.num_memory if config.prefix_ids else 0
