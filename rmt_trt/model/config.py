"""What a model is made of, apart from its weights: the backbone's config and where memory and special tokens go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rmt_trt.contract import Alignment, LogitsKind, StateSpec, StepSpec
from rmt_trt.errors import FormatError


@dataclass(frozen=True)
class ModelConfig:
    """A Recurrent Memory Transformer as published.

    form            "encoder": `[prefix] memory [middle] text [suffix]`, memory read and written in one place,
                    a sequence classifier. "decoder": `[memory | text | memory]`, causal, a language model.
    backbone        the Hugging Face config of the backbone, as plain JSON values, `model_type` included
    num_memory      M, the number of memory vectors
    segment_length  S, text tokens in a full segment
    vocab_size      ids of text tokens are below it
    prefix_ids      special tokens before the memory ([CLS]); form E only, like the next two
    middle_ids      special tokens between memory and text ([SEP])
    suffix_ids      special tokens behind the text ([SEP])
    pad_id          id that stands in for padding inside the step; hidden by the mask
    """

    form: str
    backbone: dict[str, Any]
    num_memory: int
    segment_length: int
    vocab_size: int
    width: int
    num_logits: int
    alignment: Alignment = "left"
    prefix_ids: tuple[int, ...] = ()
    middle_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    pad_id: int = 0
    dropped_ids: tuple[int, ...] = ()
    id2label: tuple[str, ...] = ()
    max_segments: int | None = None

    @property
    def num_special(self) -> int:
        """Special tokens that the step puts into each segment."""
        return len(self.prefix_ids) + len(self.middle_ids) + len(self.suffix_ids)

    @property
    def positions(self) -> int:
        """Positions that a full segment takes in the backbone: S + M + specials (E), S + 2M (D)."""
        memories = self.num_memory if self.form == "encoder" else 2 * self.num_memory
        return self.segment_length + memories + self.num_special

    def spec(self, fingerprint: str = "", state_dtype: str = "float32") -> StepSpec:
        """The step spec of this model. Errors: ContractError, when a number is out of bounds."""
        logits: LogitsKind = "classifier" if self.form == "encoder" else "lm"
        return StepSpec(
            form=self.form,
            states=(StateSpec(shape=(self.num_memory, self.width), dtype=state_dtype),),
            segment_length=self.segment_length,
            vocab_size=self.vocab_size,
            logits=logits,
            num_logits=self.num_logits,
            alignment=self.alignment,
            dropped_ids=self.dropped_ids,
            id2label=self.id2label,
            max_segments=self.max_segments,
            fingerprint=fingerprint,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `model.pt` and the manifest."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: object) -> ModelConfig:
        """Reads what `to_json` wrote. Errors: FormatError; bounds are checked by `spec` and by the backbone."""
        known = {f.name for f in fields(cls)}
        if not isinstance(value, Mapping) or not set(value) <= known:
            raise FormatError(f"model config is not a JSON object with the fields {sorted(known)}")
        data: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        try:
            config = cls(**data)
            config.spec()
        except TypeError as err:
            raise FormatError(f"model config is incomplete: {err}") from err
        if config.form not in ("encoder", "decoder") or not isinstance(config.backbone, dict):
            raise FormatError(f"model config has form {config.form!r}; expected 'encoder' or 'decoder' with a backbone")
        for name in ("prefix_ids", "middle_ids", "suffix_ids"):
            ids = getattr(config, name)
            if not isinstance(ids, tuple) or not all(type(token) is int for token in ids):
                raise FormatError(f"model config: {name} is {str(ids)[:80]!r}; expected a list of token ids")
        return config
