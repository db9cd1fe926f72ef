"""Segment step -> one ONNX graph, with the names of the contract and its spec and initial state in the metadata."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rmt_trt.contract import BATCH_AXIS, LOGITS, SEGMENT, TEXT_AXIS, StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.export.recover import WEIGHTS_KEY, places_of
from rmt_trt.files import cannot_write, sync
from rmt_trt.initial_state import to_metadata
from rmt_trt.model.step import DecoderStep, EncoderStep, fingerprint

# Opset 20 runs in ONNX Runtime and is documented to be read by TensorRT 10, 11 and RTX, in fp32 and fp16. Opset 23
# has a standard Attention node, which TensorRT builders refuse in fp32 without being told to decompose it.
OPSET = 20
# A protobuf file ends at 2 GiB; the graph itself needs some of it.
EXTERNAL_DATA_BYTES = (1 << 31) - (16 << 20)
_ONNX_TYPES = {"float32": "FLOAT", "float16": "FLOAT16"}


def export_step(
    step: nn.Module,
    spec: StepSpec,
    path: Path | str,
    initial: Mapping[str, Any] | None = None,
    *,
    opset: int = OPSET,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> StepSpec:
    """Writes `step` as an ONNX graph with dynamic batch and text length (1 .. segment_length).

    step     forward(*states, segment) -> (*new states, logits) with the shapes of `spec`; ids below 0 in `segment`
             are padding at a row's end, and a row of padding gives back its states. A module of the user's own works.
    initial  first value of each state, keyed by `StateSpec.initial`, each (*shape); None reads the step's
             attributes of those names (`step.memory`)
    external_data_bytes  from this many bytes of weights on, they go into `path` + ".data"

    Returns the spec with the fingerprint of the weights in it, as it stands in the file's metadata.
    Errors: ContractError, when the step cannot be exported or its graph does not fit the spec; FormatError, when the
    file cannot be written.
    """
    values = initial_values(step, spec, initial)
    spec = spec.with_(fingerprint=fingerprint(step, {name: torch.as_tensor(value) for name, value in values.items()}))
    write_graph(step, spec, Path(path), values, opset=opset, external_data_bytes=external_data_bytes)
    return spec


def write_graph(
    step: nn.Module,
    spec: StepSpec,
    path: Path,
    initial: Mapping[str, np.ndarray],
    *,
    opset: int = OPSET,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    recoverable: bool = True,
) -> None:
    """Writes `step` under a spec that is whole already: also a step in half precision, whose fingerprint is that of
    the float32 one.

    recoverable  a published model's graph says where its weights stand: see `recover.py`
    Other options and errors: as `export_step`.
    """
    metadata = to_metadata(spec, initial)
    program = _export(step.eval(), spec, opset)
    _check_graph(program.model, spec)
    _forget_sources(program.model)
    initializers = program.model.graph.initializers.values()
    weights = {value.name: value.const_value for value in initializers if value.const_value is not None}
    if recoverable and isinstance(step, (EncoderStep, DecoderStep)):
        metadata[WEIGHTS_KEY] = places_of(step.state_dict(), weights)
    program.model.metadata_props.update(metadata)
    _save(program, path, external_data=sum(value.nbytes for value in weights.values()) >= external_data_bytes)


def _save(program: Any, path: Path, external_data: bool) -> None:
    """Writes graph and data file under their own names in a temporary folder, then renames them, the graph last."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
            graph = Path(folder) / path.name
            program.save(graph, external_data=external_data)
            for file in sorted(graph.parent.iterdir(), key=lambda file: file == graph):
                sync(file)
                os.replace(file, path.with_name(file.name))
    except OSError as err:
        raise cannot_write(path, err) from err


def initial_values(step: nn.Module, spec: StepSpec, initial: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """The first value of each state in its dtype, from `initial` or from the step's own attributes."""
    values = {}
    for state in spec.states:
        value = getattr(step, state.initial, None) if initial is None else initial.get(state.initial)
        if value is None:
            raise ContractError(
                f"the initial value of state '{state.initial}' is unknown: the step has no attribute of that name. "
                f"Pass initial={{'{state.initial}': array of shape {state.shape}}}"
            )
        try:
            value = value.detach().cpu().float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            values[state.initial] = value.astype(state.dtype)
        except (TypeError, ValueError) as err:
            raise ContractError(
                f"the initial value of state '{state.initial}' cannot be read as numbers ({err}); expected {state.shape} "
                f"{state.dtype}"
            ) from err
    return values


def _export(step: nn.Module, spec: StepSpec, opset: int) -> Any:
    """Traces with two rows and a text that is neither 1 nor S long: a size that is special would be frozen."""
    length = min(spec.segment_length, max(2, spec.segment_length // 2))
    device = next((parameter.device for parameter in step.parameters()), torch.device("cpu"))
    states = tuple(
        torch.zeros((2, *state.shape), dtype=getattr(torch, state.dtype), device=device) for state in spec.states
    )
    segment = torch.zeros((2, length), dtype=torch.int64, device=device)
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    text = torch.export.Dim(TEXT_AXIS, min=1, max=spec.segment_length) if spec.segment_length > 1 else None
    shapes: tuple[Any, ...] = (*({0: batch} for _ in states), {0: batch, 1: text} if text else {0: batch})
    for number, parameter in enumerate(inspect.signature(step.forward).parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL:  # torch.export counts what *inputs takes as one argument
            shapes = (*shapes[:number], shapes[number:])
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
                step,
                (*states, segment),
                dynamo=True,
                opset_version=opset,
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as err:  # torch.export and the exporter raise many kinds
        cause: BaseException = err
        while cause.__cause__ is not None:  # the exporter's own message is general advice
            cause = cause.__cause__
        detail = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__).rstrip(". ")
        raise ContractError(
            f"the step cannot be exported to ONNX by torch {torch.__version__}: {detail}. It must accept any batch and "
            f"1 to {spec.segment_length} text tokens, without branches on values"
        ) from err


def _check_graph(model: Any, spec: StepSpec) -> None:
    """Refuses a graph whose axes the exporter has frozen silently, or whose names or dtypes are not the spec's."""
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = [value.name for value in model.graph.outputs]
    if list(inputs) != list(spec.inputs) or outputs != list(spec.outputs):
        raise ContractError(
            f"the exported graph has inputs {list(inputs)} and outputs {outputs}; the spec says {list(spec.inputs)} and "
            f"{list(spec.outputs)}. Does the step return its new states and then its logits?"
        )
    for name, value in inputs.items():
        dynamic = (0, 1) if name == SEGMENT and spec.segment_length > 1 else (0,)
        frozen = [axis for axis in dynamic if isinstance(value.shape[axis], int)]
        if frozen:
            raise ContractError(
                f"the exporter froze axes {frozen} of '{name}' to {[value.shape[axis] for axis in frozen]}: the step branches on "
                f"its input's size. Make its code work for any batch and length"
            )
    wanted = [(state.output, state.shape, state.dtype) for state in spec.states]
    free = 1 if spec.logits == "classifier" else 2  # leading axes of the logits: batch, and the text's length
    for (name, shape, dtype), value in zip(
        [*wanted, (LOGITS, (spec.num_logits,), "float32")], model.graph.outputs, strict=True
    ):
        lead = free if name == LOGITS else 1
        axes = [BATCH_AXIS, TEXT_AXIS][:lead] + [str(size) for size in shape]
        given = tuple(value.shape)
        frozen = [axis for axis in given[: min(lead, 1 if spec.segment_length == 1 else 2)] if isinstance(axis, int)]
        if given[lead:] != shape or frozen or value.dtype.name != _ONNX_TYPES[dtype]:
            raise ContractError(
                f"the step gives '{name}' as ({', '.join(map(str, given))}) {value.dtype.name}; the spec says "
                f"({', '.join(axes)}) {dtype}. Does the step return its new states and then its logits?"
            )


def _forget_sources(model: Any) -> None:
    """Takes the stack traces off the nodes: they are a quarter of a small graph, and name this machine's folders."""
    for node in model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about packages that nothing here uses; what matters is raised or checked."""
    noisy = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            noisy.setLevel(level)
