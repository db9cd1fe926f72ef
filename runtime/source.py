"""What a runtime is opened from: a bundle, an ONNX file or an engine by itself, or a checkpoint; recognised, never guessed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt import initial_state
from rmt_trt.bundle import MANIFEST, Bundle
from rmt_trt.contract import StepSpec
from rmt_trt.engine_check import read_record
from rmt_trt.engine_record import EngineRecord
from rmt_trt.errors import FormatError, require
from rmt_trt.files import checked_path

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Source:
    """kind: "bundle", "onnx", "engine" or "checkpoint". `initial` is in the spec's order, each (*shape)."""

    kind: str
    path: Path
    spec: StepSpec
    initial: tuple[np.ndarray, ...]
    tokenizer: str | None = None
    bundle: Bundle | None = None
    session: Any = None  # the ONNX Runtime session through which a lone graph was read
    record: EngineRecord | None = None  # of a lone engine
    model: Any = None  # a checkpoint's step, a torch.nn.Module


def open_source(path: Path | str) -> Source:
    """Errors: FormatError, when the path is none of the kinds or is damaged; EngineError, when a library is missing."""
    path = checked_path(path)
    try:
        path.stat()
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or err
        raise FormatError(
            f"{path} cannot be opened ({reason}); expected a bundle (NAME.rmt), an ONNX graph, an engine (NAME.engine) or a "
            f"checkpoint (model.pt)"
        ) from err
    if path.is_dir() and (path.suffix == ".rmt" or os.path.lexists(path / MANIFEST)):
        bundle = Bundle(path)
        return Source("bundle", path, bundle.spec, bundle.initial(), bundle.tokenizer(), bundle)
    if path.suffix == ".onnx":
        return _lone_graph(path)
    if path.suffix == ".engine":
        return _lone_engine(path)
    if path.suffix in CHECKPOINT_SUFFIXES or path.is_dir():
        return _checkpoint(path)
    raise FormatError(
        f"{path} is none of what a runtime opens: a bundle folder (NAME.rmt), an .onnx graph, an .engine with its .json, or "
        f"a checkpoint ({', '.join(CHECKPOINT_SUFFIXES)})"
    )


def _lone_graph(path: Path) -> Source:
    require("onnxruntime", "cpu", "an ONNX graph")
    from rmt_trt.runtime.engines.cpu import open_session

    session = open_session(path)
    spec, initial = initial_state.from_metadata(session.get_modelmeta().custom_metadata_map, str(path))
    return Source("onnx", path, spec, initial, session=session)


def _lone_engine(path: Path) -> Source:
    beside = path.with_suffix(".json")
    if not path.is_file():
        raise FormatError(f"{path} is no file; expected an engine that rmt-build wrote")
    if not beside.is_file():
        raise FormatError(
            f"{path} has no {beside.name} beside it, which says what the engine needs and holds the model's step spec and "
            f"initial memory. Copy both files out of the bundle's engines/ folder, or open the bundle"
        )
    record = read_record(beside)
    spec, initial = initial_state.from_metadata(record.metadata, str(beside))
    return Source("engine", path, spec, initial, record=record)


def _checkpoint(path: Path) -> Source:
    require("torch", "export", f"{path} is a checkpoint, which")
    require("transformers", "export", f"{path} is a checkpoint, which")
    from rmt_trt.model.checkpoint import load_model

    loaded = load_model(path)
    memory = loaded.model.memory.detach().numpy().astype(loaded.spec.states[0].dtype)
    return Source("checkpoint", path, loaded.spec, (memory,), loaded.tokenizer, model=loaded.model)
