"""Checkpoints: `load_model` reads ours and the published ones, `save_model` writes ours.

`model.pt`, format version 1, is what `torch.save` makes of a dict of plain values and tensors; it is readable with
`weights_only=True` (docs/checkpoints.md lists its fields). Everything else is recognised by its keys in `published`.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.files import Stored, read_stored, state_dict_of
from rmt_trt.model.lora import has_lora
from rmt_trt.model.published import assemble, take_apart
from rmt_trt.model.settings import LoadOptions, gather
from rmt_trt.model.step import RMTModel, build_model, model_spec

MODEL_FORMAT = "rmt-trt-model"
MODEL_FORMAT_VERSION = 1
MAX_TOKENIZER_BYTES = 1 << 28


__all__ = ["LoadOptions", "LoadedModel", "check_tokenizer", "load_model", "read_tokenizer", "save_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with float32 weights, its spec with the weights' fingerprint, tokenizer.json's text."""

    model: RMTModel
    spec: StepSpec
    tokenizer: str | None


NO_OPTIONS = LoadOptions()


def load_model(path: Path | str, options: LoadOptions = NO_OPTIONS) -> LoadedModel:
    """Reads a checkpoint: `model.pt`, or one that the published RMT trainers wrote.

    Weights that are stored in half precision are read and held as float32.
    Errors: FormatError for a file that is no checkpoint, is damaged, is of a kind that is not supported, or does not
    fit its config; ContractError for options that are missing, senseless or out of bounds.
    """
    stored = read_stored(Path(path))
    if stored.value.get("format") == MODEL_FORMAT:
        return _load_own(stored.path, stored.value, options)
    return _load_published(stored, options)


def save_model(path: Path | str, model: RMTModel, tokenizer: str | None = None) -> None:
    """Writes `model.pt`. `tokenizer` is the text of tokenizer.json.

    The file appears whole or not at all: it is written beside its place, synced and renamed.
    Errors: ContractError, when the weights are not float32 or the tokenizer is no JSON text; OSError.
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
        "tokenizer": None if tokenizer is None else check_tokenizer(tokenizer, "the tokenizer"),
        "made_by": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    _write_atomically(Path(path), lambda file: torch.save(value, file))


def check_tokenizer(text: object, source: object) -> str:
    """The text of a tokenizer.json, once it is seen to be a JSON object. Errors: ContractError."""
    try:
        if not isinstance(text, str) or len(text) > MAX_TOKENIZER_BYTES or not isinstance(json.loads(text), dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as err:
        raise ContractError(
            f"{source} is not the text of a tokenizer.json ({err}); give the file that tokenizers wrote"
        ) from err
    return text


def read_tokenizer(path: Path) -> str:
    """The text of tokenizer.json, at `path` or in the folder `path`. Errors: ContractError."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ContractError(
                f"{file} has {file.stat().st_size} bytes; a tokenizer.json has at most {MAX_TOKENIZER_BYTES}"
            )
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ContractError(f"--tokenizer {file} cannot be read: {err}") from err
    return check_tokenizer(text, file)


def _load_own(file: Path, value: Mapping[str, Any], options: LoadOptions) -> LoadedModel:
    version = value.get("format_version")
    if version != MODEL_FORMAT_VERSION:
        raise FormatError(
            f"{file} has format version {version!r}; this rmt-trt reads version {MODEL_FORMAT_VERSION}. "
            f"Install the rmt-trt that wrote it, or a newer one"
        )
    useless = [
        name for name in ("config", "input_size", "segment_size", "lora_alpha") if getattr(options, name) is not None
    ]
    if useless:
        flags = ", ".join("--" + name.replace("_", "-") for name in useless)
        raise ContractError(f"{file} is a model.pt, which says for itself what {flags} would set; leave it out")
    for name, kind in (("spec", Mapping), ("model", Mapping), ("state_dict", Mapping), ("made_by", Mapping)):
        if not isinstance(value.get(name), kind):
            raise FormatError(
                f"{file}: '{name}' is {type(value.get(name)).__name__}; expected a dict. The file is damaged"
            )
    tensors = value["state_dict"]
    if (
        not all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in tensors.items())
        or "memory" not in tensors
    ):
        raise FormatError(
            f"{file}: 'state_dict' is not a dict of tensors with 'memory' among them. The file is damaged"
        )
    unknown = sorted(key for key in tensors if key != "memory" and not key.startswith("backbone."))
    if unknown:
        raise FormatError(f"{file}: 'state_dict' has unknown keys {unknown[:5]}; expected 'memory' and 'backbone.*'")
    config, spec = ModelConfig.from_json(value["model"]), StepSpec.from_json(value["spec"])
    if config.spec(spec.fingerprint) != spec:
        raise FormatError(
            f"{file}: its step spec and its model config disagree. The file is damaged, or was edited by hand"
        )
    model = build_model(config, dict(tensors))
    if model_spec(model).fingerprint != spec.fingerprint:
        raise FormatError(f"{file}: the weights are not those that its fingerprint was taken of. The file is damaged")
    model.config = with_options(config, options)
    tokenizer = value.get("tokenizer")
    text = read_tokenizer(options.tokenizer) if options.tokenizer is not None else tokenizer
    return LoadedModel(
        model, model_spec(model), None if text is None else check_tokenizer(text, f"{file}: 'tokenizer'")
    )


def _load_published(stored: Stored, options: LoadOptions) -> LoadedModel:
    try:
        parts = take_apart(state_dict_of(stored))
        settings = gather(stored, options, parts.form, has_lora(parts.backbone))
        config, weights = assemble(parts, settings)
    except FormatError as err:
        raise FormatError(f"{stored.path}: {err}") from err
    model = build_model(with_options(config, options), weights)
    place = options.tokenizer or stored.tokenizer
    return LoadedModel(model, model_spec(model), None if place is None else read_tokenizer(place))


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


def _write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes files that only their owner may read
        os.replace(name, path)
    except BaseException:  # Ctrl-C too: nothing half may stay
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    with contextlib.suppress(OSError):  # not every file system syncs a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
