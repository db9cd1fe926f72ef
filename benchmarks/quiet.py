"""Libraries that print by themselves, autotuners above all, write into a file while a peer is opened."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARIES_LOG = "libraries.log"


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """While it is open, standard output and error of the process, C libraries and children included, are appended to
    `folder/libraries.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    for stream in streams:
        stream.flush()
    with open(folder / LIBRARIES_LOG, "ab") as log:
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            yield
        finally:
            for stream in streams:
                stream.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
