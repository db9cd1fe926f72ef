"""Figures of a memory along the segments of a document. Numpy only: the memories may come from any engine.

Of a memory X (M, d), M vectors x of d components, after a segment:

    previous     cosine of each vector with the same vector one segment earlier
    first        cosine with that after the first segment
    initial      cosine with that before the first segment
    norm         L2 norm of each vector
    change       |X - Y| / |Y| with Y one segment earlier, norms of Frobenius: one number for all vectors
    entropy      -sum p log p of each vector in nats, p_i = x_i^2 / sum x^2: how evenly its energy lies over the
                 components, from 0 (all in one) to log d (Coifman & Wickerhauser 1992, IEEE Trans. Inf. Theory 38(2),
                 p. 713, the Shannon entropy of a signal's normalised energies)
    entropy_share   the same as a share of log d
    effective_rank  exp(-sum p log p), p_i = s_i / sum s with s the singular values of X: from 1 to min(M, d) (Roy &
                 Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO, p. 606)

A cosine with a vector of zeros, and entropy and rank of zeros, are not numbers (nan).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rmt_trt.errors import ContractError

# What each figure is called where it is shown, in the order in which it is shown.
FIGURES = {
    "previous": "cosine with the memory one segment earlier",
    "first": "cosine with the memory after segment 1",
    "initial": "cosine with the initial memory",
    "norm": "L2 norm of a memory vector",
    "change": "relative change of the memory",
    "entropy": "entropy of a vector's normalised energies, nats",
    "entropy_share": "entropy as a share of log d",
    "effective_rank": "effective rank",
}


@dataclass(frozen=True, eq=False)
class Figures:
    """The figures of one memory. previous, first, initial, norms, entropies: float64 (M,), one per vector."""

    previous: np.ndarray
    first: np.ndarray
    initial: np.ndarray
    norms: np.ndarray
    entropies: np.ndarray
    change: float
    effective_rank: float
    width: int

    def summary(self) -> dict[str, float]:
        """One number for each name of `FIGURES`: means over the vectors."""
        nats = float(self.entropies.mean())
        return {
            "previous": float(self.previous.mean()),
            "first": float(self.first.mean()),
            "initial": float(self.initial.mean()),
            "norm": float(self.norms.mean()),
            "change": self.change,
            "entropy": nats,
            "entropy_share": nats / np.log(self.width) if self.width > 1 else float("nan"),
            "effective_rank": self.effective_rank,
        }


def figures(memory: np.ndarray, previous: np.ndarray, first: np.ndarray, initial: np.ndarray) -> Figures:
    """Of a memory (M, d), with those after the segment before, after the first segment, and before it, each (M, d)."""
    memory, previous, first, initial = (value.astype(np.float64) for value in (memory, previous, first, initial))
    return Figures(
        previous=cosine(memory, previous),
        first=cosine(memory, first),
        initial=cosine(memory, initial),
        norms=np.linalg.norm(memory, axis=1),
        entropies=entropy(memory**2),
        change=float(_quotient(_norm(memory - previous), _norm(previous))),
        effective_rank=float(np.exp(entropy(np.linalg.svd(memory, compute_uv=False)))),
        width=memory.shape[1],
    )


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a (M, d) with the same row of b: (M,); nan with a row of zeros."""
    return _quotient((a * b).sum(axis=1), np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def entropy(weights: np.ndarray) -> np.ndarray:
    """Entropy in nats of weights >= 0 along the last axis, made to sum to 1; nan where all are 0."""
    p = _quotient(weights, weights.sum(axis=-1, keepdims=True))
    found: np.ndarray = -np.where(p == 0, 0.0, p * np.log(np.where(p == 0, 1.0, p))).sum(axis=-1)
    return found


def _norm(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(matrix))


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below == 0, np.nan, np.divide(above, below))


class Trajectory:
    """One document's figures, segment by segment. It holds three memories, whatever the length."""

    def __init__(self, initial: np.ndarray) -> None:
        if initial.ndim != 2:
            raise ContractError(
                f"the model's first state has shape {initial.shape}; figures are made of a memory (M, d), M vectors of "
                f"width d"
            )
        self.figures: list[Figures] = []
        self.stops: list[int] = []
        self._initial = self._previous = self._first = initial

    def add(self, memory: np.ndarray, stop: int) -> None:
        """The memory (M, d) after the next segment, which ends before the token `stop`."""
        if not self.figures:
            self._first = memory
        self.figures.append(figures(memory, self._previous, self._first, self._initial))
        self.stops.append(stop)
        self._previous = memory

    def series(self) -> dict[str, np.ndarray]:
        """One array (segments,) float64 for each name of `FIGURES`."""
        rows = [one.summary() for one in self.figures]
        return {name: np.array([row[name] for row in rows]) for name in FIGURES}


class Followed(Protocol):
    """What of a stream's piece is read: see `rmt_trt.runtime.Piece`."""

    @property
    def row(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def memory(self) -> np.ndarray | None: ...


def follow(
    pieces: Iterable[Followed], initial: np.ndarray, on_segment: Callable[[int], None] | None = None
) -> list[Trajectory]:
    """The trajectories of a stream's documents, in their order. pieces: of `RMTRuntime.stream(..., memory=True)`.

    `on_segment` is told how many segments have been taken. Errors: ContractError, for a state that is no memory (M, d).
    """
    found: dict[int, Trajectory] = {}
    for done, piece in enumerate(pieces, 1):
        if piece.memory is None:
            raise ContractError("a piece has no memory; stream with memory=True")
        if piece.row not in found:
            found[piece.row] = Trajectory(initial)
        found[piece.row].add(piece.memory, piece.stop)
        if on_segment is not None:
            on_segment(done)
    return [found[row] for row in sorted(found)]
