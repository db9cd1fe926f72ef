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

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.files import write_file
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.files import names_of
from rmt_trt.model.lora import merge_lora
from rmt_trt.model.pretrained import Base, load_base, stored_weights
from rmt_trt.model.step import RMTModel, build_model

KEY = "rmt_trt_delta"
VERSION = 1
FIELDS = {"version", "backbone", "digest", "model", "lora_alpha"}
MAX_BYTES = 1 << 30
MAX_ALPHA = 1e6


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
    base = _base_of(path, about["backbone"], backbone)
    if base.digest != about["digest"]:
        raise FormatError(
            f"{path} belongs to weights of backbone {about['backbone']!r} with SHA-256 {str(about['digest'])[:16]}..., not to "
            f"those of {base.origin!r} ({base.digest[:16]}...). Give the folder of the weights that it was trained on"
        )
    try:
        return _assembled(
            ModelConfig.from_json(about["model"]), base, tensors, float(about["lora_alpha"])
        ), base.tokenizer
    except (FormatError, ContractError) as err:
        raise type(err)(f"{path}: {err}") from err


def _base_of(path: Path, named: str, backbone: str | None) -> Base:
    try:
        return load_base(backbone or named)
    except ContractError as err:
        if backbone is not None:
            raise
        raise ContractError(f"{path} was trained on a backbone that is not here: {err} (--config)") from err


def _assembled(config: ModelConfig, base: Base, tensors: Mapping[str, torch.Tensor], alpha: float) -> RMTModel:
    """The base's weights, what was trained in their place, LoRA's factors merged."""
    body, drawn = stored_weights(base, config.form, config.backbone)
    changed = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name != "memory"}
    factors = {name: tensor for name, tensor in changed.items() if ".lora_" in name}
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in changed.items() if name not in factors}
    if unknown := sorted(set(plain) - set(body) - drawn):
        raise FormatError(f"it changes {names_of(unknown)}, which its backbone does not have. The file is damaged")
    if lacking := sorted(drawn - set(plain)):
        raise FormatError(f"it lacks {names_of(lacking)}, and so do its backbone's files. The file is damaged")
    weights = merge_lora({**body, **plain, **factors}, alpha)
    return build_model(config, {"memory": tensors["memory"], **{f"backbone.{k}": v for k, v in weights.items()}})


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
    alpha, backbone = about["lora_alpha"], about["backbone"]
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA or not isinstance(backbone, str):
        raise FormatError(
            f"{path}: its metadata says lora_alpha {str(alpha)[:80]!r} and backbone {str(backbone)[:80]!r}; expected a number "
            f"above 0 and the name of a backbone. The file is damaged"
        )
    return about, tensors
