"""The one thread in which a GPU engine makes all its calls, whoever calls the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Working(Protocol):
    """What has a thread of its own."""

    _worker: ThreadPoolExecutor


W = TypeVar("W", bound=Working)
P = ParamSpec("P")
R = TypeVar("R")


def on_worker(method: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[W, P], R]:
    """Runs a method on the object's own thread and waits for it: ONNX Runtime keeps captured graphs, and handles of CUDA's
    libraries, for each thread that calls it, until the session ends; a TensorRT context is for one thread at a time."""

    @functools.wraps(method)
    def call(self: W, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._worker.submit(method, self, *args, **kwargs).result()

    return call
