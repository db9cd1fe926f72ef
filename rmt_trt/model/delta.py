"""What a training with LoRA changed, by itself: small enough to keep, and the whole model again with its base.

A delta is a safetensors file. Its tensors are those that were trained, named as in the training model's state dict: LoRA
factors in float16, memory, head, norms and biases in float32. Its metadata, one JSON text under `rmt_trt_delta`, says
what it belongs to: the backbone by name and by the SHA-256 of its weights, the model config, LoRA's alpha.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rmt_trt.errors import FormatError
from rmt_trt.files import write_file
from rmt_trt.model.backbone import build_backbone
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.files import names_of
from rmt_trt.model.lora import merge_lora
from rmt_trt.model.pretrained import Base, backbone_of, load_base
from rmt_trt.model.step import RMTModel, build_model

KEY = "rmt_trt_delta"
VERSION = 1
FIELDS = {"version", "backbone", "digest", "model", "lora_alpha"}
MAX_BYTES = 1 << 30


def save_delta(path: Path, model: RMTModel, base: Base, lora_alpha: float) -> None:
    """Writes what was trained of a model with adapters. Errors: FormatError, when it cannot be written."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dtype = torch.float16 if ".lora_" in name else torch.float32
            tensors[name] = parameter.detach().cpu().to(dtype).contiguous()
    about = {
        "version": VERSION,
        "backbone": base.origin,
        "digest": base.digest,
        "model": model.config.to_json(),
        "lora_alpha": lora_alpha,
    }
    write_file(path, save(tensors, metadata={KEY: json.dumps(about)}))


def is_delta(path: Path) -> bool:
    """Whether a file says that it is a delta; false for whatever cannot be read."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_delta(path: Path, backbone: str | None = None) -> tuple[RMTModel, str | None]:
    """The whole model, adapters merged, and its tokenizer.json's text, from a delta and its base.

    `backbone` is the base's folder, where it is not found by the name that the delta gives. Errors: FormatError for a
    file that is no delta, is damaged or belongs to other weights; ContractError when the base is not at hand.
    """
    about, tensors = _read(path)
    base = load_base(backbone or about["backbone"])
    if base.digest != about["digest"]:
        raise FormatError(
            f"{path} belongs to weights of backbone {about['backbone']!r} with SHA-256 {str(about['digest'])[:16]}..., not to "
            f"those of {base.origin!r} ({base.digest[:16]}...). Give the folder of the weights that it was trained on"
        )
    config = ModelConfig.from_json(about["model"])
    body = dict(backbone_of(base, config.form, config.backbone).state_dict())
    known = set(build_backbone(config.form, config.backbone).state_dict())
    changed = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name != "memory"}
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in changed.items() if ".lora_" not in name}
    if unknown := sorted(set(plain) - known):
        raise FormatError(f"{path} changes {names_of(unknown)}, which its backbone does not have. The file is damaged")
    factors = {name: tensor for name, tensor in changed.items() if ".lora_" in name}
    weights = merge_lora({**body, **plain, **factors}, float(about["lora_alpha"]))
    whole = {"memory": tensors["memory"], **{f"backbone.{name}": tensor for name, tensor in weights.items()}}
    return build_model(config, whole), base.tokenizer


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FormatError(f"{path} does not exist; expected the delta.safetensors of an rmt-train run with --lora")
    if path.stat().st_size > MAX_BYTES:
        raise FormatError(f"{path} has {path.stat().st_size} bytes; a delta has at most {MAX_BYTES}")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 it is no mapping
    except (SafetensorError, ValueError, RecursionError) as err:
        raise FormatError(f"{path} cannot be read as safetensors: {err}") from err
    if not isinstance(about, dict) or set(about) != FIELDS or about["version"] != VERSION or "memory" not in tensors:
        raise FormatError(
            f"{path} is no delta of version {VERSION}; expected the delta.safetensors of an rmt-train run with --lora"
        )
    if type(about["lora_alpha"]) not in (int, float) or not isinstance(about["backbone"], str):
        raise FormatError(f"{path}: its metadata says lora_alpha {about['lora_alpha']!r}. The file is damaged")
    return about, tensors
