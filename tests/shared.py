"""Files that a test session makes once: the first of its processes that asks makes them, the others wait and read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import filelock

VARIABLE = "RMT_TESTS_FOLDER"


def open_session_folder() -> Callable[[], None]:
    """Makes the folder that the session's processes share; returns what removes it."""
    folder = os.environ[VARIABLE] = tempfile.mkdtemp(prefix="rmt-tests-")

    def remove() -> None:
        os.environ.pop(VARIABLE, None)
        shutil.rmtree(folder, ignore_errors=True)

    return remove


def session_folder() -> Path:
    """The folder that the session's processes share."""
    return Path(os.environ[VARIABLE])


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder `name` of this session, which `make(path)` writes if it is not there. Nobody may change it."""
    folder = session_folder()
    path = folder / name
    with filelock.FileLock(folder / f".{name}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as part:  # so that half of it is never taken for the whole
                make(Path(part) / name)
                (Path(part) / name).rename(path)
    return path
