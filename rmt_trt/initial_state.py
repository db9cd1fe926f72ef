"""The first value of each state, as it travels: a safetensors file in the bundle, base64 of it in ONNX metadata."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError, FormatError

SPEC_KEY = "rmt_trt.spec"
INITIAL_KEY = "rmt_trt.initial_state"
HEADER_LIMIT = 1 << 20


def to_bytes(initial: Mapping[str, np.ndarray], spec: StepSpec) -> bytes:
    """safetensors bytes of the initial states, keyed by `StateSpec.initial`, each (*shape) in its state's dtype."""
    tensors = {}
    for state in spec.states:
        if state.initial not in initial:
            raise ContractError(f"initial state '{state.initial}' is missing; got {sorted(initial)}")
        value = np.ascontiguousarray(initial[state.initial], dtype=state.dtype)
        if value.shape != state.shape or not np.isfinite(value).all():
            raise ContractError(
                f"initial state '{state.initial}' is {value.shape}; expected {state.shape}, every value finite"
            )
        tensors[state.initial] = value
    return safetensors.numpy.save(tensors)


def from_bytes(data: bytes, spec: StepSpec, where: str) -> tuple[np.ndarray, ...]:
    """The initial states in the spec's order, each (*shape). Errors: FormatError, naming `where` they came from."""
    if len(data) > size_limit(spec):
        raise FormatError(f"{where}: {len(data)} bytes of initial state; the spec allows {size_limit(spec)}")
    try:
        tensors = safetensors.numpy.load(data)
    except (SafetensorError, KeyError, ValueError) as err:
        raise FormatError(
            f"{where}: the initial state is no readable safetensors file ({err}). Export the model again"
        ) from err
    values = []
    for state in spec.states:
        value = tensors.get(state.initial)
        if value is None or value.shape != state.shape or value.dtype != state.dtype or not np.isfinite(value).all():
            found = "missing" if value is None else f"{value.shape} {value.dtype}"
            raise FormatError(
                f"{where}: initial state '{state.initial}' is {found}; expected {state.shape} {state.dtype}, all finite. "
                f"Export the model again"
            )
        values.append(value)
    return tuple(values)


def size_limit(spec: StepSpec) -> int:
    """The most bytes that the spec's initial states can take in a safetensors file."""
    values = sum(int(np.prod(state.shape, dtype=object)) * np.dtype(state.dtype).itemsize for state in spec.states)
    return values + HEADER_LIMIT


def to_metadata(spec: StepSpec, initial: Mapping[str, np.ndarray]) -> dict[str, str]:
    """What an ONNX file says of itself, so that it runs without its bundle."""
    encoded = base64.b64encode(to_bytes(initial, spec)).decode()
    return {SPEC_KEY: json.dumps(spec.to_json(), sort_keys=True), INITIAL_KEY: encoded}


def spec_from_metadata(metadata: Mapping[str, str], where: str) -> StepSpec:
    """The step spec out of ONNX metadata. Errors: FormatError, naming `where` it stands."""
    if SPEC_KEY not in metadata or INITIAL_KEY not in metadata:
        raise FormatError(
            f"{where} carries no step spec in its metadata, so it was not written by rmt-export. "
            f"Export the model with rmt-export, or a step of your own with rmt_trt.export.export_step"
        )
    try:
        return StepSpec.from_json(json.loads(metadata[SPEC_KEY]))
    except (ValueError, RecursionError) as err:
        raise FormatError(
            f"{where}: the step spec in its metadata cannot be read ({err!s:.400}). Export the model again"
        ) from err


def from_metadata(metadata: Mapping[str, str], where: str) -> tuple[StepSpec, tuple[np.ndarray, ...]]:
    """Spec and initial states out of ONNX metadata. Errors: FormatError, naming `where` they came from."""
    spec = spec_from_metadata(metadata, where)
    try:
        data = base64.b64decode(metadata[INITIAL_KEY], validate=True)
    except ValueError as err:
        raise FormatError(
            f"{where}: the initial state in its metadata is no base64 ({err}). Export the model again"
        ) from err
    return spec, from_bytes(data, spec, where)
