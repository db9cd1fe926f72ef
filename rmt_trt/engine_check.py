"""Reading `engines/NAME.json`. It may be a stranger's file: no field of it is believed that was not checked here.

Engines allocate what a record says and step what its profiles allow, so its shapes are compared with the step spec that
it carries, and that with the bundle's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rmt_trt.contract import LOGITS, MAX_STATES, SEGMENT, StepSpec
from rmt_trt.engine_record import BUILT, HARDWARE, EngineRecord
from rmt_trt.errors import FormatError
from rmt_trt.files import read_json
from rmt_trt.initial_state import size_limit, spec_from_metadata

ANY = -1
# An engine by itself: what its states may take is not known before it is read.
RECORD_LIMIT = 64 << 20
FILE_LIMIT = 1 << 42
MAX_BATCH = 1 << 20
MAX_PROFILES = 16
MAX_NODES = 1 << 16
AGAIN = "Build the engine again with rmt-build"
# Engine -> the Python package that builds for it.
FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
HEADS = ("all", "none")
Axes = tuple[tuple[int, ...], ...]  # what each axis of a tensor may be
Tensors = dict[str, tuple[str, Axes]]  # name -> dtype and axes


def read_record(path: Path, spec: StepSpec | None = None) -> EngineRecord:
    """The record at `path`. spec: that of the bundle in which it stands, which must be its own.

    Errors: FormatError, naming what is wrong with it.
    """
    limit = RECORD_LIMIT if spec is None else RECORD_LIMIT + 2 * size_limit(spec)
    record = EngineRecord.from_json(read_json(path, limit, "the record of an engine, written by rmt-build"), str(path))
    for name, holds, expected in _rules(record):
        if not holds:
            raise FormatError(f"{path}: '{name}' is {getattr(record, name)!r:.80}; expected {expected}. {AGAIN}")
    own = spec_from_metadata(record.metadata, str(path))
    if spec is not None and own != spec:
        raise FormatError(
            f"{path} carries another step spec than the bundle: it is an engine of another model. {AGAIN}"
        )
    _check_tensors(record, own, path)
    for number, profile in enumerate(record.profiles, 1):
        _check_profile(profile, own, f"{path}: profile {number}")
    return record


def _rules(record: EngineRecord) -> Iterator[tuple[str, bool, str]]:
    """(field, whether it holds what it may, what that is)."""
    yield "engine", record.engine in FLAVOURS, _either(FLAVOURS)
    yield "flavour", record.flavour == FLAVOURS[record.engine], repr(FLAVOURS[record.engine])
    yield "dtype", record.dtype in BUILT, _either(BUILT)
    yield "role", record.role == "step", "'step'"
    yield "head", record.head in HEADS, _either(HEADS)
    yield (
        "file",
        _matches(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}\.engine", record.file),
        "a plain name that ends in .engine",
    )
    yield "size", 0 < record.size <= FILE_LIMIT, f"a number of bytes up to {FILE_LIMIT}"
    yield "sha256", _matches(r"[0-9a-f]{64}", record.sha256), "64 hexadecimal digits"
    yield "version", _matches(r"[0-9]{1,6}(\.[0-9]{1,6}){1,4}(\.?[a-z]{1,8}[0-9]{0,6})?", record.version), "a version"
    kinds = record.compute_capabilities
    known = 0 < len(kinds) == len(set(kinds)) <= 64 and all(10 <= value <= 999 for value in kinds)
    yield "compute_capabilities", known, "compute capabilities such as 89, each once"
    for name in ("os", "machine"):
        yield name, _matches(r"[A-Za-z0-9._-]{1,64}", getattr(record, name)), "a name as Python's `platform` gives it"
    hardware = HARDWARE if record.engine == "tensorrt" else HARDWARE[:1]
    yield "hardware_compatible", record.hardware_compatible in hardware, _either(hardware)
    yield "profiles", 0 < len(record.profiles) <= MAX_PROFILES, f"1 to {MAX_PROFILES} profiles"
    texts = all(isinstance(value, str) for value in record.metadata.values())
    yield "metadata", texts, "the step spec and the initial state as text"
    yield "decomposable", len(record.decomposable) <= MAX_NODES, f"at most {MAX_NODES} names"
    yield "seconds", math.isfinite(record.seconds) and record.seconds >= 0, "a time"


def tensors(spec: StepSpec, head: str) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of an engine of that head: by name, in order, the dtype and what each axis may be. The batch
    varies, a text has any length or S; sizes that a computation gives may be left open."""
    text = (ANY, spec.segment_length)
    inputs: Tensors = {}
    outputs: Tensors = {}
    for state in spec.states:
        inputs[state.input] = (state.dtype, ((ANY,), *((size,) for size in state.shape)))
        outputs[state.output] = (state.dtype, ((ANY,), *((size, ANY) for size in state.shape)))
    inputs[SEGMENT] = ("int64", ((ANY,), text))
    if head == "all":
        rows = (text,) if spec.logits == "lm" else ()
        outputs[LOGITS] = ("float32", ((ANY,), *rows, (spec.num_logits, ANY)))
    return inputs, outputs


def _check_tensors(record: EngineRecord, spec: StepSpec, path: Path) -> None:
    inputs, outputs = tensors(spec, record.head)
    for kind, found, wanted in (("inputs", record.inputs, inputs), ("outputs", record.outputs, outputs)):
        names = [table.get("name") for table in found[: MAX_STATES + 2]]
        if names != list(wanted):
            raise FormatError(
                f"{path}: the engine has the {kind} {names!r:.200}; its step spec says {list(wanted)}. {AGAIN}"
            )
        for table, (name, (dtype, axes)) in zip(found, wanted.items(), strict=True):
            shape = table.get("shape")
            if set(table) != {"name", "dtype", "shape"} or table["dtype"] != dtype or not _fits(shape, axes):
                expected = ", ".join(" or ".join(map(str, sizes)) for sizes in axes)
                raise FormatError(
                    f"{path}: '{name}' is {table.get('dtype')!r:.20} of shape {shape!r:.80}; its step spec says {dtype} of "
                    f"shape ({expected}), where {ANY} varies. {AGAIN}"
                )


def _check_profile(profile: dict[str, Any], spec: StepSpec, where: str) -> None:
    """A profile takes 1 to some number of documents, and segments of 1 to S tokens or of S alone."""
    if set(profile) != set(spec.inputs):
        raise FormatError(
            f"{where} is for {sorted(profile)!r:.200}; the engine has the inputs {list(spec.inputs)}. {AGAIN}"
        )
    shapes = {state.input: state.shape for state in spec.states}
    ranges = {name: _range(profile[name], len(shapes.get(name, (0,))) + 1, f"{where}, '{name}'") for name in profile}
    least, best, most = ranges[SEGMENT]
    size = spec.segment_length
    if least[0] != 1 or not 1 <= best[0] <= most[0] <= MAX_BATCH:
        raise FormatError(
            f"{where} takes {least[0]} to {most[0]} documents, tuned for {best[0]}; a runtime steps any number from 1 on. "
            f"{AGAIN}"
        )
    if least[1] not in (1, size) or most[1] != size or not least[1] <= best[1] <= size:
        raise FormatError(
            f"{where} takes segments of {least[1]} to {most[1]} tokens, tuned for {best[1]}; the model's have 1 to {size}. "
            f"{AGAIN}"
        )
    for name, shape in shapes.items():
        wanted = tuple((batch, *shape) for batch in (least[0], best[0], most[0]))
        if ranges[name] != wanted:
            raise FormatError(f"{where}, '{name}': its shapes are {ranges[name]}; expected {wanted}. {AGAIN}")


def _range(value: object, axes: int, where: str) -> tuple[tuple[int, ...], ...]:
    """`min`, `opt` and `max` of an input."""
    names = ("min", "opt", "max")
    if not isinstance(value, dict) or set(value) != set(names) or not all(_whole(value[n], axes) for n in names):
        raise FormatError(f"{where} is {value!r:.80}; expected min, opt and max with {axes} sizes each. {AGAIN}")
    return tuple(tuple(value[name]) for name in names)


def _fits(shape: object, axes: Axes) -> bool:
    return _whole(shape, len(axes)) and all(n in sizes for n, sizes in zip(shape, axes, strict=True))  # type: ignore[call-overload]


def _whole(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(item) is int for item in value)


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text, re.ASCII) is not None


def _either(values: Sequence[str] | dict[str, str]) -> str:
    return " or ".join(map(repr, values))
