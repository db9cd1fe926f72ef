"""Checkpoints: `load_model` reads ours and the published ones, `save_model` writes ours.

`model.pt`, format version 1, is what `torch.save` makes of a dict of plain values and tensors; it is readable with
`weights_only=True` (docs/checkpoints.md lists its fields). Everything else is recognised by its keys in `published`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.files import read_bounded
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.delta import is_delta, load_delta
from rmt_trt.model.files import Stored, names_of, read_stored, state_dict_of, write_value
from rmt_trt.model.lora import has_lora
from rmt_trt.model.published import assemble, take_apart
from rmt_trt.model.settings import LoadOptions, gather
from rmt_trt.model.step import RMTModel, build_model, model_spec

__all__ = ["LoadOptions", "LoadedModel", "load_model", "save_model"]

MODEL_FORMAT = "rmt-trt-model"
MODEL_FORMAT_VERSION = 1
MAX_TOKENIZER_BYTES = 1 << 28
NO_OPTIONS = LoadOptions()


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with float32 weights, its spec with the weights' fingerprint, tokenizer.json's text."""

    model: RMTModel
    spec: StepSpec
    tokenizer: str | None


def load_model(path: Path | str, options: LoadOptions = NO_OPTIONS) -> LoadedModel:
    """Reads a checkpoint: `model.pt`, a delta of `rmt-train --lora`, or one that the published RMT trainers wrote; a file, or
    a folder that holds one. A delta finds its backbone by name, or in the folder that `options.config` says.

    Weights that are stored in half precision are read and held as float32.
    Errors: FormatError for a file that is no checkpoint, is damaged, is of a kind that is not supported, or does not
    fit its config; ContractError for options that are missing, senseless or out of bounds.
    """
    if is_delta(Path(path)):
        return _load_delta(Path(path), options)
    stored = read_stored(Path(path))
    kind = stored.value.get("format")
    if isinstance(kind, str) and kind == MODEL_FORMAT:
        return _load_own(stored.path, stored.value, options)
    return _load_published(stored, options)


def save_model(path: Path | str, model: RMTModel, tokenizer: str | None = None) -> None:
    """Writes `model.pt`. `tokenizer` is the text of tokenizer.json.

    The file appears whole or not at all: it is written beside its place, synced and renamed.
    Errors: ContractError, when the weights are not float32 or the tokenizer is no JSON text; FormatError, when the
    file cannot be written.
    """
    tensors = _plain_tensors(model)
    wrong = sorted({str(t.dtype) for t in tensors.values() if t.is_floating_point() and t.dtype != torch.float32})
    if wrong:
        raise ContractError(
            f"model.pt holds float32 weights; this model has {', '.join(wrong)}. Call model.float() first"
        )
    value = {
        "format": MODEL_FORMAT,
        "format_version": MODEL_FORMAT_VERSION,
        "spec": model_spec(model).to_json(),
        "model": model.config.to_json(),
        "state_dict": tensors,
        "tokenizer": None if tokenizer is None else _check_tokenizer(tokenizer, "the tokenizer"),
        "made_by": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    write_value(Path(path), value)


def _load_own(file: Path, value: Mapping[str, Any], options: LoadOptions) -> LoadedModel:
    version = value.get("format_version")
    if type(version) is not int or version != MODEL_FORMAT_VERSION:
        raise FormatError(
            f"{file} has format version {str(version)[:40]!r}; this rmt-trt reads version {MODEL_FORMAT_VERSION}. "
            f"Install the rmt-trt that wrote it, or a newer one"
        )
    _refuse_set(file, "a model.pt", ("config", "input_size", "segment_size", "lora_alpha"), options)
    try:
        tensors, config, spec = _own_parts(value)
        model = build_model(config, tensors)
        check_sizes(model)
        if model_spec(model) != spec:
            raise FormatError("its weights are not those that its fingerprint was taken of")
        model.config = with_options(config, options)
        tokenizer = value.get("tokenizer")
        if tokenizer is not None:
            tokenizer = _check_tokenizer(tokenizer, "'tokenizer'")
    except (FormatError, ContractError) as err:
        raise type(err)(f"{file}: {err}") from err
    if options.tokenizer is not None:
        tokenizer = _read_tokenizer(options.tokenizer)
    return LoadedModel(model, model.config.spec(spec.fingerprint), tokenizer)


def _load_delta(file: Path, options: LoadOptions) -> LoadedModel:
    _refuse_set(file, "a delta", ("input_size", "segment_size", "lora_alpha"), options)
    base = None if options.config is None else str(options.config)
    model, tokenizer = load_delta(file, base)
    try:
        check_sizes(model)
    except (FormatError, ContractError) as err:
        raise type(err)(f"{file}: {err}") from err
    model.config = with_options(model.config, options)
    if options.tokenizer is not None:
        tokenizer = _read_tokenizer(options.tokenizer)
    elif tokenizer is not None:
        tokenizer = _check_tokenizer(tokenizer, "the tokenizer of its backbone")
    return LoadedModel(model, model_spec(model), tokenizer)


def _refuse_set(file: Path, kind: str, names: tuple[str, ...], options: LoadOptions) -> None:
    """Refuses flags for what a file says for itself."""
    if senseless := [name for name in names if getattr(options, name)]:
        flags = ", ".join("--" + name.replace("_", "-") for name in senseless)
        raise ContractError(f"{file} is {kind}, which says for itself what {flags} would set; leave it out")


def _own_parts(value: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], ModelConfig, StepSpec]:
    """State dict, config and spec, each well formed and agreeing with each other."""
    for name in ("spec", "model", "state_dict"):
        if not isinstance(value.get(name), dict):
            raise FormatError(f"'{name}' is {type(value.get(name)).__name__}; expected a dict. The file is damaged")
    tensors = value["state_dict"]
    for key, tensor in tensors.items():
        known = isinstance(key, str) and (key == "memory" or key.startswith("backbone."))
        if not known or not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            raise FormatError(
                f"'state_dict' holds {names_of([key])} ({getattr(tensor, 'dtype', type(tensor).__name__)}); expected "
                f"float32 tensors named 'memory' and 'backbone.*'"
            )
    if "memory" not in tensors:
        raise FormatError("'state_dict' lacks 'memory'. The file is damaged")
    try:  # the pickle may hold tensors where JSON values belong
        plain = json.loads(json.dumps({"spec": value["spec"], "model": value["model"]}))
    except (TypeError, ValueError, RecursionError) as err:
        raise FormatError(f"'spec' or 'model' holds more than JSON values ({err}). The file is damaged") from err
    config, spec = ModelConfig.from_json(plain["model"]), StepSpec.from_json(plain["spec"])
    if config.spec(spec.fingerprint) != spec:
        raise FormatError("its step spec and its model config disagree. The file is damaged, or was edited by hand")
    return tensors, config, spec


def check_sizes(model: RMTModel) -> None:
    """Refuses a config whose logits or token ids are not those of its weights."""
    config, backbone = model.config, model.backbone
    rows = len(backbone.get_input_embeddings().weight)  # type: ignore[operator]
    head: Any = backbone.config if config.form == "encoder" else backbone.get_output_embeddings()  # type: ignore[operator]
    logits = head.num_labels if config.form == "encoder" else len(head.weight)
    if logits != config.num_logits:
        raise FormatError(f"its config says {config.num_logits} logits; its weights give {logits}")
    for name in ("prefix_ids", "middle_ids", "suffix_ids"):
        ids = getattr(config, name)
        if not isinstance(ids, tuple) or not all(type(token) is int and 0 <= token < rows for token in ids):
            raise FormatError(f"its config's {name} are {str(ids)[:80]}; expected token ids below {rows}")
    if type(config.pad_id) is not int or not 0 <= config.pad_id < rows:
        raise FormatError(f"its config's pad_id is {str(config.pad_id)[:80]}; expected a token id below {rows}")


def _load_published(stored: Stored, options: LoadOptions) -> LoadedModel:
    try:
        parts = take_apart(state_dict_of(stored))
        settings = gather(stored, options, parts.form, has_lora(parts.backbone))
        config, weights = assemble(parts, settings)
        model = build_model(with_options(config, options), weights)
    except FormatError as err:
        raise FormatError(f"{stored.path}: {err}") from err
    place = options.tokenizer or stored.tokenizer
    return LoadedModel(model, model_spec(model), None if place is None else _read_tokenizer(place))


def with_options(config: ModelConfig, options: LoadOptions) -> ModelConfig:
    """The config with those options on top that every kind of checkpoint takes. Errors: ContractError."""
    changed = replace(
        config,
        alignment=config.alignment if options.alignment is None else options.alignment,
        dropped_ids=config.dropped_ids if options.drop_ids is None else tuple(options.drop_ids),
        id2label=config.id2label if options.labels is None else tuple(options.labels),
        max_segments=config.max_segments if options.max_segments is None else options.max_segments,
    )
    changed.spec()
    return changed


def _check_tokenizer(text: object, source: object) -> str:
    try:
        if not isinstance(text, str) or len(text) > MAX_TOKENIZER_BYTES or not isinstance(json.loads(text), dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as err:
        raise ContractError(f"{source} is not the text of a tokenizer.json ({err})") from err
    return text


def _read_tokenizer(path: Path) -> str:
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = read_bounded(file, MAX_TOKENIZER_BYTES, "a tokenizer.json").decode("utf-8")
    except UnicodeDecodeError as err:
        raise FormatError(f"{file} is not UTF-8 text ({err}); expected a tokenizer.json") from err
    return _check_tokenizer(text, file)


def _plain_tensors(model: RMTModel) -> dict[str, torch.Tensor]:
    """The state dict on the CPU, tied weights still one storage, no tensor a window of a larger storage."""
    seen: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen:
            plain = tensor.detach().cpu().contiguous()
            whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
            seen[place] = plain if whole else plain.clone()
        tensors[name] = seen[place]
    return tensors
