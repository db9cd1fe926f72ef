"""Parts of a layer as ONNX Runtime's fused nodes: attention, norms with their residual sum, activations with their bias.

Norms and softmax compute in float32 inside these kernels, whatever the graph's dtype.
Source of the nodes: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from rmt_trt.export.fused.graph import MICROSOFT, Graph
from rmt_trt.export.fused.layers import EXACT_GELU, RELU, SILU, TANH, TANH_GELU, Backbone, Layer, Linear, Norm

# GroupQueryAttention rotates in vectors of 8 pairs; other heads go the long way.
ROTARY_PAIRS = 8


@dataclass(frozen=True)
class Names:
    """Where a layer's weights stand in the file of weights."""

    prefix: str

    def __call__(self, name: str) -> str:
        return f"{self.prefix}.{name}"


def product(graph: Graph, value: ir.Value, linear: Linear, name: str) -> ir.Value:
    """Rows times a matrix, without its bias."""
    return graph.node("MatMul", value, graph.weight(f"{name}.weight", linear.weight))


def linear(graph: Graph, value: ir.Value, matrix: Linear, name: str) -> ir.Value:
    """Rows times a matrix, with its bias if it has one."""
    return biased(graph, product(graph, value, matrix, name), matrix.bias, name)


def biased(graph: Graph, value: ir.Value, bias: torch.Tensor | None, name: str) -> ir.Value:
    """value + bias, where there is one."""
    return value if bias is None else graph.node("Add", value, graph.weight(f"{name}.bias", bias))


def norm(graph: Graph, value: ir.Value, by: Norm, name: str) -> ir.Value:
    """A norm by itself."""
    weight = graph.weight(f"{name}.weight", by.weight)
    if by.rms:
        return graph.node("SimplifiedLayerNormalization", value, weight, axis=-1, epsilon=by.eps, stash_type=1)
    bias = None if by.bias is None else graph.weight(f"{name}.bias", by.bias)
    return graph.node("LayerNormalization", value, weight, bias, axis=-1, epsilon=by.eps)


def skip_norm(
    graph: Graph, value: ir.Value, skip: ir.Value, bias: ir.Value | None, by: Norm, name: str, total: bool = False
) -> list[ir.Value]:
    """[norm(value + skip + bias)], and with `total` the sum too: one node."""
    weight = graph.weight(f"{name}.weight", by.weight)
    wanted = (True, False, False, True) if total else (True,)
    if by.rms:
        return graph.nodes(
            "SkipSimplifiedLayerNormalization", value, skip, weight, bias,
            wanted=wanted, domain=MICROSOFT, fused="skip-norm", epsilon=by.eps,
        )  # fmt: skip
    beta = None if by.bias is None else graph.weight(f"{name}.bias", by.bias)
    return graph.nodes(
        "SkipLayerNormalization", value, skip, weight, beta, bias,
        wanted=wanted, domain=MICROSOFT, fused="skip-norm", epsilon=by.eps,
    )  # fmt: skip


def activation(graph: Graph, value: ir.Value, kind: str) -> ir.Value:
    """An activation by itself."""
    if kind == EXACT_GELU:
        return graph.node("Gelu", value, domain=MICROSOFT)
    if kind == TANH_GELU:
        return graph.node("FastGelu", value, domain=MICROSOFT)
    if kind == SILU:
        return graph.node("QuickGelu", value, domain=MICROSOFT, alpha=1.0)
    return graph.node({RELU: "Relu", TANH: "Tanh"}[kind], value)


def mlp(graph: Graph, value: ir.Value, layer: Layer, kind: str, name: Names) -> ir.Value:
    """Both products and the activation between them; the bias of the second goes into the norm that follows."""
    return product(graph, inner(graph, value, layer, kind, name), layer.down, name("down"))


def inner(graph: Graph, value: ir.Value, layer: Layer, kind: str, name: Names) -> ir.Value:
    """What the MLP's last product takes."""
    if layer.gate is not None:
        matrices = zip(gate_and_up(graph, layer, name), (layer.gate, layer.up), ("gate", "up"), strict=True)
        gate, up = (
            biased(graph, graph.node("MatMul", value, weight), part.bias, name(n)) for weight, part, n in matrices
        )
        return gated(graph, gate, up, layer, kind)
    if layer.up.bias is not None and kind in (EXACT_GELU, TANH_GELU):
        op = "BiasGelu" if kind == EXACT_GELU else "FastGelu"
        bias = graph.weight(name("up.bias"), layer.up.bias)
        return graph.node(op, product(graph, value, layer.up, name("up")), bias, domain=MICROSOFT, fused="bias+gelu")
    return activation(graph, linear(graph, value, layer.up, name("up")), kind)


def gated(graph: Graph, gate: ir.Value, up: ir.Value, layer: Layer, kind: str) -> ir.Value:
    """activation(gate) * up."""
    if kind == SILU:
        return silu_product(graph, gate, up, layer)
    return graph.node("Mul", activation(graph, gate, kind), up)


def gate_and_up(graph: Graph, layer: Layer, name: Names) -> list[ir.Value]:
    """Both matrices of a gated MLP. In a joined graph the file has them side by side, as graphs with our own operators take
    them, and ONNX Runtime takes them apart when it makes a session."""
    if graph.joined:
        return graph.nodes("Split", side_by_side(graph, layer, name), wanted=(True, True), axis=1, num_outputs=2)
    parts = (layer.gate, layer.up)
    return [graph.weight(name(f"{n}.weight"), p.weight) for n, p in zip(("gate", "up"), parts, strict=True) if p]


def side_by_side(graph: Graph, layer: Layer, name: Names) -> ir.Value:
    """(d, 2 f): the gate's matrix, and beside it the other's."""
    return graph.weight(
        name("gate_up.weight"), lambda: torch.cat([p.weight for p in (layer.gate, layer.up) if p], dim=1)
    )


def silu_product(graph: Graph, gate: ir.Value, up: ir.Value, layer: Layer) -> ir.Value:
    """silu(gate) * up in one node.

    GatedRMSNorm computes up * rsqrt(mean(up^2) + eps) * scale * silu(gate) in float32. With eps = 2^30 and scale = 2^15
    the norm is the identity up to a factor 1 - mean(up^2) / 2^31: below float32's own rounding for any up of a root mean
    square under 11, below float16's for any under 1000.
    """
    scale = graph.weight("ones_times_2^15", torch.full((layer.up.weight.shape[1],), 2.0**15))
    return graph.node(
        "GatedRMSNorm", up, scale, gate, domain=MICROSOFT, fused="silu*up", activation="silu", epsilon=2.0**30
    )


def packed(layer: Layer) -> Linear:
    """Query, key and value as one matrix (d, (h + 2 g) * head size)."""
    parts = (layer.query, layer.key, layer.value)
    weight = torch.cat([part.weight for part in parts], dim=1)
    if all(part.bias is None for part in parts):
        return Linear(weight)
    biases = [weight.new_zeros(p.weight.shape[1]) if p.bias is None else p.bias for p in parts]
    return Linear(weight, torch.cat(biases))


def packed_attention(
    graph: Graph, value: ir.Value, layer: Layer, backbone: Backbone, name: Names, lengths: ir.Value | None, causal: bool
) -> ir.Value:
    """Products of query, key and value, their biases and attention over them, in one node.

    lengths: valid positions of each row, (batch,) int32, or None."""
    both = packed(layer)
    bias = both.bias if both.bias is not None else both.weight.new_zeros(both.weight.shape[1])
    return graph.node(
        "Attention",
        value,
        graph.weight(name("qkv.weight"), both.weight),
        graph.weight(name("qkv.bias"), bias),
        lengths,
        domain=MICROSOFT,
        fused="attention",
        num_heads=backbone.heads,
        unidirectional=int(causal),
    )


def separate_attention(
    graph: Graph, value: ir.Value, layer: Layer, backbone: Backbone, name: Names, lengths: ir.Value | None, causal: bool,
    queries: ir.Value | None = None,
) -> ir.Value:  # fmt: skip
    """The same out of three products, without a copy of what they give: for large batches, where that copy takes longer
    than three products instead of one. queries: the rows that attention is computed for; None takes all.

    Two biases need not be added. The key's moves all scores of a query alike, which softmax does not see. The value's
    comes out of attention as it is, since the weights of a query sum to 1: `out_bias` has it.
    """
    query = linear(graph, value if queries is None else queries, layer.query, name("query"))
    key, content = (product(graph, value, part, name(n)) for part, n in ((layer.key, "key"), (layer.value, "value")))
    return graph.node(
        "MultiHeadAttention", query, key, content, None, lengths,
        domain=MICROSOFT, fused="attention", num_heads=backbone.heads, unidirectional=int(causal),
    )  # fmt: skip


def asks_few(lengths: ir.Value | None) -> bool:
    """Whether attention may be given fewer queries than keys: where nothing is masked, which each of ONNX Runtime's kernels
    takes as cross-attention. With lengths it depends on the kernel."""
    return lengths is None


def out_bias(layer: Layer, separate: bool) -> torch.Tensor | None:
    """What is added behind attention's last product; after `separate_attention` the value's bias with it."""
    if not separate or layer.value.bias is None:
        return layer.out.bias
    through = layer.value.bias @ layer.out.weight
    return through if layer.out.bias is None else through + layer.out.bias


def bias(graph: Graph, name: str, value: torch.Tensor | None) -> ir.Value | None:
    """A bias as a weight, or None for none."""
    return None if value is None else graph.weight(name, value)


def rotary_attention(
    graph: Graph, value: ir.Value, layer: Layer, backbone: Backbone, name: Names, length: int, last: ir.Value | None
) -> ir.Value:
    """Causal attention with rotary positions and grouped queries. last (batch,) int32: length - 1 of every row."""
    return attended(graph, linear(graph, value, packed(layer), name("qkv")), layer, backbone, name, length, last)


def attended(
    graph: Graph, qkv: ir.Value, layer: Layer, backbone: Backbone, name: Names, length: int, last: ir.Value | None
) -> ir.Value:
    """The same, of what its product gives: (batch, L, (h + 2 g) * head size)."""
    assert backbone.rotary is not None
    cos, sin = (graph.weight(f"rotary.{n}", t) for n, t in zip(("cos", "sin"), backbone.rotary, strict=True))
    inputs: tuple[ir.Value | None, ...] = (qkv, None, None)
    if grouped_kernel(graph, backbone):
        if layer.query_norm is not None:
            inputs = _normed(graph, qkv, layer, backbone, name)
        return graph.nodes(
            "GroupQueryAttention", *inputs, None, None, last, graph.constant(length, np.int32), cos, sin,
            wanted=(True, True, True), domain=MICROSOFT, fused="rotary attention",
            num_heads=backbone.heads, kv_num_heads=backbone.kv_heads, do_rotary=1, rotary_interleaved=0,
        )[0]  # fmt: skip
    return attended_apart(graph, qkv, layer, backbone, name)


def attended_apart(graph: Graph, qkv: ir.Value, layer: Layer, backbone: Backbone, name: Names) -> ir.Value:
    """The same by a node for each step: positions of queries and of keys, heads repeated, attention."""
    assert backbone.rotary is not None
    cos, sin = (graph.weight(f"rotary.{n}", t) for n, t in zip(("cos", "sin"), backbone.rotary, strict=True))
    query, key, content = _normed(graph, qkv, layer, backbone, name)
    places = graph.constant([0])  # the first position; the others follow
    rotated = 2 * backbone.rotary[0].shape[1]
    rotated = 0 if rotated == backbone.head_size else rotated  # 0 is the whole head
    query, key = (
        graph.node(
            "RotaryEmbedding", part, places, cos, sin,
            domain=MICROSOFT, num_heads=heads, rotary_embedding_dim=rotated,
        )
        for part, heads in ((query, backbone.heads), (key, backbone.kv_heads))
    )  # fmt: skip
    if backbone.heads != backbone.kv_heads:
        key, content = (_repeat(graph, part, backbone) for part in (key, content))
    return graph.node(
        "MultiHeadAttention", query, key, content,
        domain=MICROSOFT, fused="attention", num_heads=backbone.heads, unidirectional=1,
    )  # fmt: skip


def grouped_kernel(graph: Graph, backbone: Backbone) -> bool:
    """Whether GroupQueryAttention takes it: half precision on a GPU, heads of whole rotary vectors."""
    return graph.grouped and backbone.rotary is not None and backbone.rotary[0].shape[1] % ROTARY_PAIRS == 0


def _normed(
    graph: Graph, qkv: ir.Value, layer: Layer, backbone: Backbone, name: Names
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query, key and value apart, the first two normed head by head where the backbone does that (Qwen3)."""
    sizes = [count * backbone.head_size for count in (backbone.heads, backbone.kv_heads, backbone.kv_heads)]
    query, key, value = graph.nodes("Split", qkv, graph.constant(sizes), wanted=(True,) * 3, axis=-1)
    if layer.query_norm is not None and layer.key_norm is not None:
        query = _per_head(graph, query, layer.query_norm, backbone.heads, backbone.head_size, name("query_norm"))
        key = _per_head(graph, key, layer.key_norm, backbone.kv_heads, backbone.head_size, name("key_norm"))
    return query, key, value


def _per_head(graph: Graph, value: ir.Value, by: Norm, heads: int, size: int, name: str) -> ir.Value:
    split = graph.node("Reshape", value, graph.constant([0, 0, heads, size]))
    return graph.node("Reshape", norm(graph, split, by, name), graph.constant([0, 0, heads * size]))


def _repeat(graph: Graph, value: ir.Value, backbone: Backbone) -> ir.Value:
    """(batch, length, g * head size) -> (batch, length, h * head size), each group's head repeated in place."""
    groups, size = backbone.kv_heads, backbone.head_size
    apart = graph.node("Reshape", value, graph.constant([0, 0, groups, 1, size]))
    times = graph.constant([1, 1, 1, backbone.heads // groups, 1])
    return graph.node("Reshape", graph.node("Tile", apart, times), graph.constant([0, 0, backbone.heads * size]))
