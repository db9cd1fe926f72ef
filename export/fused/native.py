"""Layers of an encoder with rmt-trt's own operators: biases and GELU in the products' epilogues, products in FP8.

What the operators compute stands in `native/ops.c`. Steps of FP8 are one number for a tensor: its threshold by 448, the
largest E4M3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from rmt_trt.export.fused import blocks
from rmt_trt.export.fused.blocks import Names
from rmt_trt.export.fused.graph import LARGEST, MICROSOFT, Graph
from rmt_trt.export.fused.kept import Kept, rows_of
from rmt_trt.export.fused.layers import EXACT_GELU, TANH_GELU, Backbone, Layer, Linear, Norm
from rmt_trt.runtime.native import DOMAIN

WIDEST = 8192  # row that SkipLayerNormQuantize takes


@dataclass(frozen=True)
class Native:
    """Which products are nodes of our own. up also takes exact GELU in, as its tanh form, if `tanh` allows it.

    thresholds  what the inputs of products in FP8 are cut at, by product ("layer0.qkv", .out, .up, .down); a product
                without one stays in the graph's dtype
    norm, inner a norm, and the MLP's first product, round their results for the product behind them
    rotary      positions of a decoder by a kernel of our own, before attention over heads of keys and values "repeated" for
                every head of queries, or over "grouped" heads; "" leaves them to GroupQueryAttention
    gated       a gated MLP's first two products are one, with their activation in one node behind it
    packed      query, key and value in FP8 are one product where nothing is masked, not three
    candidates  how many of cuBLASLt's algorithms are tried out for a product; 1 takes the first that it proposes, or on
                compute capability 9.0 a kernel of our own where the product is small
    by_nodes    writes what is not FP8 as the nodes of ONNX Runtime that it stands for
    hopper      attention and norms are nodes of our own too, for compute capability 9.0, and so are all products
    """

    qkv: bool = True
    out: bool = True
    up: bool = True
    down: bool = True
    tanh: bool = True
    thresholds: Mapping[str, float] | None = None
    norm: bool = True
    inner: bool = True
    packed: bool = False
    rotary: str = "repeated"
    gated: bool = True
    candidates: int = 1
    fast: bool = True
    by_nodes: bool = False
    hopper: bool = False

    def threshold(self, product: str) -> float | None:
        return None if self.thresholds is None else self.thresholds.get(product)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A tensor in FP8; `step` times it is what it stands for."""

    value: ir.Value
    step: float


def rounded(graph: Graph, value: ir.Value, threshold: float) -> Rounded:
    """A tensor rounded to FP8, by a node of its own."""
    step = threshold / LARGEST
    return Rounded(graph.node("Quantize", value, domain=DOMAIN, fused="to FP8", inverse=1 / step), step)


def linear(
    graph: Graph,
    native: Native,
    value: ir.Value | Rounded,
    matrix: Linear,
    name: str,
    bias_name: str = "bias",
    gelu: bool = False,
) -> ir.Value:
    """A product with its bias and tanh-GELU. Of a Rounded one the weights are FP8 too."""
    bias = bias_of(graph, matrix.bias, matrix.weight.shape[1], f"{name}.{bias_name}")
    if isinstance(value, Rounded):
        return low_product(graph, native, value, graph.float8(f"{name}.weight.fp8", matrix.weight), bias, gelu)
    return product(graph, native, value, graph.weight(f"{name}.weight", matrix.weight), bias, gelu)


def product(
    graph: Graph, native: Native, value: ir.Value, weight: ir.Value, bias: ir.Value, gelu: bool = False
) -> ir.Value:
    """The same of values in the graph's dtype."""
    if native.by_nodes:
        out = graph.node("Add", graph.node("MatMul", value, weight), bias)
        return graph.node("FastGelu", out, domain=MICROSOFT) if gelu else out
    return graph.node("Linear", value, weight, bias, domain=DOMAIN, fused="product+bias", **_asked(native, gelu))


def low_product(
    graph: Graph, native: Native, value: Rounded, weight: tuple[ir.Value, float], bias: ir.Value, gelu: bool = False
) -> ir.Value:
    """The same in FP8. weight: and its step."""
    return graph.node(
        "Linear", value.value, weight[0], bias,
        domain=DOMAIN, fused="FP8 product", transposed=1, fast=int(native.fast), scale=value.step * weight[1],
        **_asked(native, gelu),
    )  # fmt: skip


def linear_rounded(
    graph: Graph, native: Native, value: Rounded, matrix: Linear, name: str, threshold: float, gelu: bool = False
) -> Rounded:
    """The same, its result rounded to FP8 for the product behind it."""
    weight, step = graph.float8(f"{name}.weight.fp8", matrix.weight)
    inverse = graph.constant([LARGEST / threshold], np.float32)
    bias = bias_of(graph, matrix.bias, matrix.weight.shape[1], f"{name}.bias")
    out = graph.node(
        "LinearQuantize", value.value, weight, bias, inverse,
        domain=DOMAIN, fused="FP8 product", transposed=1, fast=int(native.fast), scale=value.step * step,
        **_asked(native, gelu),
    )  # fmt: skip
    return Rounded(out, threshold / LARGEST)


def _asked(native: Native, gelu: bool) -> dict[str, str | int]:
    return {"activation": "gelu" if gelu else "none", "candidates": native.candidates}


def bias_of(graph: Graph, bias: torch.Tensor | None, width: int, name: str) -> ir.Value:
    """Every product has one: that of zeros costs nothing in an epilogue."""
    if bias is None:
        return graph.weight(f"zeros.{width}", torch.zeros(width))
    return graph.weight(name, bias)


def skip_norm(
    graph: Graph,
    native: Native,
    value: ir.Value,
    skip: ir.Value,
    bias: ir.Value | None,
    by: Norm,
    name: str,
    threshold: float | None,
) -> tuple[ir.Value, Rounded | None]:
    """norm(value + skip + bias), and the same in FP8 where a product wants it."""
    wide = by.weight.shape[0] > WIDEST
    if threshold is None or not native.norm or bias is not None or by.rms or by.bias is None or wide:
        out = blocks.skip_norm(graph, value, skip, bias, by, name)[0]
        return out, None if threshold is None else rounded(graph, out, threshold)
    weights = (graph.weight(f"{name}.weight", by.weight), graph.weight(f"{name}.bias", by.bias))
    step = threshold / LARGEST
    out, low = graph.nodes(
        "SkipLayerNormQuantize", value, skip, *weights,
        wanted=(True, True), domain=DOMAIN, fused="skip-norm", epsilon=by.eps, inverse=1 / step,
    )  # fmt: skip
    return out, Rounded(low, step)


def encoder_layers(
    graph: Graph,
    native: Native,
    value: ir.Value,
    backbone: Backbone,
    lengths: ir.Value | None,
    separate: bool,
    kept: Kept,
) -> ir.Value:
    """(batch, L, d) -> (batch, K, d) through all layers, of the last one the K rows that are kept. separate: query, key
    and value by three products, which FP8 always takes."""
    low: Rounded | None = None
    for number, layer in enumerate(backbone.layers):
        name = Names(f"layer{number}")
        threshold = native.threshold(name("qkv"))
        if threshold is not None and low is None:
            low = rounded(graph, value, threshold)
        few = kept if number + 1 == len(backbone.layers) else None
        mixed, bias, value = _attention(graph, native, value, low, layer, backbone, name, lengths, separate, few)
        value, low = skip_norm(
            graph, native, mixed, value, bias, layer.norm1, name("norm1"), native.threshold(name("up"))
        )
        inner, bias = mlp(graph, native, value, low, layer, backbone.activation, name)
        following = native.threshold(f"layer{number + 1}.qkv")
        value, low = skip_norm(graph, native, inner, value, bias, layer.norm2, name("norm2"), following)
    return value


def _attention(
    graph: Graph, native: Native, value: ir.Value, low: Rounded | None, layer: Layer, backbone: Backbone, name: Names,
    lengths: ir.Value | None, separate: bool, kept: Kept | None,
) -> tuple[ir.Value, ir.Value | None, ir.Value]:  # fmt: skip
    """Attention and its last product for the kept rows, or for all, the bias that is still to be added, and these rows."""
    residual = rows_of(graph, kept, value)
    apart = low is not None or (native.qkv and separate)
    packed = low is not None and native.packed and lengths is None
    few = (separate or apart) and not packed and blocks.asks_few(lengths)
    queries, folded = residual if few else value, False
    if low is not None and packed:
        mixed = _packed_attention(graph, native, low, layer, backbone, name)
    elif apart:
        mixed = _apart_attention(graph, native, value, low, queries, layer, backbone, name, lengths)
    elif separate:
        mixed, folded = blocks.separate_attention(graph, value, layer, backbone, name, lengths, False, queries), True
    else:
        mixed = blocks.packed_attention(graph, value, layer, backbone, name, lengths, causal=False)
    mixed = mixed if few else rows_of(graph, kept, mixed)
    matrix = Linear(layer.out.weight, blocks.out_bias(layer, folded))
    threshold = native.threshold(name("out"))
    if threshold is not None or native.out:
        given = mixed if threshold is None else rounded(graph, mixed, threshold)
        return linear(graph, native, given, matrix, name("out"), f"bias.{folded:d}"), None, residual
    bias = blocks.bias(graph, name(f"out.bias.{folded:d}"), matrix.bias)
    return blocks.product(graph, mixed, layer.out, name("out")), bias, residual


def _apart_attention(
    graph: Graph, native: Native, value: ir.Value, low: Rounded | None, queries: ir.Value, layer: Layer,
    backbone: Backbone, name: Names, lengths: ir.Value | None,
) -> ir.Value:  # fmt: skip
    """Attention over three products of our own. queries: the rows that it is computed for, in the graph's dtype."""
    given, asked = low or value, low or queries
    threshold = native.threshold(name("qkv"))
    if queries is not value and threshold is not None:
        asked = rounded(graph, queries, threshold)  # ONNX's Slice takes no FP8
    parts = ((asked, layer.query, "query"), (given, layer.key, "key"), (given, layer.value, "value"))
    inputs = [linear(graph, native, rows, part, name(n)) for rows, part, n in parts]
    return graph.node(
        "MultiHeadAttention", *inputs, None, lengths,
        domain=MICROSOFT, fused="attention", num_heads=backbone.heads,
    )  # fmt: skip


def _packed_attention(
    graph: Graph, native: Native, low: Rounded, layer: Layer, backbone: Backbone, name: Names
) -> ir.Value:
    """Attention over one product's rows, head by head query, key and value, as MultiHeadAttention takes them unmasked."""
    heads, size = backbone.heads, backbone.head_size
    parts = (layer.query, layer.key, layer.value)
    weight = torch.stack([part.weight.detach().reshape(-1, heads, size) for part in parts], dim=2).flatten(1)
    biases = [torch.zeros(heads * size) if part.bias is None else part.bias.detach() for part in parts]
    bias = torch.stack([part.reshape(heads, size) for part in biases], dim=1).flatten()
    rows = linear(graph, native, low, Linear(weight, bias), name("qkv"), "bias.by_head")
    rows = graph.node("Reshape", rows, graph.constant([0, 0, heads, 3, size]))
    inputs = [rows]
    if graph.dtype == "fp32":  # the CPU provider, which twins run on, takes them apart only
        inputs = [
            graph.node("Reshape", graph.slice(rows, i, i + 1, axis=3), graph.constant([0, 0, heads * size]))
            for i in range(3)
        ]
    return graph.node("MultiHeadAttention", *inputs, domain=MICROSOFT, fused="attention", num_heads=heads)


def mlp(
    graph: Graph, native: Native, value: ir.Value, low: Rounded | None, layer: Layer, kind: str, name: Names
) -> tuple[ir.Value, ir.Value | None]:
    """Both products and the activation between them, and the bias that is still to be added."""
    gelu = layer.gate is None and (kind == TANH_GELU or (kind == EXACT_GELU and native.tanh))
    threshold = native.threshold(name("down"))
    given: ir.Value | Rounded
    if low is not None and gelu and threshold is not None and native.inner:
        given = linear_rounded(graph, native, low, layer.up, name("up"), threshold, gelu=True)
    else:
        if (low is not None and layer.gate is None) or (native.up and gelu):
            inner = linear(graph, native, low or value, layer.up, name("up"), gelu=gelu)
            inner = inner if gelu else blocks.activation(graph, inner, kind)
        else:
            inner = blocks.inner(graph, value, layer, kind, name)
        given = inner if threshold is None else rounded(graph, inner, threshold)
    if isinstance(given, Rounded) or native.down:
        return linear(graph, native, given, layer.down, name("down")), None
    return blocks.product(graph, given, layer.down, name("down")), blocks.bias(
        graph, name("down.bias"), layer.down.bias
    )
