"""What stands where in a segment as the backbone sees it, and which part attends to which at each operation.

    encoder    [prefix] memory [middle] text [suffix]
    decoder    [read memory | text | write memory]

The text is noise, parts of facts and of the question. The operations are those that arXiv 2304.11062 shows maps of: a
fact is detected and written to the memory, the memory is kept while noise passes, and read when the question comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Span = tuple[int, int]
MEMORIES = ("memory", "read memory", "write memory")
SPECIAL = ("prefix", "middle", "suffix")


@dataclass(frozen=True)
class Region:
    """A run of positions, start <= position < stop, of one kind."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Operation:
    """An operation: in which kind of segment ("fact", "noise", "last") the rows attend to the columns."""

    name: str
    segment: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    meaning: str


OPERATIONS = (
    Operation("detect", "fact", ("noise",), ("fact",), "the text around a fact attends to it"),
    Operation("write", "fact", ("memory", "write memory"), ("fact",), "the memory that is written attends to a fact"),
    Operation(
        "retain", "noise", ("memory", "write memory"), MEMORIES,
        "behind the facts, in segments of noise alone, the memory that is written attends to memory",
    ),
    Operation(
        "read", "last", ("prefix", "question"), ("memory", "read memory"),
        "in the last segment the question, and special tokens in front, attend to memory",
    ),
)  # fmt: skip


class Layout(Protocol):
    """What of a model's config is read: see `rmt_trt.model.config.ModelConfig`."""

    @property
    def form(self) -> str: ...
    @property
    def num_memory(self) -> int: ...
    @property
    def prefix_ids(self) -> tuple[int, ...]: ...
    @property
    def middle_ids(self) -> tuple[int, ...]: ...
    @property
    def suffix_ids(self) -> tuple[int, ...]: ...


def clipped(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The parts of spans that lie in start <= token < stop, counted from `start`, in order."""
    parts = [(max(a, start) - start, min(b, stop) - start) for a, b in sorted(spans)]
    return [(a, b) for a, b in parts if a < b]


def regions(config: Layout, text: int, facts: Sequence[Span] = (), question: Sequence[Span] = ()) -> list[Region]:
    """The regions of a segment of `text` tokens in order, without gaps; spans are counted in its text."""
    marked = sorted([(a, b, "fact") for a, b in facts] + [(a, b, "question") for a, b in question])
    words: list[tuple[str, int]] = []
    here = 0
    for start, stop, name in marked:
        words += [("noise", start - here), (name, stop - start)]
        here = stop
    words.append(("noise", text - here))
    m = config.num_memory
    if config.form == "decoder":
        parts = [("read memory", m), *words, ("write memory", m)]
    else:
        parts = [
            ("prefix", len(config.prefix_ids)), ("memory", m), ("middle", len(config.middle_ids)), *words,
            ("suffix", len(config.suffix_ids)),
        ]  # fmt: skip
    found: list[Region] = []
    for name, size in parts:
        if size:
            start = found[-1].stop if found else 0
            found.append(Region(name, start, start + size))
    return found


def places(found: Sequence[Region], names: Sequence[str]) -> np.ndarray:
    """Positions (n,) int64 of the regions with these names."""
    runs = [np.arange(region.start, region.stop) for region in found if region.name in names]
    return np.concatenate(runs) if runs else np.empty(0, np.int64)


def rows_of(operation: Operation, found: Sequence[Region], causal: bool) -> np.ndarray:
    """Positions of the operation's rows; of a causal model those that see all of its columns, or are columns."""
    rows, columns = places(found, operation.rows), places(found, operation.columns)
    if causal and len(columns):
        rows = rows[(rows > columns.max()) | np.isin(rows, columns)]
    return rows


def share(maps: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Share of the attention of the rows that goes to the columns: maps (..., n, n), each row a sum of 1 -> (...)."""
    if not len(rows):
        return np.full(maps.shape[:-2], np.nan)
    found: np.ndarray = maps[..., rows, :][..., columns].sum(axis=-1, dtype=np.float64).mean(axis=-1)
    return found


def even(size: int, causal: bool) -> np.ndarray:
    """The map (n, n) of attention that is spread evenly over all positions that a row sees."""
    seen = np.tri(size) if causal else np.ones((size, size))
    return np.asarray(seen / seen.sum(axis=1, keepdims=True))


def shares_by_region(one: np.ndarray, rows: np.ndarray, found: Sequence[Region]) -> dict[str, float]:
    """Where the rows of a map (n, n) attend to, by name of region; they sum to 1."""
    return {
        name: float(share(one, rows, places(found, (name,)))) for name in dict.fromkeys(region.name for region in found)
    }
