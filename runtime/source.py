"""What a runtime is opened from: a bundle, an ONNX file by itself, or a checkpoint; recognised, never guessed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt import initial_state
from rmt_trt.bundle import MANIFEST, Bundle
from rmt_trt.contract import StepSpec
from rmt_trt.errors import EngineError, FormatError, require
from rmt_trt.files import checked_path

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Source:
    """kind: "bundle", "onnx" or "checkpoint". `initial` is in the spec's order, each (*shape)."""

    kind: str
    path: Path
    spec: StepSpec
    initial: tuple[np.ndarray, ...]
    tokenizer: str | None = None
    bundle: Bundle | None = None
    session: Any = None  # the ONNX Runtime session through which a lone graph was read
    model: Any = None  # a checkpoint's step, a torch.nn.Module


def open_source(path: Path | str) -> Source:
    """Errors: FormatError, when the path is none of the kinds or is damaged; EngineError, when a library is missing."""
    path = checked_path(path)
    try:
        path.stat()
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or err
        raise FormatError(
            f"{path} cannot be opened ({reason}); expected a bundle (NAME.rmt), an ONNX graph or a checkpoint (model.pt)"
        ) from err
    if path.is_dir() and (path.suffix == ".rmt" or os.path.lexists(path / MANIFEST)):
        bundle = Bundle(path)
        return Source("bundle", path, bundle.spec, bundle.initial(), bundle.tokenizer(), bundle)
    if path.suffix == ".onnx":
        return _lone_graph(path)
    if path.suffix in CHECKPOINT_SUFFIXES or path.is_dir():
        return _checkpoint(path)
    if path.suffix == ".engine":
        raise EngineError(
            f"{path} is a TensorRT engine; this version of rmt-trt cannot run one. Open the bundle instead"
        )
    raise FormatError(
        f"{path} is none of what a runtime opens: a bundle folder (NAME.rmt), an .onnx graph, or a checkpoint "
        f"({', '.join(CHECKPOINT_SUFFIXES)})"
    )


def _lone_graph(path: Path) -> Source:
    require("onnxruntime", "cpu", "an ONNX graph")
    from rmt_trt.runtime.engines.cpu import open_session

    session = open_session(path)
    spec, initial = initial_state.from_metadata(session.get_modelmeta().custom_metadata_map, str(path))
    return Source("onnx", path, spec, initial, session=session)


def _checkpoint(path: Path) -> Source:
    require("torch", "export", f"{path} is a checkpoint, which")
    require("transformers", "export", f"{path} is a checkpoint, which")
    from rmt_trt.model.checkpoint import load_model

    loaded = load_model(path)
    memory = loaded.model.memory.detach().numpy().astype(loaded.spec.states[0].dtype)
    return Source("checkpoint", path, loaded.spec, (memory,), loaded.tokenizer, model=loaded.model)
