"""What a graph claims to take and give, compared with the spec before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmt_trt.contract import LOGITS, SEGMENT, Head, StepSpec
from rmt_trt.errors import FormatError
from rmt_trt.initial_state import SPEC_KEY, spec_from_metadata

# The output of head "loglik" beside the last row's logits: (batch, S) float32, at place t that of token t + 1.
LOGLIK = "loglik"
FREE = None  # an axis whose size is known when the graph is run
Shape = tuple[str, tuple[tuple[int | None, ...], ...]]  # ONNX Runtime's name of the type, and what each axis may be


def check_signature(session: Any, spec: StepSpec, path: Path, head: Head = "all", batch: int | None = FREE) -> None:
    """Compares a graph's inputs and outputs, those of its head too, and the spec that it carries, with the spec.

    Engines allocate what a graph says that it gives, so no size in it is believed: the batch is free, or what the session
    was told, a text has any length or S, and everything else is what the spec says.
    Errors: FormatError, naming what differs.
    """
    types = {"float32": "tensor(float)", "float16": "tensor(float16)"}
    text = (FREE, spec.segment_length)
    rows = (FREE,) if batch is FREE else (FREE, batch)
    inputs: dict[str, Shape] = {SEGMENT: ("tensor(int64)", (rows, text))}
    outputs: dict[str, Shape] = {}
    for state in spec.states:
        of_state = (types[state.dtype], (rows, *((FREE, size) for size in state.shape)))
        inputs[state.input] = outputs[state.output] = of_state
    if head != "none":
        places = (text,) if spec.logits == "lm" and head == "all" else ()
        outputs[LOGITS] = ("tensor(float)", (rows, *places, (spec.num_logits,)))
    if head == "loglik":
        outputs[LOGLIK] = ("tensor(float)", (rows, (spec.segment_length,)))
    for kind, values, wanted in (("input", session.get_inputs(), inputs), ("output", session.get_outputs(), outputs)):
        if sorted(value.name for value in values) != sorted(wanted):
            raise FormatError(
                f"{path}: the graph has the {kind}s {sorted(value.name for value in values)}; its spec says "
                f"{sorted(wanted)}. Export it again"
            )
        for value in values:
            _check_value(value, *wanted[value.name], path)
    metadata = session.get_modelmeta().custom_metadata_map
    if SPEC_KEY in metadata and spec_from_metadata(metadata, str(path)) != spec:
        raise FormatError(
            f"{path}: the graph carries another step spec than the bundle's manifest. Copy the bundle again"
        )


def _check_value(value: Any, dtype: str, axes: tuple[tuple[int | None, ...], ...], path: Path) -> None:
    shape = tuple(size if isinstance(size, int) else FREE for size in value.shape)
    fits = len(shape) == len(axes) and all(size in allowed for size, allowed in zip(shape, axes, strict=True))
    if value.type != dtype or not fits:
        wanted = ", ".join(" or ".join("any" if size is FREE else str(size) for size in allowed) for allowed in axes)
        raise FormatError(
            f"{path}: the graph's '{value.name}' is {value.type} of shape {tuple(value.shape)}; its spec says {dtype} of "
            f"shape ({wanted}). Export it again"
        )
