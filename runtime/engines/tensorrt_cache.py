"""Kernels that TensorRT-RTX compiled on this machine, kept from one process to the next.

A file per GPU, driver, version and engine in the user's cache folder. It is a cache: one that is damaged, or of another
machine, is ignored and replaced, and a run never fails for it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from rmt_trt.errors import FormatError
from rmt_trt.files import read_bounded, write_file
from rmt_trt.runtime.engines.tensorrt_versions import Library

LIMIT = 1 << 30
log = logging.getLogger(__name__)


def cache_path(*keys: str) -> Path | None:
    """The file for these keys, under `XDG_CACHE_HOME` or `~/.cache`; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    readable = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", key)[:40] for key in keys)
    exact = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
    return folder / "rmt-trt" / "tensorrt-rtx" / f"{readable}-{exact}.cache"


class KernelCache:
    """A runtime cache of TensorRT-RTX and its file. `config` uses it from here on."""

    def __init__(self, library: Library, config: Any, path: Path | None) -> None:
        self._path = path
        self._kept = b""
        self._cache = library.call("made no runtime cache", config.create_runtime_cache)
        self._read()
        library.call("takes no runtime cache", config.set_runtime_cache, self._cache)

    def save(self) -> None:
        """Writes the file anew where kernels were added."""
        if self._path is None:
            return
        try:
            made = bytes(self._cache.serialize() or b"")
            if made in (b"", self._kept):
                return
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(self._path, made)
            self._kept = made
        except (FormatError, OSError, RuntimeError) as err:
            log.warning("compiled kernels are not kept for the next start: %s", err)
            self._path = None

    def _read(self) -> None:
        if self._path is None or not os.path.lexists(self._path):
            return
        try:
            found = read_bounded(self._path, LIMIT, "a cache of compiled kernels")
            if self._cache.deserialize(found):
                self._kept = found
                return
            reason = "it is damaged, or of another GPU or driver"
        except (FormatError, RuntimeError) as err:
            reason = str(err)
        log.info("%s is not used, and replaced: %s", self._path, reason)
