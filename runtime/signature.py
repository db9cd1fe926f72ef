"""What a graph claims to take and give, compared with the spec before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmt_trt.contract import LOGITS, SEGMENT, Head, StepSpec
from rmt_trt.errors import FormatError
from rmt_trt.initial_state import SPEC_KEY, spec_from_metadata

# The output of head "loglik" beside the last row's logits: (batch, S) float32, at place t that of token t + 1.
LOGLIK = "loglik"


def check_signature(session: Any, spec: StepSpec, path: Path, head: Head = "all") -> None:
    """Compares a graph's inputs and outputs, those of its head too, and the spec that it carries, with the spec.

    Errors: FormatError, naming what differs.
    """
    types = {"float32": "tensor(float)", "float16": "tensor(float16)"}
    wanted: dict[str, tuple[str, int, tuple[int, ...]]] = {SEGMENT: ("tensor(int64)", 2, ())}
    for state in spec.states:
        for name in (state.input, state.output):
            wanted[name] = (types[state.dtype], 1 + len(state.shape), state.shape)
    if head != "none":
        rank = 3 if spec.logits == "lm" and head == "all" else 2
        wanted[LOGITS] = ("tensor(float)", rank, (spec.num_logits,))
    if head == "loglik":
        wanted[LOGLIK] = ("tensor(float)", 2, (spec.segment_length,))
    found = {value.name: value for value in (*session.get_inputs(), *session.get_outputs())}
    if set(found) != set(wanted):
        raise FormatError(
            f"{path}: the graph has the inputs and outputs {sorted(found)}; its spec says {sorted(wanted)}. Export it again"
        )
    for name, (dtype, rank, trailing) in wanted.items():
        value = found[name]
        shape = tuple(value.shape)
        fixed = shape[len(shape) - len(trailing) :]
        fits = len(shape) == rank and all(
            isinstance(size, str) or size is None or size == want for size, want in zip(fixed, trailing, strict=True)
        )
        if value.type != dtype or not fits:
            raise FormatError(
                f"{path}: the graph's '{name}' is {value.type} of shape {shape}; its spec says {dtype} of rank {rank} "
                f"ending in {trailing}. Export it again"
            )
    metadata = session.get_modelmeta().custom_metadata_map
    if SPEC_KEY in metadata and spec_from_metadata(metadata, str(path)) != spec:
        raise FormatError(
            f"{path}: the graph carries another step spec than the bundle's manifest. Copy the bundle again"
        )
