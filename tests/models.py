"""Small models of every backbone, exported once per test session, and the check that compares runs with the recurrence.

The weights are random, and scaled so that resetting the memory changes the logits by far more than a tolerance:
a recurrence that loses its memory cannot pass. `test_parity.py` asserts that.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import once, session_folder

from rmt_trt import RMTRuntime, StepSpec
from rmt_trt.export import ExportOptions, Report, export_model
from rmt_trt.export.verify import Drift, Octave, random_document, relative_error
from rmt_trt.model.checkpoint import LoadedModel, load_model, save_model
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.recurrence import recurrence
from rmt_trt.model.step import RMTModel, build_model

M, S, WIDTH, VOCAB, CLASSES, POSITIONS = 4, 20, 32, 96, 5, 40
TOLERANCE = 1e-4
MEMORY_EFFECT = 0.01
EXAMPLE = Path(__file__).parent.parent / "examples/memorize/model.pt"
LENGTHS = (1, S - 1, S, S + 1, 3 * S, 3 * S + 7, 19 * S + 3)

_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TABLE = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS}
_GROUPED = {**_SIZES, **_TABLE, "num_key_value_heads": 2}
BACKBONES: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, **_TABLE, "pad_token_id": 0, "num_labels": CLASSES},
    "roberta": {**_SIZES, **_TABLE, "pad_token_id": 1, "num_labels": CLASSES},
    "distilbert": {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "num_labels": CLASSES, **_TABLE},
    "gpt2": {
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": POSITIONS,
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt_neox": {**_SIZES, **_TABLE, "rotary_pct": 0.25, "tie_word_embeddings": False},
    "llama": {**_GROUPED, "tie_word_embeddings": False},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
}
ENCODERS, DECODERS = ("bert", "roberta", "distilbert"), ("gpt2", "gpt_neox", "llama", "qwen2")
# [CLS], [SEP] and [PAD] as the tokenizers number them. RoBERTa's [CLS] and [SEP] inside a text are kept: `aaai24`.
SPECIAL = {
    "bert": {"cls": 2, "sep": 3, "pad": 0, "dropped": (0, 2, 3)},
    "roberta": {"cls": 0, "sep": 2, "pad": 1, "dropped": (1,)},
    "distilbert": {"cls": 2, "sep": 3, "pad": 0, "dropped": (0, 2, 3)},
}


@dataclass(frozen=True)
class Made:
    """A model, the checkpoint it was saved as, the bundle that was exported from that, and the export's report."""

    name: str
    model: RMTModel
    checkpoint: Path
    bundle: Path
    report: Report
    spec: StepSpec

    def open(self, **options: Any) -> RMTRuntime:
        """The bundle on the CPU engine, single-threaded: tiny models run slower on many threads."""
        return RMTRuntime(self.bundle, engine="cpu", threads=1, **options)

    def document(self, length: int, seed: int = 0) -> np.ndarray:
        """(length,) int64 ids, none of which is dropped."""
        return random_document(self.spec, length, seed)


def model_config(name: str, backbone: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """The config of a model of the catalogue, with some fields changed, and some of its backbone's."""
    backbone = {"model_type": name, **BACKBONES[name], **(backbone or {})}
    special = SPECIAL.get(name)
    fields: dict[str, Any] = {"form": "decoder", "num_logits": VOCAB, "alignment": "left"}
    if special is not None:
        fields = {
            "form": "encoder",
            "num_logits": CLASSES,
            "alignment": "right",
            "prefix_ids": (special["cls"],),
            "middle_ids": (special["sep"],),
            "suffix_ids": (special["sep"],),
            "pad_id": special["pad"],
            "dropped_ids": special["dropped"],
            "id2label": ("zero", "one", "two", "three", "four"),
        }
    sizes = {"num_memory": M, "segment_length": S, "vocab_size": VOCAB, "width": WIDTH}
    return ModelConfig(backbone=backbone, **{**sizes, **fields, **changes})


def make_model(name: str, seed: int = 0, scale: float | None = None, **changes: Any) -> RMTModel:
    """A random model. Matrices are four or five times, or `scale` times, what a fresh one has, so that the text and the
    memory matter."""
    torch.manual_seed(seed)
    model = build_model(model_config(name, **changes))
    times = scale or (5 if name in ENCODERS else 4)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.backbone.parameters()}.values():
            if parameter.ndim == 2:
                parameter.mul_(times)
        model.memory.normal_()
    return model


@functools.cache
def scratch() -> Path:
    """A folder of this process alone, removed when the session ends. What several processes may read is made by `once`."""
    return Path(tempfile.mkdtemp(dir=session_folder()))


@functools.cache
def made(name: str) -> Made:
    """A model of the catalogue, saved, loaded and exported: once per session, so nobody may change its files."""
    checkpoint = once(f"{name}.pt", lambda path: save_model(path, make_model(name)))
    loaded = load_model(checkpoint)

    def export(path: Path) -> None:
        report = export_model(loaded, path, ExportOptions(segments=4), source=checkpoint)
        once(f"{name}.json", lambda file: file.write_text(json.dumps(asdict(report)), encoding="utf-8"))

    bundle = once(f"{name}.rmt", export)
    report = json.loads(bundle.with_suffix(".json").read_text(encoding="utf-8"))
    rows = tuple(Drift(**row) for row in report["rows"])
    octaves = tuple(Octave(**octave) for octave in report["octaves"])
    read = Report(**{**report, "rows": rows, "octaves": octaves})
    return Made(name, loaded.model, checkpoint, bundle, read, loaded.spec)


@functools.cache
def split_bundle() -> Path:
    """GPT-2 with its weights in a file beside the graph, as a model above 2 GB has them; nobody may change it."""
    options = ExportOptions(segments=2, external_data_bytes=1 << 10)
    return once("split.rmt", lambda path: export_model(loaded("gpt2"), path, options))


@functools.cache
def example_bundle() -> Path:
    """The bundle of the trained example; nobody may change it."""
    return once("memorize.rmt", lambda path: export_model(load_model(EXAMPLE), path, ExportOptions(segments=4)))


@functools.cache
def reference(name: str, length: int, alignment: str, seed: int = 0) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(memory, logits) after every segment of `made(name).document(length, seed)`, by the plain recurrence."""
    this = made(name)
    steps = recurrence(this.model, this.document(length, seed).tolist(), alignment)
    return tuple((memory.numpy(), logits.numpy()) for memory, logits in steps)


def steps_of(runtime: RMTRuntime, tokens: Any, **options: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(memory, logits) after every segment of one document, by a runtime."""
    for piece in runtime.stream(tokens, memory=True, **options):
        yield piece.memory, piece.logits


def check_parity(
    found: Iterable[tuple[np.ndarray, np.ndarray]], wanted: Iterable[tuple[np.ndarray, np.ndarray]], where: str = ""
) -> float:
    """The largest relative L2 error of memory and logits over all segments.

    Raises AssertionError at the first segment where it is above TOLERANCE, and when the segments are not as many.
    """
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted), f"{where}: {len(found)} segments; the recurrence has {len(wanted)}"
    worst = 0.0
    for number, ((memory, logits), (memory_wanted, logits_wanted)) in enumerate(zip(found, wanted, strict=True), 1):
        shapes = (memory.shape, logits.shape), (memory_wanted.shape, logits_wanted.shape)
        assert shapes[0] == shapes[1], f"{where}: shapes {shapes[0]} after segment {number}; expected {shapes[1]}"
        errors = relative_error(memory, memory_wanted), relative_error(logits, logits_wanted)
        assert max(errors) <= TOLERANCE, f"{where}: memory, logits drift by {errors} after segment {number}"
        worst = max(worst, *errors)
    return worst


def loaded(name: str) -> LoadedModel:
    """A model of the catalogue as a checkpoint gives it."""
    return LoadedModel(made(name).model, made(name).spec, None)
