"""A document's state: what is kept between two parts of it, in memory or on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from rmt_trt.contract import StepSpec
from rmt_trt.errors import FormatError
from rmt_trt.files import checked_path, read_bounded, write_file
from rmt_trt.initial_state import HEADER_LIMIT, size_limit

FORMAT = "rmt-trt-state"
FORMAT_VERSION = "1"
PENDING = "pending"
LAST_LOGITS = "last_logits"


@dataclass(frozen=True, eq=False)
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
        write_file(checked_path(path), safetensors.numpy.save(tensors, metadata))

    @classmethod
    def load(cls, path: Path | str, spec: StepSpec) -> State:
        """Reads a state for the model with this spec.

        Errors: FormatError, when the file is no state, is damaged, or was saved by another model.
        """
        path = checked_path(path)
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
                    f"{path} has state format version {metadata.get('format_version')!r}; this rmt-trt reads {FORMAT_VERSION}. "
                    f"Update rmt-trt, or start the document anew"
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
        except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, RecursionError) as err:
            if isinstance(err, FormatError):
                raise
            raise FormatError(
                f"{path} is no readable state ({err!r}); it was cut, altered, or is another file"
            ) from err
        state.check(spec, str(path))
        return state

    def check(self, spec: StepSpec, where: str) -> None:
        """Refuses a state that is not of the model with this spec, or that was altered. Errors: FormatError."""
        if self.fingerprint != spec.fingerprint:
            raise FormatError(
                f"{where} was saved by another model (fingerprint {self.fingerprint[:12]}..., this model has "
                f"{spec.fingerprint[:12]}...). A state fits the weights that made it only; start anew without it"
            )
        if len(self.states) != len(spec.states):
            raise FormatError(f"{where} has {len(self.states)} states; the model has {len(spec.states)}")
        for value, wanted in zip(self.states, spec.states, strict=True):
            if value.shape != wanted.shape or value.dtype != wanted.dtype or not np.isfinite(value).all():
                raise FormatError(
                    f"{where}: state '{wanted.input}' is {value.shape} {value.dtype}; expected {wanted.shape} "
                    f"{wanted.dtype}, all finite. The state was altered: go on from another one, or start anew"
                )
        self._check_pending(spec, where)
        self._check_numbers(spec, where)
        last = self.last_logits
        if last is not None and (last.shape != (spec.num_logits,) or last.dtype != np.float32 or np.isnan(last).any()):
            raise FormatError(
                f"{where}: last logits are {last.shape} {last.dtype}; expected ({spec.num_logits},) float32, none of them nan"
            )

    def _check_pending(self, spec: StepSpec, where: str) -> None:
        pending = self.pending
        if pending.dtype != np.int64 or pending.ndim != 1 or len(pending) >= spec.segment_length:
            raise FormatError(
                f"{where}: pending tokens are {pending.shape} {pending.dtype}; expected fewer than {spec.segment_length} "
                f"int64 ids"
            )
        if len(pending) and not 0 <= int(pending.min()) <= int(pending.max()) < spec.vocab_size:
            raise FormatError(
                f"{where}: pending tokens run from {pending.min()} to {pending.max()}; expected ids from 0 to "
                f"{spec.vocab_size - 1}"
            )

    def _check_numbers(self, spec: StepSpec, where: str) -> None:
        numbers = {"position": self.position, "tokens_read": self.tokens_read, "segments": self.segments}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 63:
                raise FormatError(f"{where}: {name} is {number!r:.40}; expected a whole number of at least 0")
        position = self.segments * spec.segment_length + len(self.pending)
        if self.position != position or self.tokens_read < position:
            raise FormatError(
                f"{where}: position {self.position}, tokens_read {self.tokens_read}; {self.segments} segments of "
                f"{spec.segment_length} and {len(self.pending)} pending tokens make {position}. The state was altered"
            )
        total = self.loglik_sum
        if total is not None and not (isinstance(total, float) and math.isfinite(total)):
            raise FormatError(f"{where}: loglik_sum is {total!r}; expected a finite number")
