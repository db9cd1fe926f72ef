"""Backbones in one form: the tensors of each supported architecture, named for what they do in a layer.

The graphs with fused nodes are written from this form, so that an architecture is one function here and none there.
Matrices are (in, out), as a product of rows wants them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rmt_trt.errors import ContractError
from rmt_trt.model.step import RMTModel

EXACT_GELU, TANH_GELU, RELU, SILU, TANH, NONE = "gelu", "gelu_tanh", "relu", "silu", "tanh", "none"
ACTIVATIONS = {
    "gelu": EXACT_GELU,
    "gelu_new": TANH_GELU,
    "gelu_pytorch_tanh": TANH_GELU,
    "gelu_fast": TANH_GELU,
    "relu": RELU,
    "silu": SILU,
    "swish": SILU,
}


class CannotFuse(ContractError):
    """A backbone for which no graph with fused nodes is known; it exports plainly."""


@dataclass(frozen=True, eq=False)
class Linear:
    """weight (in, out), bias (out,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """Layer norm; without a bias and with `rms`, root mean square norm."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer. `norm1` and `norm2` stand behind attention and MLP in an encoder, before them in a decoder."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    norm1: Norm
    norm2: Norm
    up: Linear
    down: Linear
    gate: Linear | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class Backbone:
    """word (vocabulary, d); positions (L, d), what is added to the rows of a segment, or None; rotary: cosines and
    sines (L, r / 2) of the r rotated dimensions; head: matrices and the activation behind each, for an encoder over
    the first row, for a decoder over the text's rows."""

    layers: tuple[Layer, ...]
    word: torch.Tensor
    positions: torch.Tensor | None
    embedding_norm: Norm | None
    final_norm: Norm | None
    heads: int
    kv_heads: int
    head_size: int
    activation: str
    head: tuple[tuple[Linear, str], ...]
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    parallel: bool = False


def backbone_of(model: RMTModel) -> Backbone:
    """Errors: CannotFuse, naming what stands in the way."""
    kind = model.config.backbone["model_type"]
    reader = READERS.get(kind)
    if reader is None:
        raise CannotFuse(f"no fused graph is known for '{kind}' backbones; known are {', '.join(READERS)}")
    with torch.no_grad():
        return reader(model.backbone, model.config.positions)


def _bert(model: Any, length: int) -> Backbone:
    """BERT, RoBERTa (XLM-R, CamemBERT) and ELECTRA: one layout under three names."""
    config = model.config
    inner = getattr(model, model.base_model_prefix)
    embeddings = inner.embeddings
    first = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    positions = (
        embeddings.position_embeddings.weight[first : first + length] + embeddings.token_type_embeddings.weight[0]
    )
    layers = tuple(
        Layer(
            query=_linear(layer.attention.self.query),
            key=_linear(layer.attention.self.key),
            value=_linear(layer.attention.self.value),
            out=_linear(layer.attention.output.dense),
            norm1=_norm(layer.attention.output.LayerNorm),
            up=_linear(layer.intermediate.dense),
            down=_linear(layer.output.dense),
            norm2=_norm(layer.output.LayerNorm),
        )
        for layer in inner.encoder.layer
    )
    head: tuple[tuple[Linear, str], ...]
    if config.model_type == "bert":
        head = ((_linear(inner.pooler.dense), TANH), (_linear(model.classifier), NONE))
    else:
        middle = EXACT_GELU if config.model_type == "electra" else TANH
        head = ((_linear(model.classifier.dense), middle), (_linear(model.classifier.out_proj), NONE))
    return Backbone(
        layers, embeddings.word_embeddings.weight, positions, _norm(embeddings.LayerNorm), None,
        config.num_attention_heads, config.num_attention_heads, config.hidden_size // config.num_attention_heads,
        _activation(config.hidden_act), head,
    )  # fmt: skip


def _distilbert(model: Any, length: int) -> Backbone:
    config, inner = model.config, model.distilbert
    layers = tuple(
        Layer(
            query=_linear(layer.attention.q_lin),
            key=_linear(layer.attention.k_lin),
            value=_linear(layer.attention.v_lin),
            out=_linear(layer.attention.out_lin),
            norm1=_norm(layer.sa_layer_norm),
            up=_linear(layer.ffn.lin1),
            down=_linear(layer.ffn.lin2),
            norm2=_norm(layer.output_layer_norm),
        )
        for layer in inner.transformer.layer
    )
    head = ((_linear(model.pre_classifier), RELU), (_linear(model.classifier), NONE))
    return Backbone(
        layers, inner.embeddings.word_embeddings.weight, inner.embeddings.position_embeddings.weight[:length],
        _norm(inner.embeddings.LayerNorm), None, config.n_heads, config.n_heads, config.dim // config.n_heads,
        _activation(config.activation), head,
    )  # fmt: skip


def _gpt2(model: Any, length: int) -> Backbone:
    config, inner = model.config, model.transformer
    for name, plain in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("reorder_and_upcast_attn", False),
    ):
        if getattr(config, name, plain) != plain:
            raise CannotFuse(f"the backbone's config sets {name}, which no fused attention knows")
    layers = []
    for block in inner.h:
        weights = block.attn.c_attn.weight.chunk(3, dim=1)  # a Conv1D: (in, out) already
        biases = block.attn.c_attn.bias.chunk(3)
        query, key, value = (Linear(w, b) for w, b in zip(weights, biases, strict=True))
        layers.append(
            Layer(
                query=query,
                key=key,
                value=value,
                out=Linear(block.attn.c_proj.weight, block.attn.c_proj.bias),
                norm1=_norm(block.ln_1),
                norm2=_norm(block.ln_2),
                up=Linear(block.mlp.c_fc.weight, block.mlp.c_fc.bias),
                down=Linear(block.mlp.c_proj.weight, block.mlp.c_proj.bias),
            )
        )
    return Backbone(
        tuple(layers), inner.wte.weight, inner.wpe.weight[:length], None, _norm(inner.ln_f),
        config.n_head, config.n_head, config.n_embd // config.n_head, _activation(config.activation_function),
        ((_linear(model.lm_head), NONE),),
    )  # fmt: skip


def _gpt_neox(model: Any, length: int) -> Backbone:
    config, inner = model.config, model.gpt_neox
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    layers = []
    for block in inner.layers:
        packed = block.attention.query_key_value  # head by head: query, key, value
        weights = packed.weight.view(heads, 3, size, -1)
        biases = None if packed.bias is None else packed.bias.view(heads, 3, size)
        query, key, value = (
            Linear(weights[:, i].flatten(0, 1).T, None if biases is None else biases[:, i].flatten()) for i in range(3)
        )
        layers.append(
            Layer(
                query=query,
                key=key,
                value=value,
                out=_linear(block.attention.dense),
                norm1=_norm(block.input_layernorm),
                norm2=_norm(block.post_attention_layernorm),
                up=_linear(block.mlp.dense_h_to_4h),
                down=_linear(block.mlp.dense_4h_to_h),
            )
        )
    return Backbone(
        tuple(layers), inner.embed_in.weight, None, None, _norm(inner.final_layer_norm), heads, heads, size,
        _activation(config.hidden_act), ((_linear(model.get_output_embeddings()), NONE),),
        _rotary(inner.rotary_emb, length), config.use_parallel_residual,
    )  # fmt: skip


def _llama(model: Any, length: int) -> Backbone:
    """Llama, Mistral, Qwen2, Qwen3: gated MLP, root mean square norms, rotary positions, grouped queries."""
    config, inner = model.config, model.model
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = tuple(
        Layer(
            query=_linear(layer.self_attn.q_proj),
            key=_linear(layer.self_attn.k_proj),
            value=_linear(layer.self_attn.v_proj),
            out=_linear(layer.self_attn.o_proj),
            norm1=_norm(layer.input_layernorm),
            norm2=_norm(layer.post_attention_layernorm),
            gate=_linear(layer.mlp.gate_proj),
            up=_linear(layer.mlp.up_proj),
            down=_linear(layer.mlp.down_proj),
            query_norm=_norm(layer.self_attn.q_norm) if hasattr(layer.self_attn, "q_norm") else None,
            key_norm=_norm(layer.self_attn.k_norm) if hasattr(layer.self_attn, "k_norm") else None,
        )
        for layer in inner.layers
    )
    return Backbone(
        layers, inner.embed_tokens.weight, None, None, _norm(inner.norm), heads, config.num_key_value_heads, size,
        _activation(config.hidden_act), ((_linear(model.lm_head), NONE),), _rotary(inner.rotary_emb, length),
    )  # fmt: skip


READERS: dict[str, Callable[[Any, int], Backbone]] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "camembert": _bert,
    "electra": _bert,
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
}


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.T, module.bias)


def _norm(module: Any) -> Norm:
    if isinstance(module, nn.LayerNorm):
        return Norm(module.weight, module.bias, module.eps)
    return Norm(module.weight, None, module.variance_epsilon, rms=True)


def _rotary(module: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (length, r / 2) as the backbone computes them: its two halves hold the same."""
    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise CannotFuse(f"no fused graph is known for the activation '{name}'; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
