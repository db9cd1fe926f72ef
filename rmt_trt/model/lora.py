"""LoRA adapters in a state dict, merged into the weights that they belong to (arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from rmt_trt.errors import FormatError

PEFT_PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")
# GPT-2 keeps these layers as Conv1D, whose weight is (in, out): the transpose of a Linear's.
CONV1D_LAYERS = re.compile(r"transformer\.h\.\d+\.(attn\.(c_attn|q_attn|c_proj)|mlp\.(c_fc|c_proj))")


def has_lora(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a backbone's state dict was written with an adapter around it."""
    return any(key.startswith(PEFT_PREFIX) or "lora_" in key for key in tensors)


def merge_lora(tensors: Mapping[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """The state dict of the plain backbone: W + (alpha / r) * B @ A for every adapted layer, in float32.

    A is (r, in) and B (out, r), under `<layer>.lora_A.<adapter>.weight`; the layer's own weight is
    `<layer>.weight` or `<layer>.base_layer.weight`, (out, in), or (in, out) in GPT-2's Conv1D. The rank is taken
    from A. The scale is that of plain LoRA; a file does not say whether it was trained with rank-stabilised LoRA.
    Errors: FormatError, for an adapter of another kind (named), several adapters, or factors that do not fit.
    """
    plain, factors, adapters = {}, dict[str, dict[str, torch.Tensor]](), set()
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        found = FACTOR.fullmatch(name)
        if found:
            factors.setdefault(found["layer"], {})[found["side"]] = tensor
            adapters.add(found["adapter"])
        elif "lora_" in name or ".modules_to_save." in name or ".original_module." in name:
            raise FormatError(f"{_kind(name)}: '{key}' is not supported; merge it with peft (merge_and_unload) first")
        else:
            plain[name.replace(".base_layer.", ".")] = tensor
    if len(adapters) > 1:
        raise FormatError(f"the file holds several LoRA adapters ({', '.join(sorted(adapters))}); expected one")
    for layer, pair in factors.items():
        plain[f"{layer}.weight"] = _merged(layer, plain.get(f"{layer}.weight"), pair, alpha)
    return plain


def _merged(layer: str, weight: torch.Tensor | None, pair: Mapping[str, torch.Tensor], alpha: float) -> torch.Tensor:
    if weight is None or set(pair) != {"A", "B"}:
        lacking = [name for name in ("A", "B") if name not in pair]
        raise FormatError(f"LoRA: layer '{layer}' lacks {'its weight' if weight is None else 'lora_' + lacking[0]}")
    a, b = pair["A"].float(), pair["B"].float()
    conv1d = CONV1D_LAYERS.fullmatch(layer) is not None
    wanted = tuple(reversed(weight.shape)) if conv1d else tuple(weight.shape)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != wanted or not a.shape[0]:
        raise FormatError(
            f"LoRA: layer '{layer}' is {tuple(weight.shape)}; its factors A {tuple(a.shape)} and B {tuple(b.shape)} "
            f"do not fit it"
        )
    delta = (b @ a) * (alpha / a.shape[0])
    return weight.float() + (delta.T if conv1d else delta)


def _kind(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "DoRA"
    if "lora_embedding_" in name:
        return "LoRA of an embedding"
    return "LoRA of another kind" if "lora_" in name else "an adapter with modules_to_save"
