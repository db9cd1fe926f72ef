"""LoRA through peft, and back: adapters are merged for export, or kept by themselves as a delta."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from rmt_trt.errors import require
from rmt_trt.model.lora import has_lora, merge_lora
from rmt_trt.model.step import EncoderStep, RMTModel, build_model


def add_lora(model: RMTModel, rank: int, alpha: float, drawn: Collection[str] = ()) -> None:
    """Puts LoRA factors round every linear layer of the backbone's body, and trains these, the memory, a classifier's head,
    norms and biases; embeddings, the layers' own matrices and a language model's head stand still.

    Errors: EngineError, without peft.

    Weights that were `drawn`, since the backbone's files have none for them, are trained themselves.
    """
    peft = require("peft", "train", "LoRA")
    body = f"{model.backbone.base_model_prefix}."
    linear = {
        name: module
        for name, module in model.backbone.named_modules()
        if name.startswith(body)
        and f"{name}.weight" not in drawn
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }
    transposed = any(not isinstance(module, nn.Linear) for module in linear.values())  # GPT-2's, and all of them
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(linear), fan_in_fan_out=transposed)
    peft.inject_adapter_in_model(config, model.backbone)
    for name, parameter in model.backbone.named_parameters():
        # A language model's head may hold more weights than all that is trained: it is the vocabulary's, not the task's.
        whole = name in drawn or (isinstance(model, EncoderStep) and not name.startswith(body))
        parameter.requires_grad_(whole or parameter.ndim < 2 or "lora_" in name)
    model.memory.requires_grad_(True)


def plain(model: RMTModel, alpha: float) -> RMTModel:
    """The model as it is exported, in evaluation mode on the CPU: adapters merged; without any, a copy of it."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return merged(model, weights, alpha)


def merged(model: RMTModel, weights: dict[str, torch.Tensor], alpha: float) -> RMTModel:
    """A plain model of these weights, which may hold adapters."""
    body = {name.removeprefix("backbone."): t for name, t in weights.items() if name.startswith("backbone.")}
    if has_lora(body):
        body = merge_lora(body, alpha)
    whole = {"memory": weights["memory"], **{f"backbone.{name}": tensor for name, tensor in body.items()}}
    return build_model(model.config, whole)
