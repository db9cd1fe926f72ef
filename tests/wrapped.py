"""An engine around an engine, for tests that watch or spoil what goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rmt_trt.contract import Answer, Engine, Head


class Wrapped:
    """Hands every call on. Subclasses change the calls that they are about."""

    def __init__(self, engine: Engine) -> None:
        self.inner, self.name, self.dtype = engine, engine.name, engine.dtype

    def load(self, states: tuple[np.ndarray, ...]) -> Any:
        return self.inner.load(states)

    def fetch(self, states: Any) -> tuple[np.ndarray, ...]:
        return self.inner.fetch(states)

    def share(self, states: Any) -> tuple[Any, ...]:
        return self.inner.share(states)

    def take(self, parts: Sequence[Any], rows: np.ndarray) -> Any:
        return self.inner.take(parts, rows)

    def step(self, states: Any, segment: np.ndarray, head: Head, host: bool = True) -> tuple[Any, Answer | None]:
        return self.inner.step(states, segment, head, host)

    def steps(self, states: Any, segments: np.ndarray) -> Any:
        return self.inner.steps(states, segments)

    def close(self) -> None:
        self.inner.close()
