"""What a library of TensorRT says: one logger per flavour, for whoever builds, looks at or runs an engine."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

SHOWN = 3
_log = logging.getLogger(__name__)


@functools.cache
def logger(trt: Any) -> Any:
    """The one logger of a flavour in this process: the library keeps the first that it is given and ignores others.

    It has `capture()`, a context that collects the lines of errors.
    """

    class Lines(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.listening: list[list[str]] = []

        def log(self, severity: Any, message: str) -> None:
            text = " ".join(message.split())
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                for lines in tuple(self.listening):
                    lines.append(text)
            level = logging.DEBUG if severity == trt.ILogger.VERBOSE else logging.INFO  # errors reach the caller raised
            _log.log(level, "%s: %s", severity.name, text)

        @contextlib.contextmanager
        def capture(self) -> Iterator[list[str]]:
            lines: list[str] = []
            self.listening.append(lines)
            try:
                yield lines
            finally:
                self.listening[:] = [kept for kept in self.listening if kept is not lines]

    return Lines()


def one_line(lines: list[str]) -> str:
    """The library's own lines, the first few, without line breaks or repetitions."""
    kept = list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    more = f" (and {len(kept) - SHOWN} more)" if len(kept) > SHOWN else ""
    return " | ".join(kept[:SHOWN]) + more if kept else "it gives no reason"
