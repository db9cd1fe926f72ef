"""What a published checkpoint does not say for itself: from the caller's options, then from files beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmt_trt.contract import ALIGNMENTS, MAX_SEGMENT_LENGTH, Alignment
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.model.files import Stored, read_object


@dataclass(frozen=True)
class LoadOptions:
    """What a file may lack, or what to read otherwise than it says. Each field is a flag of `rmt-export`.

    config        backbone config.json, or a folder that holds one (--config)
    input_size    form E: positions of a full segment, memory and special tokens included, e.g. 512 (--input-size)
    segment_size  form D: text tokens of a full segment (--segment-size)
    alignment     which segment of a document may be short: "left", "right" or "center" (--alignment)
    tokenizer     tokenizer.json, or a folder that holds one (--tokenizer)
    lora_alpha    LoRA's alpha; an adapter is merged with the scale alpha / r (--lora-alpha)
    drop_ids      token ids that are taken out of a document before it is cut (--drop-ids)
    max_segments  segments that the model was trained on, a record (--max-segments)
    labels        names of the classes, in order (--labels)
    """

    config: Path | None = None
    input_size: int | None = None
    segment_size: int | None = None
    alignment: Alignment | None = None
    tokenizer: Path | None = None
    lora_alpha: float | None = None
    drop_ids: tuple[int, ...] | None = None
    max_segments: int | None = None
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.alignment not in (None, *ALIGNMENTS):
            raise ContractError(f"--alignment is {self.alignment!r}; expected one of {', '.join(ALIGNMENTS)}")
        for name in ("input_size", "segment_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SEGMENT_LENGTH:
                raise ContractError(f"{_flag(name)} is {value}; expected a whole number from 1 to {MAX_SEGMENT_LENGTH}")
        if self.lora_alpha is not None and not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ContractError(f"--lora-alpha is {self.lora_alpha}; expected a number above 0")


@dataclass(frozen=True)
class Settings:
    """Options and files taken together; what the form needs is there."""

    backbone: dict[str, Any]
    input_size: int | None
    segment_size: int | None
    alignment: Alignment | None
    lora_alpha: float | None
    max_segments: int | None
    num_mem_tokens: int | None

    def text_tokens(self, taken: int) -> int:
        """Text tokens of a full segment of form E, where memory and special tokens take `taken` positions."""
        length = (self.input_size or 0) - taken
        if length < 1:
            raise ContractError(
                f"input size {self.input_size} leaves no room for text: memory and special tokens take {taken} "
                f"positions. Give the size of a whole segment (--input-size), e.g. 512"
            )
        return length

    def labels(self, classes: int) -> tuple[str, ...]:
        """Names of the classes from the backbone's config, unless they are the placeholders LABEL_0, LABEL_1, ..."""
        names = self.backbone.get("id2label")
        if not isinstance(names, Mapping) or len(names) != classes:
            return ()
        listed = tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(classes))
        return () if all(name == f"LABEL_{i}" for i, name in enumerate(listed)) else listed


def gather(stored: Stored, options: LoadOptions, form: str, lora: bool) -> Settings:
    """Flags first, then the trainer's config.json (all its arguments) or the backbone's that lies with the weights.

    Errors: ContractError that lists everything that is missing with its flag, or that names a flag of the other form;
    FormatError for a file that cannot be read or says something impossible.
    """
    beside = {} if stored.config is None else read_object(stored.config)
    is_backbone = isinstance(beside.get("model_type"), str) and "model_cls" not in beside
    backbone, run = (beside, {}) if is_backbone else (None, beside)
    if options.config is not None:
        backbone = _backbone_config(options.config)
    _refuse_senseless(options, form, lora)
    if run.get("segment_ordering") not in (None, "regular"):
        raise FormatError(
            f"{stored.config}: segment_ordering {run['segment_ordering']!r} is not supported, only 'regular'"
        )
    alignment = run.get("segment_alignment")
    if alignment not in (None, *ALIGNMENTS):
        raise FormatError(
            f"{stored.config}: segment_alignment is {alignment!r}; expected one of {', '.join(ALIGNMENTS)}"
        )
    alpha = options.lora_alpha if options.lora_alpha is not None else run.get("lora_attn_alpha")
    if not lora or isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e9:
        alpha = None
    sizes = {name: getattr(options, name) or _number(run, name, stored) for name in ("input_size", "segment_size")}
    needed = {
        "config": backbone,
        ("input_size" if form == "encoder" else "segment_size"): None,
        "lora_alpha": alpha or not lora,
    }
    needed |= {name: value for name, value in sizes.items() if name in needed}
    missing = [name for name, value in needed.items() if not value]
    if missing or backbone is None:
        raise ContractError(_what_is_missing(stored, form, missing, run))
    return Settings(
        backbone=backbone,
        input_size=sizes["input_size"],
        segment_size=sizes["segment_size"],
        alignment=options.alignment or alignment,
        lora_alpha=alpha,
        max_segments=options.max_segments or _number(run, "max_n_segments", stored),
        num_mem_tokens=_number(run, "num_mem_tokens", stored),
    )


def _backbone_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ContractError(f"--config {path}: there is no such file, and no config.json in such a folder")
    value = read_object(file)
    if not isinstance(value.get("model_type"), str) or "model_cls" in value:
        raise ContractError(
            f"--config {file} is not the config.json of a Hugging Face model (it has no 'model_type'); give that of the "
            f"backbone, e.g. of bert-base-cased"
        )
    return value


def _refuse_senseless(options: LoadOptions, form: str, lora: bool) -> None:
    if form == "encoder" and options.segment_size is not None:
        raise ContractError("--segment-size is for form D (decoders); this file is of form E and takes --input-size")
    if form == "decoder" and options.input_size is not None:
        raise ContractError("--input-size is for form E (encoders); this file is of form D and takes --segment-size")
    if options.lora_alpha is not None and not lora:
        raise ContractError("--lora-alpha is given, but the file holds no LoRA adapter; leave it out")


def _what_is_missing(stored: Stored, form: str, missing: list[str], run: Mapping[str, Any]) -> str:
    origin = run.get("from_pretrained") or run.get("model_cfg")
    meaning = {
        "config": "backbone config: --config config.json (that of the Hugging Face backbone"
        + (f"; the run was trained from {str(origin)[:200]!r})" if origin else ")"),
        "input_size": "input size: --input-size N (positions of a full segment, memory and special tokens included; "
        "512 in the paper)",
        "segment_size": "segment size: --segment-size N (text tokens of a full segment, memory not counted)",
        "lora_alpha": "LoRA alpha: --lora-alpha X (the file holds LoRA factors, which are scaled by alpha / r)",
    }
    title = "form E, an encoder classifier" if form == "encoder" else "form D, a decoder language model"
    lines = "".join(f"\n  {meaning[name]}" for name in missing)
    return f"{stored.path} is an RMT checkpoint ({title}) that does not say everything. Give what is missing:{lines}"


def _number(run: Mapping[str, Any], name: str, stored: Stored) -> int | None:
    value = run.get(name)
    if value is None or value == -1:  # -1 means "as many as there are" in the trainers
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SEGMENT_LENGTH:
        raise FormatError(
            f"{stored.config}: {name} is {value!r}; expected a whole number from 1 to {MAX_SEGMENT_LENGTH}"
        )
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
