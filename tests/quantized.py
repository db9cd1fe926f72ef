"""What the tests of quantized graphs share: ranges of small models, every kind of graph, and how near one is to fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from models import WIDTH, M, S, made

from rmt_trt import RMTRuntime
from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration import FP8, INT8, UINT8_INT8, CollectOptions, Kind, Ranges, Source, collect, static_graph
from rmt_trt.calibration.dynamic import dynamic_graph
from rmt_trt.calibration.weights import weights_graph
from rmt_trt.export.verify import relative_error
from rmt_trt.runtime.engines.cpu import open_session

STATIC: dict[str, Kind] = {
    "uint8 and int8": UINT8_INT8,
    "int8": INT8,
    "int8 in float16": replace(INT8, half=True),
    "fp8": FP8,
    "fp8 in float16": replace(FP8, half=True),
}
WITHOUT_DATA: dict[str, Callable[[Bundle, Path], GraphEntry]] = {
    "int8-dynamic": dynamic_graph,
    "int8-weights": lambda bundle, path: weights_graph(bundle, path, "int8-weights"),
    "int4-weights": lambda bundle, path: weights_graph(bundle, path, "int4-weights"),
}
# The largest relative error of the memory along a document, and the least share of the answers. What these models do is far
# below and above: their weights are such that a memory lost is an error of 1 and more.
BOUNDS = {
    "int8": (0.1, 0.9), "fp8": (0.2, 0.8), "int8-dynamic": (0.1, 0.9), "int8-weights": (0.05, 0.93), "int4-weights": (0.45, 0.55),
}  # fmt: skip


@functools.cache
def ranges_of(name: str) -> Ranges:
    """Ranges of a model of the catalogue, over two documents of its own."""
    documents = [made(name).document(length, seed) for seed, length in enumerate((7 * S + 3, 5 * S))]
    sources = [Source(f"document {number}", lambda ids=ids: ids) for number, ids in enumerate(documents)]  # type: ignore[misc]
    return collect(made(name).bundle, sources, CollectOptions(draws=2, threads=1))


def written(name: str, kind: str, path: Path) -> GraphEntry:
    """One graph of a model of the catalogue."""
    if kind in STATIC:
        return static_graph(made(name).bundle, ranges_of(name), path, STATIC[kind])
    return WITHOUT_DATA[kind](Bundle(made(name).bundle), path)


@functools.cache
def exact(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(memory, logits) after each of nine segments, one short, by the fp32 graph."""
    with made(name).open() as runtime:
        return _steps(runtime, name)


def check_near(name: str, path: Path, dtype: str) -> float:
    """The largest relative error of the memory over nine segments, which must be within BOUNDS, as must the answers."""
    with RMTRuntime(path, engine="cpu", threads=1) as runtime:
        found = _steps(runtime, name)
    wanted, (most, least) = exact(name), BOUNDS[dtype]
    worst = max(relative_error(memory, right) for (memory, _), (right, _) in zip(found, wanted, strict=True))
    same = [logits.argmax(-1) == right.argmax(-1) for (_, logits), (_, right) in zip(found, wanted, strict=True)]
    share = float(np.concatenate([np.atleast_1d(one) for one in same]).mean())
    assert worst <= most, f"the memory is off by {worst:.2f}"
    assert share >= least, f"{share:.0%} of the answers are those of fp32"
    return worst


def check_padding(name: str, path: Path) -> None:
    """A row of padding gives back its memory bit for bit beside rows of text, full and short, whose memory changes."""
    memory = np.random.default_rng(0).standard_normal((3, M, WIDTH)).astype(np.float32)
    segment = np.full((3, S), -1, np.int64)
    segment[0], segment[2, : S // 2] = made(name).document(S, 4), made(name).document(S // 2, 5)
    (new,) = open_session(path, 1).run(["new_memory"], {"memory": memory, "segment": segment})
    np.testing.assert_array_equal(new[1], memory[1])
    assert all(relative_error(new[row], memory[row]) > 0.1 for row in (0, 2))


def _steps(runtime: RMTRuntime, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    pieces: Any = runtime.stream(made(name).document(8 * S + 5, 9), memory=True)
    return [(piece.memory, piece.logits) for piece in pieces]
