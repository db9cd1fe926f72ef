"""How tests spoil a bundle: its manifest is altered, its files replaced with the hashes put right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np

from rmt_trt import RMTRuntime
from rmt_trt.bundle import MANIFEST
from rmt_trt.files import sha256

DOCUMENT = np.arange(50) % 90 + 5


def copy_bundle(folder: Path) -> Path:
    """A bundle of a BERT that a test may spoil."""
    return Path(shutil.copytree(models.made("bert").bundle, folder / "model.rmt"))


def open_and_run(path: Path, tokens: Any = DOCUMENT) -> Any:
    with RMTRuntime(path, engine="cpu", threads=1) as runtime:
        return runtime.run(tokens)


def alter(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def put(bundle: Path, name: str, data: bytes) -> None:
    """Writes a file and states its size and hash, as a stranger would who knows the format."""
    (bundle / name).write_bytes(data)
    entry = {"size": len(data), "sha256": sha256(bundle / name)}
    alter(bundle, lambda m: m["files"].update({name: entry}))
