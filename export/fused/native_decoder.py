"""Layers of a decoder with rmt-trt's own operators: as `native` for an encoder, and gated activations and rotary positions.

What the operators compute stands in `native/ops.c`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from rmt_trt.export.fused import blocks
from rmt_trt.export.fused.blocks import Names
from rmt_trt.export.fused.graph import MICROSOFT, Graph
from rmt_trt.export.fused.layers import SILU, Backbone, CannotFuse, Layer, Linear
from rmt_trt.export.fused.native import LARGEST, Native, Rounded, linear, mlp, rounded
from rmt_trt.runtime.native import DOMAIN

VECTOR = 16  # values of a head, and twice those of a gate, come in as many


def decoder_layers(
    graph: Graph, native: Native, backbone: Backbone, length: int, rows: ir.Value, last: ir.Value | None, separate: bool
) -> ir.Value:
    """(batch, L, d) -> (batch, L, d) after the final norm. last: as `blocks.rotary_attention`, None without such positions.
    separate: query, key and value by three products, where there are none.

    Errors: CannotFuse, for layers whose attention and MLP read one and the same residual.
    """
    check_layers(backbone)
    total = rows
    value = blocks.norm(graph, rows, backbone.layers[0].norm1, "layer0.norm1")
    for number, layer in enumerate(backbone.layers):
        name = Names(f"layer{number}")
        mixed, bias = _attention(graph, native, value, layer, backbone, name, length, last, separate)
        value, total = blocks.skip_norm(graph, mixed, total, bias, layer.norm2, name("norm2"), total=True)
        if layer.gate is None:
            low = _low(graph, native, value, name("up"))
            mixed, bias = mlp(graph, native, value, low, layer, backbone.activation, name)
        else:
            mixed, bias = _gated(graph, native, value, layer, backbone, name)
        following = number + 1 < len(backbone.layers)
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
    return 2 * backbone.rotary[0].shape[1] == backbone.head_size and backbone.head_size % VECTOR == 0


def gates(backbone: Backbone) -> bool:
    """Whether the operator for gated activations takes the backbone's MLPs."""
    layers = backbone.layers
    return backbone.activation == SILU and all(
        la.gate is not None and not la.up.weight.shape[1] % VECTOR for la in layers
    )


def _low(graph: Graph, native: Native, value: ir.Value, product: str) -> Rounded | None:
    threshold = native.threshold(product)
    return None if threshold is None else rounded(graph, value, threshold)


def _attention(
    graph: Graph, native: Native, value: ir.Value, layer: Layer, backbone: Backbone, name: Names, length: int,
    last: ir.Value | None, separate: bool,
) -> tuple[ir.Value, ir.Value | None]:  # fmt: skip
    """Attention and its last product, and the bias that is still to be added."""
    low, folded = _low(graph, native, value, name("qkv")), False
    if last is not None:
        mixed = _rotary_attention(graph, native, value, low, layer, backbone, name, length, last)
    elif low is not None or (native.qkv and separate):
        parts = ((layer.query, "query"), (layer.key, "key"), (layer.value, "value"))
        inputs = [linear(graph, native, low or value, part, name(n)) for part, n in parts]
        mixed = _causal(graph, inputs, backbone)
    else:
        attention = blocks.separate_attention if separate else blocks.packed_attention
        mixed, folded = attention(graph, value, layer, backbone, name, None, causal=True), separate
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
    length: int, last: ir.Value,
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
    if not native.gated or not gates(backbone):
        inner = blocks.inner(graph, value, layer, backbone.activation, name)
        given = inner if threshold is None else rounded(graph, inner, threshold)
    else:
        given = _silu_mul(graph, native, _gate_and_up(graph, native, value, low, layer, name), threshold)
    if isinstance(given, Rounded) or native.down:
        return linear(graph, native, given, layer.down, name("down")), None
    return blocks.product(graph, given, layer.down, name("down")), blocks.bias(
        graph, name("down.bias"), layer.down.bias
    )


def _gate_and_up(
    graph: Graph, native: Native, value: ir.Value, low: Rounded | None, layer: Layer, name: Names
) -> ir.Value:
    assert layer.gate is not None
    both = _side_by_side(layer.gate, layer.up)
    if low is not None:
        return linear(graph, native, low, both, name("gate_up"))
    # ONNX Runtime puts them together when it makes a session: the file has each once, for the graphs beside these too.
    parts = [graph.weight(name(f"{n}.weight"), part.weight) for n, part in (("gate", layer.gate), ("up", layer.up))]
    weight = graph.node("Concat", *parts, axis=1)
    if native.up:
        return linear(graph, native, value, both, name("gate_up"), weight=weight)
    inner = graph.node("MatMul", value, weight)
    bias = blocks.bias(graph, name("gate_up.bias"), both.bias)
    return inner if bias is None else graph.node("Add", inner, bias)


def _silu_mul(graph: Graph, native: Native, inner: ir.Value, threshold: float | None) -> ir.Value | Rounded:
    if threshold is None and native.by_nodes:
        gate, up = graph.nodes("Split", inner, wanted=(True, True), axis=-1, num_outputs=2)
        return graph.node("Mul", blocks.activation(graph, gate, SILU), up)
    if threshold is None:
        return graph.node("SiluMul", inner, domain=DOMAIN, fused="silu*up")
    step = threshold / LARGEST
    out = graph.node("SiluMulQuantize", inner, domain=DOMAIN, fused="silu*up", inverse=1 / step)
    return Rounded(out, step)


def _side_by_side(gate: Linear, up: Linear) -> Linear:
    weight = torch.cat([gate.weight, up.weight], dim=1)
    if gate.bias is None and up.bias is None:
        return Linear(weight)
    biases = [weight.new_zeros(p.weight.shape[1]) if p.bias is None else p.bias for p in (gate, up)]
    return Linear(weight, torch.cat(biases))
