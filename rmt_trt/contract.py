"""The contract: what a segment step is, said once.

    step(memory, segment) -> (new_memory, logits)

    memory, new_memory   (batch, *shape)   one pair per state; RMT has one, shape (m, d)
    segment              (batch, s)        int64, 1 <= s <= segment_length; ids below 0 are padding at a row's end
    logits               (batch, c)        kind "classifier": those of the last segment are the answer
                         (batch, s, v)     kind "lm": one row per text token; rows at padding mean nothing

A row that is padding from its first token on gives back its states unchanged. Special tokens and memory go in
inside the step. Export writes these names into the graph, engines bind them, the runtime drives them: all read
the `StepSpec`, none restates it. Standard library and numpy only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from rmt_trt.errors import ContractError

SPEC_VERSION = 1
SEGMENT = "segment"
LOGITS = "logits"
BATCH_AXIS, TEXT_AXIS = "batch", "text"  # of a graph's inputs, where it leaves their sizes open
PAD = -1

Alignment = Literal["left", "right", "center"]
LogitsKind = Literal["classifier", "lm"]
ALIGNMENTS: tuple[Alignment, ...] = ("left", "right", "center")
LOGITS_KINDS: tuple[LogitsKind, ...] = ("classifier", "lm")
FORMS = ("encoder", "decoder", "custom")
STATE_DTYPES = ("float32", "float16")
ENGINES = ("cpu", "cuda", "tensorrt", "tensorrt-rtx", "torch")
# fp32, fp16, bf16   what a step computes in, but for norms and the like where that is wiser
# int8, fp8           products of 8-bit weights and activations (fp8: E4M3), scales fixed by a calibration
# int8-dynamic        the same in int8, activations by what each step finds in them
# int8-weights, int4-weights   weights alone, by blocks; products in the step's own type
DTYPES = ("fp32", "fp16", "bf16", "int8", "fp8", "int8-dynamic", "int8-weights", "int4-weights")
QUANTIZED = DTYPES[3:]  # taken only where they are asked for
Head = Literal["none", "last", "all", "loglik"]
HEADS: tuple[Head, ...] = ("none", "last", "all", "loglik")

# A spec comes from a stranger's file: no number in it is believed beyond these.
MAX_SEGMENT_LENGTH = 1 << 20
MAX_VOCABULARY = 1 << 24
MAX_STATES = 1024
MAX_STATE_VALUES = 1 << 28
MAX_STATE_AXES = 8


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a step carries from segment to segment.

    `input` and `output` are the graph's names of it, `shape` is that of one document (no batch axis), and
    `initial` is the key of its first value in `initial_state.safetensors`.
    """

    input: str = "memory"
    output: str = "new_memory"
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    initial: str = "memory"

    def __post_init__(self) -> None:
        for name in ("input", "output", "initial"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value or value in (SEGMENT, LOGITS):
                raise ContractError(f"state {name} is {value!r}; expected a tensor name other than 'segment', 'logits'")
        shape = _whole_numbers(self.shape, f"shape of state '{self.input}'", 1, MAX_STATE_VALUES)
        if not 1 <= len(shape) <= MAX_STATE_AXES or math.prod(shape) > MAX_STATE_VALUES:
            raise ContractError(
                f"state '{self.input}' has shape {shape}; expected 1 to {MAX_STATE_AXES} axes and at most {MAX_STATE_VALUES} values"
            )
        if self.dtype not in STATE_DTYPES:
            raise ContractError(f"state '{self.input}' has dtype {self.dtype!r}; expected one of {STATE_DTYPES}")
        object.__setattr__(self, "shape", shape)


@dataclass(frozen=True)
class StepSpec:
    """Everything that the rooms need to know about a step. Frozen: a change makes another step.

    segment_length  S, the largest number of text tokens in a segment
    vocab_size      text ids are 0 .. vocab_size - 1
    logits          "classifier" or "lm"; `num_logits` is c or v
    alignment       which segment of a document may be short: "left" the last, "right" the first; "center" cuts
                    equal chunks
    dropped_ids     ids that are taken out of a document before it is cut (the special tokens of form E)
    id2label        names of the classes, or ()
    max_segments    how many segments the model was trained on: a record, never a limit
    fingerprint     SHA-256 of the weights and the initial state: a saved state fits one model only
    """

    form: str
    states: tuple[StateSpec, ...]
    segment_length: int
    vocab_size: int
    logits: LogitsKind
    num_logits: int
    alignment: Alignment = "left"
    dropped_ids: tuple[int, ...] = ()
    id2label: tuple[str, ...] = ()
    max_segments: int | None = None
    fingerprint: str = ""
    version: int = field(default=SPEC_VERSION)

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != SPEC_VERSION:
            raise ContractError(f"step spec has version {self.version!r}; this rmt-trt reads version {SPEC_VERSION}")
        _one_of(self.form, FORMS, "form")
        _one_of(self.logits, LOGITS_KINDS, "logits")
        _one_of(self.alignment, ALIGNMENTS, "alignment")
        _whole_numbers((self.segment_length,), "segment_length", 1, MAX_SEGMENT_LENGTH)
        _whole_numbers((self.vocab_size,), "vocab_size", 1, MAX_VOCABULARY)
        _whole_numbers((self.num_logits,), "num_logits", 1, MAX_VOCABULARY)
        if self.max_segments is not None:
            _whole_numbers((self.max_segments,), "max_segments", 1, 1 << 40)
        dropped = _whole_numbers(self.dropped_ids, "dropped_ids", 0, MAX_VOCABULARY)
        object.__setattr__(self, "dropped_ids", tuple(sorted(set(dropped))))
        if not isinstance(self.id2label, (tuple, list)) or not all(isinstance(label, str) for label in self.id2label):
            raise ContractError(f"id2label is {self.id2label!r}; expected the names of the classes in order, as text")
        object.__setattr__(self, "id2label", tuple(self.id2label))
        if not isinstance(self.fingerprint, str):
            raise ContractError(f"fingerprint is {self.fingerprint!r}; expected text, a SHA-256 in hexadecimal")
        if self.id2label and len(self.id2label) != self.num_logits:
            raise ContractError(f"id2label names {len(self.id2label)} classes; the step has {self.num_logits} logits")
        states = tuple(self.states)
        object.__setattr__(self, "states", states)
        if not 1 <= len(states) <= MAX_STATES:
            raise ContractError(f"step spec has {len(states)} states; expected 1 to {MAX_STATES}")
        if sum(math.prod(state.shape) for state in states) > MAX_STATE_VALUES:
            raise ContractError(
                f"step spec has states of more than {MAX_STATE_VALUES} values in all; no step carries that"
            )
        names = [name for state in states for name in (state.input, state.output)]
        if len(set(names)) != len(names) or len({state.initial for state in states}) != len(states):
            raise ContractError(f"step spec uses a tensor name twice: {names}; every state needs names of its own")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Graph inputs in order: the states, then the segment."""
        return (*(state.input for state in self.states), SEGMENT)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Graph outputs in order: the new states, then the logits."""
        return (*(state.output for state in self.states), LOGITS)

    def with_(self, **changes: Any) -> StepSpec:
        """A copy with some fields replaced, checked again."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest, the ONNX metadata and `model.pt`."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: object) -> StepSpec:
        """Reads what `to_json` wrote. Errors: ContractError, naming the field that is wrong, missing or unknown."""
        data = _known_fields(value, cls, "step spec")
        states = data.get("states")
        if not isinstance(states, list) or len(states) > MAX_STATES:
            raise ContractError(f"step spec: 'states' is {type(states).__name__}; expected a list of 1 to {MAX_STATES}")
        data["states"] = tuple(StateSpec(**_known_fields(state, StateSpec, "state")) for state in states)
        try:
            return cls(**data)
        except TypeError as err:
            raise ContractError(f"step spec is incomplete: {err}") from err


@dataclass(frozen=True, eq=False)
class Answer:
    """What a step says besides its states.

    rows    float32. Head "all": (batch, c), or (batch, s, v) with rows at padding that mean nothing. "last" and
            "loglik": (batch, c) or (batch, v), of each document's last text token
    scores  head "loglik": (batch, s), log-likelihood of each token given those before it in the segment, in nats; nan
            in the first column, whose token the previous segment's last row scores, and at padding
    """

    rows: Any
    scores: np.ndarray | None = None


class Engine(Protocol):
    """What runs a step. Engines hold no document's state: they map states in to states out.

    `States` are opaque to the driver: numpy arrays on a CPU, device buffers on a GPU, one per state of the spec,
    first axis batch. They are values: nothing that is called later changes them. An engine is called by one thread at
    a time.
    """

    name: str
    dtype: str

    @property
    def max_batch(self) -> int | None:
        """Documents that a step takes at most; None where that is up to memory."""

    def load(self, states: tuple[np.ndarray, ...]) -> Any:
        """Host arrays (batch, *shape) -> States."""

    def fetch(self, states: Any) -> tuple[np.ndarray, ...]:
        """States -> host arrays (batch, *shape) that the caller owns."""

    def share(self, states: Any) -> tuple[Any, ...]:
        """States -> arrays (batch, *shape) that speak DLPack, where they lie; they live as long as the caller keeps them."""

    def take(self, parts: Sequence[Any], rows: np.ndarray) -> Any:
        """The States of some rows, in the order of `rows` (int64), counted through `parts` one after another."""

    def step(self, states: Any, segment: np.ndarray, head: Head, host: bool = True) -> tuple[Any, Answer | None]:
        """One step. segment (batch, s) int64, 1 <= s <= S; None with head "none". host=False leaves the rows where they
        are computed, as arrays that speak DLPack."""

    def steps(self, states: Any, segments: np.ndarray) -> Any:
        """Steps through full segments (n, batch, S) int64 without a head; returns before a GPU is done with them."""

    def close(self) -> None:
        """Releases everything; called once."""


def _one_of(value: object, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise ContractError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _whole_numbers(values: object, name: str, low: int, high: int) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)):
        raise ContractError(f"{name} is {values!r}; expected whole numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ContractError(f"{name} holds {value!r}; expected a whole number from {low} to {high}")
    return tuple(values)


def _known_fields(value: object, cls: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ContractError(f"{what} is {type(value).__name__}; expected a JSON object")
    unknown = sorted(set(value) - set(cls.__dataclass_fields__))
    if unknown:
        raise ContractError(f"{what} has unknown fields {unknown}; was it written by a newer rmt-trt?")
    return dict(value)
