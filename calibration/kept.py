"""Work that was stopped: arrays in a file beside a key that says what work they are of."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rmt_trt.errors import FormatError
from rmt_trt.files import read_bounded, write_file

LIMIT = 4 << 30


def keep(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Errors: FormatError, when it cannot be written."""
    held = io.BytesIO()
    np.savez(held, key=np.array(key), **arrays)  # type: ignore[arg-type]
    write_file(path, held.getvalue())


def kept(path: Path, key: str, what: str) -> dict[str, np.ndarray]:
    """The arrays. what: the work, for messages. Errors: FormatError, for a file that is none of this work's."""
    data = read_bounded(path, LIMIT, f"the kept work of {what}")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        same = str(arrays.pop("key")) == key
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as err:
        raise FormatError(f"{path} is no kept work of {what} ({err!s:.200}). Remove it to begin anew") from err
    if not same:
        raise FormatError(
            f"{path} is kept work of {what} with another model, other ranges, documents or options. Remove it to begin anew, or "
            f"give what it was begun with"
        )
    return arrays
