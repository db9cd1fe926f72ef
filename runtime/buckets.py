"""Buckets: the memory in which a GPU engine steps so many documents, and the way of tokens into it.

Per bucket of documents (1, 2, 4, ...) there are two memories A and B of every state, a place for a segment's tokens beside
each, and two stages of page-locked memory. A step reads A and writes B, the next reads B and writes A; tokens are staged a
block ahead on a stream of their own, and two steps take theirs by one small copy on the device. Engines bring what runs
a step: a `Replay`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rmt_trt.contract import PAD, StepSpec
from rmt_trt.runtime.cuda import ALIGNMENT, Gpu

STAGED = 64  # segments that are staged together at most
STAGED_BYTES = 4 << 20
TOKEN_BYTES = 8


class Replay(Protocol):
    """One graph on one bucket's memory. `outputs`: where its outputs beside the states lie, with their shapes."""

    outputs: dict[str, tuple[Any, tuple[int, ...]]]

    def run(self, side: int) -> None:
        """Enqueues a step: from A to B (side 0), or from B to A (side 1)."""


@dataclass(eq=False)
class States:
    """Rows of every state in device memory of their own: (batch, *shape) each. Nobody writes them again."""

    batch: int
    buffers: tuple[Any, ...]


@dataclass(eq=False)
class Stage:
    """Tokens of a block on their way: page-locked, then on the device. `copied` and `used` guard both.

    host   (segments, batch, S) int64, the page-locked memory
    pairs  two segments each, on the device
    """

    pinned: Any
    host: np.ndarray
    device: Any
    pairs: list[Any]
    copied: Any
    used: Any


@dataclass(eq=False)
class Bucket:
    """Memory of so many documents: A and B of every state, two segments' tokens, two stages; replays by their graph.

    tokens  of the step from A and of the one from B; `both` is where they lie, one behind the other
    """

    size: int
    sides: tuple[tuple[Any, ...], tuple[Any, ...]]
    tokens: tuple[Any, Any]
    both: Any
    stages: tuple[Stage, Stage]
    turn: int = 0
    replays: dict[Any, Replay] = field(default_factory=dict)


def state_bytes(spec: StepSpec) -> list[int]:
    """Bytes of one document's states, in the spec's order."""
    return [math.prod(state.shape) * np.dtype(state.dtype).itemsize for state in spec.states]


def new_bucket(gpu: Gpu, spec: StepSpec, size: int) -> Bucket:
    a, b = (tuple(gpu.zeros(size * nbytes) for nbytes in state_bytes(spec)) for _ in "AB")
    each = _token_bytes(spec, size)
    staged = max(2, min(STAGED, STAGED_BYTES // each) // 2 * 2)  # even, so that every block begins on side A
    both = gpu.zeros(2 * each)
    tokens = (gpu.part(both, 0, each), gpu.part(both, each, each))
    return Bucket(size, (a, b), tokens, both, (_stage(gpu, spec, size, staged), _stage(gpu, spec, size, staged)))


def _token_bytes(spec: StepSpec, size: int) -> int:
    """From one segment's tokens to the next one's: each lies where an engine may read it."""
    return -(-size * spec.segment_length * TOKEN_BYTES // ALIGNMENT) * ALIGNMENT


def _stage(gpu: Gpu, spec: StepSpec, size: int, staged: int) -> Stage:
    each, count = _token_bytes(spec, size), size * spec.segment_length
    pinned, whole = gpu.pinned((staged, each // TOKEN_BYTES), np.int64)
    whole[...] = 0
    device = gpu.zeros(whole.nbytes)
    pairs = [gpu.part(device, number * 2 * each, 2 * each) for number in range(staged // 2)]
    host = whole[:, :count].reshape(staged, size, spec.segment_length)
    stage = Stage(pinned, host, device, pairs, gpu.event(), gpu.event())
    gpu.copies.record(stage.copied)
    gpu.stream.record(stage.used)
    return stage


def enter(gpu: Gpu, spec: StepSpec, bucket: Bucket, states: States) -> None:
    """States into A."""
    for source, target, size in zip(states.buffers, bucket.sides[0], state_bytes(spec), strict=True):
        gpu.copy(source, target, states.batch * size)


def leave(gpu: Gpu, spec: StepSpec, bucket: Bucket, batch: int, steps: int) -> States:
    """The states of the first `batch` rows after so many steps from A."""
    made = new_states(gpu, spec, batch)
    for source, target, size in zip(bucket.sides[steps % 2], made.buffers, state_bytes(spec), strict=True):
        gpu.copy(source, target, batch * size)
    return made


def new_states(gpu: Gpu, spec: StepSpec, batch: int) -> States:
    return States(batch, tuple(gpu.allocate(batch * size) for size in state_bytes(spec)))


def advance(gpu: Gpu, bucket: Bucket, replay: Replay, segments: np.ndarray) -> None:
    """Enqueues a step from A on for each of the segments (n, batch, S), and waits for none of them.

    Rows that fill the bucket up are text where all rows are full, since a graph for full rows takes no padding.
    """
    filler = 0 if segments.min(initial=0) >= 0 else PAD
    staged = len(bucket.stages[0].host)
    for start in range(0, len(segments), staged):
        block = segments[start : start + staged]
        stage = bucket.stages[bucket.turn]
        bucket.turn = 1 - bucket.turn
        stage.copied.sync()  # from here on the page-locked memory is free again
        stage.host[: len(block), : block.shape[1]] = block
        stage.host[: len(block), block.shape[1] :] = filler
        gpu.copies.wait(stage.used)
        nbytes = len(block) * bucket.tokens[0].size
        gpu.part(stage.pinned, 0, nbytes).copy_to(gpu.part(stage.device, 0, nbytes), stream=gpu.copies)
        gpu.copies.record(stage.copied)
        gpu.stream.wait(stage.copied)
        try:
            for number in range(len(block)):
                if number % 2 == 0:
                    stage.pairs[number // 2].copy_to(bucket.both, stream=gpu.stream)
                replay.run(number % 2)
        finally:  # steps that were enqueued before one failed still read their tokens
            gpu.stream.record(stage.used)
