"""Layers whose every node is an operator of our own that a GPU of compute capability 9.0 has kernels of its own for.

They follow one another without a gap there: each kernel is launched while the one before it ends. What the operators compute
stands in `native/ops.c`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from rmt_trt.export.fused import blocks
from rmt_trt.export.fused.blocks import Names
from rmt_trt.export.fused.graph import MICROSOFT, Graph
from rmt_trt.export.fused.kept import Kept, rows_of
from rmt_trt.export.fused.layers import EXACT_GELU, TANH_GELU, Backbone, CannotFuse, Layer, Linear, Norm
from rmt_trt.export.fused.native import Native, bias_of, linear
from rmt_trt.runtime.native import DOMAIN

HEAD = 64  # size of the heads that attention takes
STEP = 64  # widths that products go through are multiples of
ROW = 2048  # width of the rows that norms take, at most


def fits(backbone: Backbone) -> bool:
    """Whether the kernels take a backbone: attention without rotary positions, an MLP without a gate, one behind the other."""
    if backbone.rotary is not None or backbone.parallel or backbone.head_size != HEAD:
        return False
    once = [norm for norm in (backbone.embedding_norm, backbone.final_norm) if norm is not None]
    norms = [*once, *(norm for layer in backbone.layers for norm in (layer.norm1, layer.norm2))]
    if any(norm.rms or norm.bias is None or norm.weight.shape[0] > ROW for norm in norms):
        return False
    matrices = [part.weight for layer in backbone.layers for part in (layer.out, layer.up, layer.down)]
    plain = all(layer.gate is None and layer.query_norm is None for layer in backbone.layers)
    same = backbone.heads == backbone.kv_heads
    return plain and same and not any(size % STEP for matrix in matrices for size in matrix.shape)


def embeds(native: Native | None, backbone: Backbone) -> bool:
    """Whether a node of our own makes the first rows of full segments."""
    wanted = native is not None and native.hopper and not native.by_nodes
    return wanted and backbone.positions is not None and backbone.word.shape[1] <= ROW


def embed(
    graph: Graph,
    memory: ir.Value,
    segment: ir.Value,
    frame: list[int],
    word: torch.Tensor,
    positions: ir.Value,
    by: Norm,
    name: str,
    total: bool = False,
) -> list[ir.Value]:
    """[norm(rows)] (batch, L, d), and with `total` the rows too. frame, of each row: a token; or `text_at` and `memory_at`.
    positions (L, d) are added. Segments are full. Width: at most ROW."""
    assert by.bias is not None  # `fits`
    weights = (graph.weight(f"{name}.weight", by.weight), graph.weight(f"{name}.bias", by.bias))
    return graph.nodes(
        "Embed", memory, segment, graph.constant(np.array(frame)), graph.weight("word", word), positions, *weights,
        wanted=(True, True) if total else (True,), domain=DOMAIN, fused="first rows", epsilon=by.eps,
    )  # fmt: skip


def text_at(first: int, count: int) -> list[int]:
    """`count` tokens of the segment in a frame, from this one on."""
    return [-1 - number for number in range(first, first + count)]


def memory_at(length: int, count: int) -> list[int]:
    """All of `count` rows of memory in a frame, of segments of this length."""
    return text_at(length, count)


def encoder_layers(
    graph: Graph,
    native: Native,
    value: ir.Value,
    backbone: Backbone,
    lengths: ir.Value | None,
    kept: Kept,
    written: tuple[int, int],
) -> tuple[ir.Value, ir.Value | None]:
    """(batch, L, d) -> (batch, K, d) through all layers, of the last one the K rows that are kept, which are the first; and
    those of them that are `written`, from and to, as float32, where a node gives them.

    Errors: CannotFuse, for a backbone that does not fit, and for thresholds of FP8."""
    _check(native, backbone)
    carried: list[ir.Value] = []
    for number, layer in enumerate(backbone.layers):
        name = Names(f"layer{number}")
        following = number + 1 < len(backbone.layers)
        few = None if following else kept
        mixed = _attention(graph, native, value, layer, backbone, name, lengths, False, few)
        out, down = (layer.out, name("out"), "bias.0"), (layer.down, name("down"), "bias")
        (value,) = _product_norm(graph, native, mixed, out, value, few, layer.norm1, name("norm1"))
        inner = _mlp(graph, native, value, layer, backbone.activation, name)
        by, hands_on = (layer.norm2, name("norm2")), None if following else written
        value, *carried = _product_norm(graph, native, inner, down, value, None, *by, written=hands_on)
    return value, carried[0] if carried else None


def decoder_layers(
    graph: Graph,
    native: Native,
    backbone: Backbone,
    value: ir.Value,
    total: ir.Value,
    kept: Kept | None,
    written: tuple[int, int] | None,
) -> tuple[ir.Value, ir.Value | None]:
    """The first rows, normed and as they are, (batch, L, d) -> (batch, L, d) after the final norm, or (batch, K, d) of the K
    rows that are kept of the last layer: the last ones, or for each document its own; and those of them that are `written`,
    as `encoder_layers`. Every norm adds the residual that comes before it.

    Errors: as `encoder_layers`."""
    _check(native, backbone)
    carried: list[ir.Value] = []
    for number, layer in enumerate(backbone.layers):
        name = Names(f"layer{number}")
        following = number + 1 < len(backbone.layers)
        few = None if following else kept
        mixed = _attention(graph, native, value, layer, backbone, name, None, True, few)
        out, down = (layer.out, name("out"), "bias.0"), (layer.down, name("down"), "bias")
        value, total = _product_norm(graph, native, mixed, out, total, few, layer.norm2, name("norm2"), total=True)
        inner = _mlp(graph, native, value, layer, backbone.activation, name)
        if following:
            after, after_name = backbone.layers[number + 1].norm1, f"layer{number + 1}.norm1"
            value, total = _product_norm(graph, native, inner, down, total, None, after, after_name, total=True)
        else:
            assert backbone.final_norm is not None  # every decoder has one
            by = backbone.final_norm
            value, *carried = _product_norm(graph, native, inner, down, total, None, by, "final_norm", written=written)
    return value, carried[0] if carried else None


def _check(native: Native, backbone: Backbone) -> None:
    if not fits(backbone):
        raise CannotFuse(
            f"the kernels for compute capability 9.0 take layers of heads of {HEAD}, widths of multiples of {STEP}, layer "
            f"norms with biases, no rotary positions and no gates; this backbone has others"
        )
    if native.thresholds is not None:
        raise CannotFuse("the kernels for compute capability 9.0 multiply in half precision, and not in FP8")


def _attention(
    graph: Graph, native: Native, value: ir.Value, layer: Layer, backbone: Backbone, name: Names,
    lengths: ir.Value | None, causal: bool, kept: Kept | None,
) -> ir.Value:  # fmt: skip
    """Attention but for its last product, for the kept rows or for all."""
    both = blocks.packed(layer)
    bias = both.bias if both.bias is not None else torch.zeros(both.weight.shape[1])
    qkv = linear(graph, native, value, Linear(both.weight, bias), name("qkv"))
    rows = 0 if native.by_nodes or kept is None or not isinstance(kept.at, int) else kept.size
    attended = _attended_by_nodes if native.by_nodes else _attended
    mixed = attended(graph, qkv, backbone, lengths, causal, rows)
    return mixed if rows else rows_of(graph, kept, mixed)


def _attended(
    graph: Graph, qkv: ir.Value, backbone: Backbone, lengths: ir.Value | None, causal: bool, rows: int
) -> ir.Value:
    inputs = [qkv] if lengths is None else [qkv, lengths]
    return graph.node(
        "PackedAttention", *inputs,
        domain=DOMAIN, fused="attention", heads=backbone.heads, causal=int(causal), rows=rows,
    )  # fmt: skip


def _attended_by_nodes(
    graph: Graph, qkv: ir.Value, backbone: Backbone, lengths: ir.Value | None, causal: bool, rows: int
) -> ir.Value:
    """The same for all rows: of fewer queries than keys, ONNX Runtime's kernels differ in what lengths and causality hide."""
    parts = graph.nodes("Split", qkv, wanted=(True,) * 3, axis=-1, num_outputs=3)
    return graph.node(
        "MultiHeadAttention", *parts, None, lengths,
        domain=MICROSOFT, fused="attention", num_heads=backbone.heads, unidirectional=int(causal),
    )  # fmt: skip


def _mlp(graph: Graph, native: Native, value: ir.Value, layer: Layer, kind: str, name: Names) -> ir.Value:
    """The MLP but for its last product."""
    gelu = kind == TANH_GELU or (kind == EXACT_GELU and native.tanh)
    inner = linear(graph, native, value, layer.up, name("up"), gelu=gelu)
    return inner if gelu else blocks.activation(graph, inner, kind)


def _product_norm(
    graph: Graph, native: Native, value: ir.Value, matrix: tuple[Linear, str, str], skip: ir.Value, kept: Kept | None,
    by: Norm, name: str, total: bool = False, written: tuple[int, int] | None = None,
) -> list[ir.Value]:  # fmt: skip
    """[norm(value matrix + skip)], of skip the rows that are kept; with `total` the sum too, and with `written` float32 of the
    rows from and to, where a node gives it. matrix: a product, its name and that of its bias."""
    of, of_name, bias_name = matrix
    if native.by_nodes:
        made = linear(graph, native, value, of, of_name, bias_name)
        return blocks.skip_norm(graph, made, rows_of(graph, kept, skip), None, by, name, total)
    assert by.bias is not None  # `fits`
    at = 0
    if kept is not None and isinstance(kept.at, int):
        at = kept.at
    else:
        skip = rows_of(graph, kept, skip)
    first, last = written or (0, 0)
    bias = bias_of(graph, of.bias, of.weight.shape[1], f"{of_name}.{bias_name}")
    return graph.nodes(
        "LinearSkipLayerNorm", value, graph.weight(f"{of_name}.weight", of.weight), bias, skip,
        graph.weight(f"{name}.weight", by.weight), graph.weight(f"{name}.bias", by.bias),
        wanted=(True, total, written is not None), domain=DOMAIN, fused="product+skip-norm", epsilon=by.eps,
        at=at, first=first, last=last,
    )  # fmt: skip
