"""Turns: what several threads take from one iterator, one after another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rmt_trt.errors import ContractError


class Turns:
    """Lets threads into a piece of work one at a time, and none in twice: a generator that runs cannot be asked again.

    what: names the iterator in messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.RLock()
        self._taken = False

    @contextmanager
    def take(self) -> Iterator[None]:
        """Waits for the turn. Errors: ContractError, when this thread has it already."""
        with self._lock:
            if self._taken:
                raise ContractError(
                    f"{self._what} was asked for more while it works on an answer: by one of its own documents or "
                    f"callbacks. Ask for the next one outside of them"
                )
            self._taken = True
            try:
                yield
            finally:
                self._taken = False
