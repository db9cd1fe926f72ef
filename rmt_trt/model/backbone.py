"""Hugging Face backbones: built from a config that is bounded first, with an attention that exports cleanly."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface
from transformers.initialization import no_init_weights

from rmt_trt.errors import ContractError, FormatError

STEP_ATTENTION = "rmt_step"

# The backbones whose step was compared with their own eager attention. Others may build, and give other numbers:
# some ignore the mask or the attention that is asked for (MPNet, BLOOM), or attend both ways in a causal place (BERT).
SUPPORTED = {
    "encoder": ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"),
    "decoder": ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"),
}
ROTARY = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")
# Of a config, what must not decide how a model is built: code from elsewhere, half-precision weights, tuples for outputs,
# layers computed in pieces.
IGNORED_FIELDS = (
    "auto_map", "_attn_implementation", "attn_implementation", "dtype", "torch_dtype", "return_dict", "torchscript",
    "chunk_size_feed_forward",
)  # fmt: skip
MAX_LABELS = 1 << 16

# A config comes from a stranger's file. No published backbone comes near these; a model beyond them would
# exhaust memory, or time spent building layers, before its weights were ever compared with it.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 16
MAX_NUMBER = 1 << 24
MAX_DEPTH = 32
LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTH_FIELDS = ("hidden_size", "n_embd", "dim", "d_model", "num_attention_heads", "n_head", "n_heads")


def step_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a segment step: (batch, heads, length, head width) -> (batch, length, heads, head width).

    A mask (batch, 1, 1, length) comes from form E; without one the attention is causal (form D, whose layout needs
    neither mask nor position ids). transformers builds no mask of its own for an attention that is registered
    without a mask function, which keeps packed-sequence detection and mask building out of the exported graph.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    causal = attention_mask is None
    # The queries alone are scaled. Left to the exporter, queries and keys both are, by the root, and in fp16 TensorRT
    # then does not join the keys' factor with its attention kernel: two kernels more for every layer.
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=1.0
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(STEP_ATTENTION, step_attention)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses a backbone config before anything is built from it. Errors: ContractError, FormatError."""
    if not isinstance(config.get("model_type"), str):
        raise FormatError("the backbone config has no 'model_type'; give the config.json of the backbone (--config)")
    for name in (*LAYER_FIELDS, *WIDTH_FIELDS):
        bound = MAX_LAYERS if name in LAYER_FIELDS else MAX_WIDTH
        value = config.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= bound:
            raise ContractError(f"backbone config: {name} is {value!r}; expected a whole number from 1 to {bound}")
    for name, value in config.items():
        bound = MAX_LABELS if name == "num_labels" else MAX_NUMBER
        if isinstance(value, int) and abs(value) > bound:
            raise ContractError(f"backbone config: {name} is {value}; numbers beyond {bound} are refused")
        if isinstance(value, float) and not math.isfinite(value):
            raise ContractError(f"backbone config: {name} is {value}; expected a finite number")
        if _deeper(value, MAX_DEPTH):
            raise ContractError(
                f"backbone config: {name} is nested more than {MAX_DEPTH} deep; such a config is refused"
            )
    for name, plain in (("quantization_config", None), ("is_decoder", False), ("position_embedding_type", "absolute")):
        if config.get(name, plain) not in (None, plain):
            raise ContractError(f"backbone config: {name} is {str(config[name])[:80]}; only {plain} is supported")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    layer_types = config.get("layer_types") or []
    if window is not None or any(kind != "full_attention" for kind in layer_types):
        raise ContractError(
            f"backbone config asks for windowed attention (sliding_window={window!r}, layer_types={layer_types[:4]!r}); "
            f"the segment step attends over the whole segment. Set sliding_window to null if the window is not shorter "
            f"than a segment"
        )


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects lie in one another more than so many levels deep: libraries copy a config recursively."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return levels < 0 or any(_deeper(item, levels - 1) for item in inside)


def hf_config(form: str, config: Mapping[str, Any]) -> Any:
    """The config as transformers' object, with the step's attention. Errors: ContractError, FormatError."""
    check_config(config)
    if config["model_type"] not in SUPPORTED[form]:
        raise ContractError(
            f"backbone config: model_type {config['model_type']!r} is not supported as {form}; "
            f"supported are {', '.join(SUPPORTED[form])}"
        )
    plain = {key: value for key, value in config.items() if key not in IGNORED_FIELDS}
    try:
        made = transformers.AutoConfig.for_model(**plain)
    except Exception as err:  # whatever a config class makes of a stranger's values
        raise FormatError(f"transformers cannot read this '{config['model_type']}' config: {err}") from err
    narrow = getattr(made, "embedding_size", made.hidden_size)  # ELECTRA may project its embeddings
    if narrow != made.hidden_size:
        raise ContractError(
            f"backbone config: embedding_size is {narrow} and hidden_size {made.hidden_size}; memory needs them equal"
        )
    made._attn_implementation = STEP_ATTENTION
    return made


def build_backbone(
    form: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """A backbone with its head, in evaluation mode: a sequence classifier (E) or a causal language model (D).

    With `weights`, shapes are compared on the meta device before any memory is taken, and every key must fit.
    Errors: ContractError for a config out of bounds, FormatError when config and weights do not fit together.
    """
    if weights is not None:
        _compare(outline(form, config), weights)
    with no_init_weights() if weights is not None else contextlib.nullcontext():
        model = _made(form, config)
    if weights is not None:
        model.load_state_dict(dict(weights), strict=False)
        model.tie_weights()
    model.config.use_cache = False
    return model.eval()  # type: ignore[no-any-return]


def outline(form: str, config: Mapping[str, Any]) -> nn.Module:
    """The backbone with its head on the meta device: names, shapes and ties, for no memory. Errors: as `build_backbone`."""
    with torch.device("meta"):
        return _made(form, config)  # type: ignore[no-any-return]


@contextlib.contextmanager
def published_attention(model: nn.Module) -> Iterator[None]:
    """While it is open, the backbone attends as published: its own eager attention, with masks of its own."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(STEP_ATTENTION)  # type: ignore[operator]


def position_capacity(config: Mapping[str, Any]) -> int | None:
    """Positions that the backbone's table holds, or None where positions are computed (rotary)."""
    if config["model_type"] in ROTARY:
        return None
    size = config.get("max_position_embeddings", config.get("n_positions"))
    if size is None:
        return None
    # RoBERTa numbers positions from pad_token_id + 1 on, so the first rows of its table are never used.
    if config["model_type"] in ("roberta", "xlm-roberta", "camembert"):
        return int(size) - int(config.get("pad_token_id", 1)) - 1
    return int(size)


def _made(form: str, config: Mapping[str, Any]) -> Any:
    wanted = hf_config(form, config)
    factory: Any = (
        transformers.AutoModelForSequenceClassification if form == "encoder" else transformers.AutoModelForCausalLM
    )
    try:
        return factory.from_config(wanted)
    except Exception as err:  # whatever a model class makes of a stranger's numbers
        raise FormatError(
            f"transformers cannot build a '{config['model_type']}' {form} from its config: {err}"
        ) from err


def _compare(empty: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Compares names and shapes with a model that takes no memory."""
    wanted, config = empty.state_dict(), empty.config
    tied = re.compile(r"(lm_head|embed_out|output_embeddings)\.weight$") if config.tie_word_embeddings else None
    missing = [key for key in wanted if key not in weights and not (tied and tied.search(key))]
    unknown = [key for key in weights if key not in wanted]
    wrong = [
        f"{key} is {tuple(weights[key].shape)} in the file, {tuple(wanted[key].shape)} in the config"
        for key in wanted
        if key in weights and weights[key].shape != wanted[key].shape
    ]
    if missing or unknown or wrong:
        raise FormatError(
            f"the weights do not fit a '{config.model_type}' with this config: "
            + "; ".join(
                [
                    f"{len(keys)} {what}: {', '.join(keys[:3])}"
                    for keys, what in ((missing, "missing"), (unknown, "unknown"), (wrong, "of another shape"))
                    if keys
                ]
            )
            + ". Give the config.json of the backbone that was trained (--config)"
        )
