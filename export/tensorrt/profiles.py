"""Optimisation profiles, derived from the step spec: which sizes an engine takes, and which it is tuned for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rmt_trt.contract import SEGMENT, StepSpec
from rmt_trt.errors import EngineError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Shapes of an input: the smallest, the one that kernels are chosen for, and the largest."""

    least: Shape
    best: Shape
    most: Shape


def ranges(spec: StepSpec, max_batch: int) -> dict[str, Range]:
    """The range of every input, in the spec's order: batch 1 to `max_batch`, text 1 to S. Tuned for `max_batch` full
    segments: that is what a long document consists of."""
    size = spec.segment_length
    found = {
        state.input: Range((1, *state.shape), (max_batch, *state.shape), (max_batch, *state.shape))
        for state in spec.states
    }
    return {**found, SEGMENT: Range((1, 1), (max_batch, size), (max_batch, size))}


def add_profile(builder: Any, config: Any, wanted: dict[str, Range]) -> None:
    """Adds the one profile of a build. Errors: EngineError, with the library's words, when it is refused."""
    profile = builder.create_optimization_profile()
    try:
        for name, sizes in wanted.items():
            profile.set_shape(name, sizes.least, sizes.best, sizes.most)
        accepted = config.add_optimization_profile(profile) >= 0
    except (ValueError, RuntimeError) as err:
        raise EngineError(f"the sizes {wanted} were refused by the builder: {err}") from err
    if not accepted:
        raise EngineError(f"the sizes {wanted} were refused by the builder. Does the graph fit its step spec?")
