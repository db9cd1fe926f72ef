"""A document's state: what is kept between two parts of it, in memory or on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from rmt_trt.contract import StepSpec
from rmt_trt.errors import FormatError
from rmt_trt.files import read_bounded, write_file
from rmt_trt.initial_state import HEADER_LIMIT, size_limit

FORMAT = "rmt-trt-state"
FORMAT_VERSION = "1"
PENDING = "pending"
LAST_LOGITS = "last_logits"
_RESERVED = (PENDING, LAST_LOGITS)


@dataclass(frozen=True)
class State:
    """A document up to a token: going on from it gives, bit for bit, what an uninterrupted run gives.

    states       the step's states after the last *full* segment, in the spec's order, each (*shape)
    pending      tokens behind that segment, int64 (fewer than a segment)
    position     tokens of the document so far, pending ones included, dropped ids not
    tokens_read  tokens taken from the callers' sources so far, dropped ids included: where to go on reading
    segments     full segments behind it
    last_logits  language model: the logits row of the last token before `pending`, which scores the next one
    loglik_sum   language model: sum of the log-likelihoods of the tokens before `pending`; None if never asked for
    fingerprint  of the model: another one refuses it
    """

    states: tuple[np.ndarray, ...]
    pending: np.ndarray
    position: int
    tokens_read: int
    segments: int
    last_logits: np.ndarray | None
    loglik_sum: float | None
    fingerprint: str

    @property
    def memory(self) -> np.ndarray:
        """The first state, which of an RMT is its memory, (M, d)."""
        return self.states[0]

    def save(self, path: Path | str) -> None:
        """Writes the state atomically as a safetensors file. Errors: FormatError."""
        tensors = {f"state.{index}": np.ascontiguousarray(value) for index, value in enumerate(self.states)}
        tensors[PENDING] = np.ascontiguousarray(self.pending, np.int64)
        if self.last_logits is not None:
            tensors[LAST_LOGITS] = np.ascontiguousarray(self.last_logits, np.float32)
        facts = {
            "position": self.position,
            "tokens_read": self.tokens_read,
            "segments": self.segments,
            "loglik_sum": None if self.loglik_sum is None else self.loglik_sum.hex(),
        }
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "facts": json.dumps(facts),
        }
        write_file(Path(path), safetensors.numpy.save(tensors, metadata))

    @classmethod
    def load(cls, path: Path | str, spec: StepSpec) -> State:
        """Reads a state for the model with this spec.

        Errors: FormatError, when the file is no state, is damaged, or was saved by another model.
        """
        path = Path(path)
        limit = size_limit(spec) + 8 * spec.segment_length + 4 * spec.num_logits + HEADER_LIMIT
        data = read_bounded(path, limit, "a saved state")
        try:
            tensors = safetensors.numpy.load(data)
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FormatError(f"{path} is a safetensors file, but no state saved by rmt-trt")
            if metadata.get("format_version") != FORMAT_VERSION:
                raise FormatError(
                    f"{path} has state format version {metadata.get('format_version')!r}; this rmt-trt reads {FORMAT_VERSION}"
                )
            facts = json.loads(metadata["facts"])
            total = facts["loglik_sum"]
            state = cls(
                states=tuple(tensors[f"state.{index}"] for index in range(len(spec.states))),
                pending=tensors[PENDING],
                position=facts["position"],
                tokens_read=facts["tokens_read"],
                segments=facts["segments"],
                last_logits=tensors.get(LAST_LOGITS),
                loglik_sum=None if total is None else float.fromhex(total),
                fingerprint=metadata["fingerprint"],
            )
        except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as err:
            if isinstance(err, FormatError):
                raise
            raise FormatError(f"{path} is no readable state ({err!r}); it was cut, altered, or is another file") from err
        state.check(spec, str(path))
        return state

    def check(self, spec: StepSpec, where: str) -> None:
        """Refuses a state that is not of the model with this spec, or that was altered. Errors: FormatError."""
        if self.fingerprint != spec.fingerprint:
            raise FormatError(
                f"{where} was saved by another model (fingerprint {self.fingerprint[:12]}..., this model has "
                f"{spec.fingerprint[:12]}...). A state fits the weights that made it only; start anew without it"
            )
        for value, wanted in zip(self.states, spec.states, strict=True):
            if value.shape != wanted.shape or value.dtype != wanted.dtype or not np.isfinite(value).all():
                raise FormatError(
                    f"{where}: state '{wanted.input}' is {value.shape} {value.dtype}; expected {wanted.shape} "
                    f"{wanted.dtype}, all finite"
                )
        numbers = (self.position, self.tokens_read, self.segments)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise FormatError(f"{where}: position, tokens_read, segments are {numbers}; expected whole numbers")
        pending = self.pending
        if (
            pending.dtype != np.int64
            or pending.ndim != 1
            or len(pending) >= spec.segment_length
            or len(pending) > self.position
            or (len(pending) and not 0 <= int(pending.min()) <= int(pending.max()) < spec.vocab_size)
        ):
            raise FormatError(
                f"{where}: pending tokens are {pending.shape} {pending.dtype}; expected fewer than {spec.segment_length} "
                f"ids of the vocabulary"
            )
        if self.last_logits is not None and self.last_logits.shape != (spec.num_logits,):
            raise FormatError(f"{where}: last logits are {self.last_logits.shape}; expected ({spec.num_logits},)")
