"""Form D as a graph of fused nodes: `[memory | text | memory]`, causal; the second copy is where memory is written.

Two roles. "full": every row has S tokens. "step": rows of 0 to S tokens, filled up with -1, laid out as
`[memory | n tokens | memory | padding]` by one gather; causality hides what follows, so nothing is masked.

Where no head reads all of the text, the last layer computes behind attention only the written memory's rows and the text's
last one, which stands before them: that one without a head too, so that memory is rounded alike. Attention takes all queries:
of fewer than keys, its kernels differ in which ones causality hides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rmt_trt.contract import LOGITS, StepSpec
from rmt_trt.export.fused import blocks, hopper
from rmt_trt.export.fused.blocks import Names
from rmt_trt.export.fused.graph import Graph
from rmt_trt.export.fused.kept import Kept, rows_from, rows_of
from rmt_trt.export.fused.layers import Backbone, Linear
from rmt_trt.export.fused.memory import hand_on, inputs, text_counts
from rmt_trt.export.fused.native import Native
from rmt_trt.export.fused.native_decoder import decoder_layers, takes_groups
from rmt_trt.model.config import ModelConfig
from rmt_trt.runtime.signature import LOGLIK

WHOLE_TEXT = ("all", "loglik")  # heads that read all rows of the text


@dataclass(frozen=True, eq=False)
class Layout:
    """Where things stand in a row. count (batch, 1) int64, or None where every row is full."""

    memory: int
    text: int
    count: ir.Value | None

    @property
    def length(self) -> int:
        return self.text + 2 * self.memory


def decoder_step(
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
    operators. Errors: CannotFuse, for a backbone that has no place for them."""
    memory, segment = inputs(graph, spec)
    count = None if role == "full" else text_counts(graph, segment, ir.DataType.INT64)
    layout = Layout(config.num_memory, spec.segment_length, count)
    last = None
    if takes_groups(graph, native, backbone):
        batch = graph.node("Shape", segment, start=0, end=1)
        last = graph.node("Expand", graph.constant([layout.length - 1], np.int32), batch)
    tail = rows_from(graph, layout.text if count is None else count, layout.memory - 1, layout.memory + 1)
    kept = None if head in WHOLE_TEXT else tail
    carried: ir.Value | None = None
    if native is not None and native.hopper:
        value, rows = _entered(graph, native, backbone, layout, memory, segment)
        behind = 1 if kept is not None else layout.memory + layout.text
        memories = (behind, behind + layout.memory) if kept is not None or count is None else None
        value, carried = hopper.decoder_layers(graph, native, backbone, value, rows, kept, memories)
    elif native is not None:
        rows = _rows(graph, backbone, layout, memory, segment)
        value = decoder_layers(graph, native, backbone, layout.length, rows, last, separate, kept)
    else:
        rows = _rows(graph, backbone, layout, memory, segment)
        value = _layers(graph, backbone, layout, rows, last, separate, kept)

    ends = value if kept is not None else tail.rows(graph, value)
    if carried is None:
        carried = graph.to_float(graph.slice(ends, 1, 1 + layout.memory))
    alive = None if count is None else graph.node("Greater", count, graph.constant(0))
    hand_on(graph, spec, carried, memory, alive)
    _head(graph, spec, backbone, layout, value, ends, segment, head)


def _layers(
    graph: Graph, backbone: Backbone, layout: Layout, rows: ir.Value, last: ir.Value | None, separate: bool,
    kept: Kept | None,
) -> ir.Value:  # fmt: skip
    """(batch, L, d) after the final norm, or (batch, K, d) of the K rows that are kept of the last layer. Every norm adds the
    residual that comes before it."""
    total = rows
    value = blocks.norm(graph, rows, backbone.layers[0].norm1, "layer0.norm1")
    for number, layer in enumerate(backbone.layers):
        name = Names(f"layer{number}")
        if backbone.rotary is None:
            attention = blocks.separate_attention if separate else blocks.packed_attention
            mixed = attention(graph, value, layer, backbone, name, None, causal=True)
        else:
            mixed = blocks.rotary_attention(graph, value, layer, backbone, name, layout.length, last)
        following = number + 1 < len(backbone.layers)
        if not following:
            mixed, total = (rows_of(graph, kept, part) for part in (mixed, total))
        mixed = blocks.product(graph, mixed, layer.out, name("out"))
        bias = blocks.out_bias(layer, separate)
        if backbone.parallel:
            by_itself = blocks.norm(graph, total, layer.norm2, name("norm2"))
            mixed = graph.node("Add", mixed, blocks.mlp(graph, by_itself, layer, backbone.activation, name))
            biases = [part for part in (bias, layer.down.bias) if part is not None]
            bias = sum(biases[1:], biases[0]) if biases else None
        else:
            added = blocks.bias(graph, name(f"out.bias.{separate:d}"), bias)
            value, total = blocks.skip_norm(graph, mixed, total, added, layer.norm2, name("norm2"), total=True)
            mixed, bias = blocks.mlp(graph, value, layer, backbone.activation, name), layer.down.bias
        after, after_name = backbone.final_norm, "final_norm"
        if following:
            after, after_name = backbone.layers[number + 1].norm1, f"layer{number + 1}.norm1"
        assert after is not None
        added = blocks.bias(graph, name("last.bias"), bias)
        value, *totals = blocks.skip_norm(graph, mixed, total, added, after, after_name, total=following)
        total = totals[0] if totals else total
    return value


def _rows(graph: Graph, backbone: Backbone, layout: Layout, memory: ir.Value, segment: ir.Value) -> ir.Value:
    """(batch, L, d): memory, words, memory, laid out, with the table of positions added where there is one."""
    carried = graph.to_half(memory)
    ids = segment if layout.count is None else graph.node("Max", segment, graph.constant(0))
    words = graph.node("Gather", graph.weight("word", backbone.word), ids)
    rows = graph.node("Concat", carried, words, carried, axis=1)
    if layout.count is not None:
        place = graph.constant(np.arange(layout.length)[None])
        end = graph.node("Add", layout.count, graph.constant(layout.memory))
        write = graph.node("Add", graph.node("Sub", place, layout.count), graph.constant(layout.text))
        behind = graph.node("Add", end, graph.constant(layout.memory))
        padding = graph.node("Sub", place, graph.constant(layout.memory))
        source = graph.node(
            "Where", graph.node("Less", place, end), place,
            graph.node("Where", graph.node("Less", place, behind), write, padding),
        )  # fmt: skip
        rows = graph.node("GatherND", rows, graph.node("Unsqueeze", source, graph.constant([2])), batch_dims=1)
    if backbone.positions is not None:
        rows = graph.node("Add", rows, graph.weight("positions", backbone.positions))
    return rows


def _entered(
    graph: Graph, native: Native, backbone: Backbone, layout: Layout, memory: ir.Value, segment: ir.Value
) -> list[ir.Value]:
    """[the rows behind the first norm, the rows], (batch, L, d) each."""
    by = backbone.layers[0].norm1
    if layout.count is None and backbone.positions is not None and hopper.embeds(native, backbone):
        carried = hopper.memory_at(layout.text, layout.memory)
        frame = [*carried, *hopper.text_at(0, layout.text), *carried]
        positions = graph.weight("positions", backbone.positions)
        return hopper.embed(graph, memory, segment, frame, backbone.word, positions, by, "layer0.norm1", total=True)
    rows = _rows(graph, backbone, layout, memory, segment)
    return [blocks.norm(graph, rows, by, "layer0.norm1"), rows]


def _head(
    graph: Graph, spec: StepSpec, backbone: Backbone, layout: Layout, value: ir.Value, ends: ir.Value, segment: ir.Value,
    head: str,
) -> None:  # fmt: skip
    """The outputs behind the states. ends: the text's last row, then the written memory. "loglik" gives, beside the last row's
    logits, (batch, S) float32: at place t the log-likelihood of token t + 1; the last place, and those of padding, mean
    nothing."""
    if head == "none":
        return
    matrix = backbone.head[0][0]
    if head == "all":
        text = graph.slice(value, layout.memory, layout.memory + layout.text)
        logits = graph.to_float(blocks.linear(graph, text, matrix, "head"))
        graph.output(logits, LOGITS, ir.DataType.FLOAT, ("batch", layout.text, spec.num_logits))
        return
    last = graph.node("Gather", ends, graph.constant(0), axis=1)
    logits = graph.to_float(blocks.linear(graph, last, matrix, "head"))
    graph.output(logits, LOGITS, ir.DataType.FLOAT, ("batch", spec.num_logits))
    if head == "loglik":
        graph.output(_scores(graph, layout, matrix, value, segment), LOGLIK, ir.DataType.FLOAT, ("batch", layout.text))


def _scores(graph: Graph, layout: Layout, matrix: Linear, value: ir.Value, segment: ir.Value) -> ir.Value:
    text = graph.slice(value, layout.memory, layout.memory + layout.text)
    logits = graph.to_float(blocks.linear(graph, text, matrix, "head"))
    ids = graph.node("Max", segment, graph.constant(0))
    following = graph.node("Concat", graph.slice(ids, 1, layout.text), graph.slice(ids, 0, 1), axis=1)
    places = graph.node("Unsqueeze", following, graph.constant([2]))
    scores = graph.node("GatherElements", graph.node("LogSoftmax", logits, axis=-1), places, axis=2)
    return graph.node("Squeeze", scores, graph.constant([2]))
