"""Layers of a decoder with rmt-trt's own operators: as `native` for an encoder, and gated activations and rotary positions.

What the operators compute stands in `native/ops.c`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from rmt_trt.export.fused import blocks
from rmt_trt.export.fused.blocks import Names
from rmt_trt.export.fused.graph import LARGEST, MICROSOFT, Graph
from rmt_trt.export.fused.kept import Kept, rows_of
from rmt_trt.export.fused.layers import SILU, Backbone, CannotFuse, Layer, Linear
from rmt_trt.export.fused.native import Native, Rounded, bias_of, linear, low_product, mlp, product, rounded
from rmt_trt.runtime.native import DOMAIN

HEADS, GATES = 16, 8  # heads' sizes, and widths of gated MLPs, are multiples of


def decoder_layers(
    graph: Graph, native: Native, backbone: Backbone, length: int, rows: ir.Value, last: ir.Value | None, separate: bool,
    kept: Kept | None,
) -> ir.Value:  # fmt: skip
    """(batch, L, d) -> (batch, L, d) after the final norm, or (batch, K, d) of the K rows that are kept of the last layer.
    last: as `blocks.rotary_attention`, where `takes_groups`. separate: query, key and value by three products, where
    there are no rotary positions.

    Errors: CannotFuse, for layers whose attention and MLP read one and the same residual.
    """
    check_layers(backbone)
    total = rows
    value = blocks.norm(graph, rows, backbone.layers[0].norm1, "layer0.norm1")
    for number, layer in enumerate(backbone.layers):
        name = Names(f"layer{number}")
        following = number + 1 < len(backbone.layers)
        few = None if following else kept
        mixed, bias = _attention(graph, native, value, layer, backbone, name, length, last, separate, few)
        total = rows_of(graph, few, total)
        value, total = blocks.skip_norm(graph, mixed, total, bias, layer.norm2, name("norm2"), total=True)
        if layer.gate is None:
            low = _low(graph, native, value, name("up"))
            mixed, bias = mlp(graph, native, value, low, layer, backbone.activation, name)
        else:
            mixed, bias = _gated(graph, native, value, layer, backbone, name)
        after, after_name = backbone.final_norm, "final_norm"
        if following:
            after, after_name = backbone.layers[number + 1].norm1, f"layer{number + 1}.norm1"
        assert after is not None  # every decoder has a final norm
        value, *totals = blocks.skip_norm(graph, mixed, total, bias, after, after_name, total=following)
        total = totals[0] if totals else total
    return value


def check_layers(backbone: Backbone) -> None:
    """Errors: CannotFuse, for layers whose attention and MLP read one and the same residual."""
    if backbone.parallel:
        raise CannotFuse("our own operators are written into layers that follow one another, and these are parallel")


def rotates(backbone: Backbone) -> bool:
    """Whether the operator for rotary positions takes the backbone's: whole heads, which have no norm of their own."""
    if backbone.rotary is None or any(layer.query_norm is not None for layer in backbone.layers):
        return False
    return 2 * backbone.rotary[0].shape[1] == backbone.head_size and backbone.head_size % HEADS == 0


def takes_groups(graph: Graph, native: Native | None, backbone: Backbone) -> bool:
    """Whether attention takes heads in groups, and rows' lengths with them."""
    if not blocks.grouped_kernel(graph, backbone):
        return False
    return native is None or native.rotary != "repeated" or not rotates(backbone)


def gates(backbone: Backbone) -> bool:
    """Whether the operator for gated activations takes the backbone's MLPs."""
    layers = backbone.layers
    return backbone.activation == SILU and all(
        la.gate is not None and not la.up.weight.shape[1] % GATES for la in layers
    )


def _low(graph: Graph, native: Native, value: ir.Value, product: str) -> Rounded | None:
    threshold = native.threshold(product)
    return None if threshold is None else rounded(graph, value, threshold)


def _attention(
    graph: Graph, native: Native, value: ir.Value, layer: Layer, backbone: Backbone, name: Names, length: int,
    last: ir.Value | None, separate: bool, kept: Kept | None,
) -> tuple[ir.Value, ir.Value | None]:  # fmt: skip
    """Attention and its last product, for the kept rows or for all, and the bias that is still to be added."""
    low, folded = _low(graph, native, value, name("qkv")), False
    if backbone.rotary is not None:
        mixed = _rotary_attention(graph, native, value, low, layer, backbone, name, length, last)
    elif low is not None or (native.qkv and separate):
        parts = ((layer.query, "query"), (layer.key, "key"), (layer.value, "value"))
        inputs = [linear(graph, native, low or value, part, name(n)) for part, n in parts]
        mixed = _causal(graph, inputs, backbone)
    else:
        attention = blocks.separate_attention if separate else blocks.packed_attention
        mixed, folded = attention(graph, value, layer, backbone, name, None, causal=True), separate
    mixed = rows_of(graph, kept, mixed)
    matrix = Linear(layer.out.weight, blocks.out_bias(layer, folded))
    rounded_mixed = _low(graph, native, mixed, name("out"))
    if rounded_mixed is not None or native.out:
        return linear(graph, native, rounded_mixed or mixed, matrix, name("out"), f"bias.{folded:d}"), None
    return blocks.product(graph, mixed, layer.out, name("out")), blocks.bias(
        graph, name(f"out.bias.{folded:d}"), matrix.bias
    )


def _causal(graph: Graph, inputs: list[ir.Value], backbone: Backbone) -> ir.Value:
    return graph.node(
        "MultiHeadAttention", *inputs,
        domain=MICROSOFT, fused="attention", num_heads=backbone.heads, unidirectional=1,
    )  # fmt: skip


def _rotary_attention(
    graph: Graph, native: Native, value: ir.Value, low: Rounded | None, layer: Layer, backbone: Backbone, name: Names,
    length: int, last: ir.Value | None,
) -> ir.Value:  # fmt: skip
    both = blocks.packed(layer)
    if low is not None or native.qkv:
        qkv = linear(graph, native, low or value, both, name("qkv"))
    else:
        qkv = blocks.linear(graph, value, both, name("qkv"))
    if not native.rotary or not rotates(backbone):
        return blocks.attended(graph, qkv, layer, backbone, name, length, last)
    if native.by_nodes:
        return blocks.attended_apart(graph, qkv, layer, backbone, name)
    assert backbone.rotary is not None
    tables = [graph.weight(f"rotary.{n}", t) for n, t in zip(("cos", "sin"), backbone.rotary, strict=True)]
    repeated = native.rotary == "repeated"
    inputs = graph.nodes(
        "Rotary", qkv, *tables,
        wanted=(True,) * 3, domain=DOMAIN, fused="rotary", heads=backbone.heads, kv_heads=backbone.kv_heads,
        repeat=int(repeated),
    )  # fmt: skip
    if repeated:
        return _causal(graph, inputs, backbone)
    return graph.nodes(
        "GroupQueryAttention", *inputs, None, None, last, graph.constant(length, np.int32),
        wanted=(True, True, True), domain=MICROSOFT, fused="attention",
        num_heads=backbone.heads, kv_num_heads=backbone.kv_heads,
    )[0]  # fmt: skip


def _gated(
    graph: Graph, native: Native, value: ir.Value, layer: Layer, backbone: Backbone, name: Names
) -> tuple[ir.Value, ir.Value | None]:
    """Gate and up as one product, their activation in one node, and the MLP's last product."""
    low, threshold = _low(graph, native, value, name("up")), native.threshold(name("down"))
    given: ir.Value | Rounded
    if native.gated and gates(backbone):
        given = _silu_mul(graph, native, _gate_and_up(graph, native, value, low, layer, name), threshold)
    else:
        inner = _apart(graph, native, value, low, layer, backbone.activation, name)
        given = inner if threshold is None else rounded(graph, inner, threshold)
    if isinstance(given, Rounded) or native.down:
        return linear(graph, native, given, layer.down, name("down")), None
    return blocks.product(graph, given, layer.down, name("down")), blocks.bias(
        graph, name("down.bias"), layer.down.bias
    )


def _apart(
    graph: Graph, native: Native, value: ir.Value, low: Rounded | None, layer: Layer, kind: str, name: Names
) -> ir.Value:
    """What the MLP's last product takes, by a product for the gate and one for what it lets through."""
    if low is None or layer.gate is None:
        return blocks.inner(graph, value, layer, kind, name)
    gate, up = (linear(graph, native, low, part, name(n)) for part, n in ((layer.gate, "gate"), (layer.up, "up")))
    return blocks.gated(graph, gate, up, layer, kind)


def _gate_and_up(
    graph: Graph, native: Native, value: ir.Value, low: Rounded | None, layer: Layer, name: Names
) -> ir.Value:
    assert layer.gate is not None
    parts = (layer.gate, layer.up)
    width, bias = sum(part.weight.shape[1] for part in parts), _bias_beside(layer.gate, layer.up)
    if low is not None:
        weight = graph.float8(name("gate_up.weight.fp8"), lambda: torch.cat([part.weight for part in parts], dim=1))
        return low_product(graph, native, low, weight, bias_of(graph, bias, width, name("gate_up.bias")))
    both = blocks.side_by_side(graph, layer, name)
    if native.up:
        return product(graph, native, value, both, bias_of(graph, bias, width, name("gate_up.bias")))
    return blocks.biased(graph, graph.node("MatMul", value, both), bias, name("gate_up"))


def _bias_beside(gate: Linear, up: Linear) -> torch.Tensor | None:
    if gate.bias is None and up.bias is None:
        return None
    return torch.cat([p.weight.new_zeros(p.weight.shape[1]) if p.bias is None else p.bias for p in (gate, up)])


def _silu_mul(graph: Graph, native: Native, inner: ir.Value, threshold: float | None) -> ir.Value | Rounded:
    if threshold is None and native.by_nodes:
        gate, up = graph.nodes("Split", inner, wanted=(True, True), axis=-1, num_outputs=2)
        return graph.node("Mul", blocks.activation(graph, gate, SILU), up)
    if threshold is None:
        return graph.node("SiluMul", inner, domain=DOMAIN, fused="silu*up")
    step = threshold / LARGEST
    out = graph.node("SiluMulQuantize", inner, domain=DOMAIN, fused="silu*up", inverse=1 / step)
    return Rounded(out, step)
