"""Rows of documents in a GPU's memory: their states in, out, gathered and stepped, and the logits read that a step left.

What every GPU engine does the same way; what runs a step is its own. All is enqueued on the GPU's stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmt_trt.contract import LOGITS, PAD, Answer, Head, StepSpec
from rmt_trt.errors import EngineError
from rmt_trt.runtime.buckets import Bucket, Replay, States, advance, enter, leave, new_states, state_bytes
from rmt_trt.runtime.cuda import Gpu, one_line
from rmt_trt.runtime.loglik import reduced
from rmt_trt.runtime.signature import LOGLIK

Outputs = Mapping[str, tuple[Any, tuple[int, ...]]]
LOGIT_BYTES = 4


def load(gpu: Gpu, spec: StepSpec, states: tuple[np.ndarray, ...]) -> States:
    """Host arrays (batch, *shape) in memory of their own."""
    values = [np.ascontiguousarray(value, state.dtype) for value, state in zip(states, spec.states, strict=True)]
    return States(len(values[0]), tuple(gpu.to_device(values)))


def fetch(gpu: Gpu, spec: StepSpec, states: States) -> tuple[np.ndarray, ...]:
    """Host arrays (batch, *shape) that the caller owns."""
    shapes = [((states.batch, *state.shape), state.dtype) for state in spec.states]
    return tuple(gpu.to_host([(buffer, *shape) for buffer, shape in zip(states.buffers, shapes, strict=True)]))


def share(gpu: Gpu, spec: StepSpec, states: States) -> tuple[Any, ...]:
    """Arrays (batch, *shape) that speak DLPack, where they lie."""
    return tuple(
        gpu.array(buffer, (states.batch, *state.shape), state.dtype)
        for buffer, state in zip(states.buffers, spec.states, strict=True)
    )


def take(gpu: Gpu, spec: StepSpec, parts: Sequence[States], rows: np.ndarray) -> States:
    """Some rows, in the order of `rows`, counted through `parts` one after another."""
    origin = [(part, row) for part in parts for row in range(part.batch)]
    made = new_states(gpu, spec, len(rows))
    for place, part, first, count in _runs([origin[row] for row in rows.tolist()]):
        for source, target, size in zip(part.buffers, made.buffers, state_bytes(spec), strict=True):
            gpu.copy(source, target, count * size, first * size, place * size)
    return made


def through(
    gpu: Gpu, spec: StepSpec, bucket: Bucket, replay: Replay, states: States, segments: np.ndarray, library: str
) -> States:
    """The states after a step for each of the segments (n, batch, S), in memory of their own; waits for none of them.

    Errors: EngineError, naming the `library` that runs the steps.
    """
    enter(gpu, spec, bucket, states)
    try:
        advance(gpu, bucket, replay, segments)
    except EngineError:
        raise
    except Exception as err:  # what libraries raise shares no base class of its own
        raise EngineError(f"{library} failed in a step of {states.batch} documents: {one_line(err)}") from err
    return leave(gpu, spec, bucket, states.batch, len(segments))


def padded(spec: StepSpec, segment: np.ndarray) -> np.ndarray:
    """A segment (batch, s) as a block of one of full length: (1, batch, S)."""
    block = np.full((1, len(segment), spec.segment_length), PAD, np.int64)
    block[0, :, : segment.shape[1]] = segment
    return block


def answer(gpu: Gpu, spec: StepSpec, outputs: Outputs, segment: np.ndarray, head: Head, host: bool) -> Answer | None:
    """What a step through `segment` (batch, s) left in its outputs, for a head. host=False leaves rows on the device."""
    if head == "none":
        return None
    batch, length = segment.shape
    buffer, shape = outputs[LOGITS]
    whole = len(shape) == 3  # every row of a language model: such a graph has no other head
    if whole and head == "last":
        buffer, shape, whole = _last_rows(gpu, buffer, shape, segment), (batch, shape[2]), False
        if not host:
            return Answer(gpu.array(buffer, shape, np.float32))
    if not host and (head == "all" or not whole):
        rows = gpu.allocate(math.prod(shape) // shape[0] * batch * LOGIT_BYTES)
        gpu.copy(buffer, rows, rows.size)
        return Answer(gpu.array(rows, (batch, *shape[1:]), np.float32))
    wanted: list[tuple[Any, tuple[int, ...], Any]] = [(buffer, (batch, *shape[1:]), np.float32)]
    if LOGLIK in outputs:
        scored, places = outputs[LOGLIK]
        wanted.append((scored, (batch, *places[1:]), np.float32))
    rows, *scores = gpu.to_host(wanted)
    if whole:
        return reduced(rows[:, :length], segment, head, spec.logits)
    return Answer(rows, _shifted(scores[0], segment) if scores else None)


def _last_rows(gpu: Gpu, buffer: Any, shape: tuple[int, ...], segment: np.ndarray) -> Any:
    """The logits of each row's last text token out of those of all tokens, in memory of their own: (batch, v)."""
    size = shape[2] * LOGIT_BYTES
    rows = gpu.allocate(len(segment) * size)
    for row, count in enumerate((segment >= 0).sum(axis=1).tolist()):
        gpu.copy(buffer, rows, size, (row * shape[1] + max(count - 1, 0)) * size, row * size)
    return rows


def _runs(rows: list[tuple[States, int]]) -> list[tuple[int, States, int, int]]:
    """(place, part, first row, count) of rows that lie one behind another in one part, so that they are copied at once."""
    runs: list[tuple[int, States, int, int]] = []
    for place, (part, row) in enumerate(rows):
        if runs:
            start, last, first, count = runs[-1]
            if part is last and row == first + count:
                runs[-1] = (start, last, first, count + 1)
                continue
        runs.append((place, part, row, 1))
    return runs


def _shifted(scores: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """The graph scores token t + 1 at place t; the contract has each score at its own token."""
    out = np.full(segment.shape, np.nan)
    out[:, 1:] = scores[:, : segment.shape[1] - 1]
    out[segment < 0] = np.nan
    return out
