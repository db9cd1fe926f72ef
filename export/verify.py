"""Verification: an engine against the PyTorch recurrence, memory and logits, after every one of many segments.

An error that one step hides can grow or die out along a recurrence, so the report gives it after 1, 2, 4, 8, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rmt_trt.contract import QUANTIZED, StepSpec
from rmt_trt.errors import ContractError, VerificationError
from rmt_trt.model.recurrence import recurrence
from rmt_trt.model.step import DecoderStep, EncoderStep
from rmt_trt.runtime import Piece, RMTRuntime
from rmt_trt.runtime.segments import cut

# Largest relative L2 error of memory and logits that is accepted along the recurrence. fp32: the largest seen over
# all backbones and lengths of the parity tests is some 1e-6 (docs/results/parity.md), so a hundred times that. fp16 and
# bf16, measured on an H200 over 4,096 segments (docs/performance.md): the trained example 9e-4 and 6e-3, BERT-base with
# random weights 1.6e-3 and 1.4e-2. So some ten times that: what is wrong is off by far more, and what drifts further is
# worth a look.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
# Of dtypes whose rounding is no small error: the least share of answers that are the reference's own, an answer being the
# largest logit, after every segment of a classifier, behind every token of a language model.
AGREEMENT = dict.fromkeys(QUANTIZED, 0.99)
MAX_SEGMENTS = 1 << 16  # the document and its report are held in memory
# What a document is compared by: after every segment, its states in the spec's order and its logits.
Reference = Callable[[np.ndarray], Iterable[tuple[tuple[np.ndarray, ...], np.ndarray]]]


@dataclass(frozen=True)
class Drift:
    """Relative L2 errors after a segment (1 is the first): the largest of the states', and the logits'."""

    segment: int
    tokens: int
    memory: float
    logits: float


@dataclass(frozen=True)
class Report:
    """What a verification found. `rows` has a Drift for every segment; `batch_*` is the worst of a batch of unequal lengths
    and of runs without a stop, which take other graphs of an engine than a stream of pieces does.

    memory_effect: by how much the logits of the last segment change when its memory is reset. Where it is tiny, the
    logits say nothing about the memory.
    tolerance: of the errors, or None where they are only told. agreement: the share of answers in the document and the batch
    that are the reference's; needed: the least of it, or None.
    """

    engine: str
    dtype: str
    reference: str
    segments: int
    tolerance: float | None
    rows: tuple[Drift, ...]
    batch_memory: float
    batch_logits: float
    memory_effect: float
    agreement: float = 1.0
    needed: float | None = None

    @property
    def worst(self) -> float:
        """The largest error of all; nan if one is."""
        errors = [(self.batch_memory, self.batch_logits), *((row.memory, row.logits) for row in self.rows)]
        return float(np.max(errors))

    @property
    def passed(self) -> bool:
        if not math.isfinite(self.worst) or (self.tolerance is not None and self.worst > self.tolerance):
            return False
        return self.needed is None or self.agreement >= self.needed

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite, which JSON does not have, become None."""
        return _finite(asdict(self) | {"worst": self.worst, "passed": self.passed})  # type: ignore[no-any-return]

    def require(self) -> None:
        """Errors: VerificationError, when the report did not pass."""
        if not self.passed and self.tolerance is None:
            raise VerificationError(
                f"engine '{self.engine}' ({self.dtype}) gives {self.agreement:.2%} of the {self.reference}'s answers, fewer than "
                f"{self.needed or 0:.0%}, with an error of {self.worst:.1e}. Measure its recall on your task with rmt-eval; keep "
                f"it with --accept-drift, or set a limit of the error instead with --tolerance",
                self.to_json(),
            )
        if not self.passed and self.tolerance is not None:
            bad = next((r for r in self.rows if not max(r.memory, r.logits) <= self.tolerance), None)
            where = (
                f"after segment {bad.segment} (memory {bad.memory:.1e}, logits {bad.logits:.1e})"
                if bad
                else "in a batch"
            )
            raise VerificationError(
                f"engine '{self.engine}' ({self.dtype}) drifts from the {self.reference} by {self.worst:.1e}, more than "
                f"{self.tolerance:.1e}, first {where}. Set another limit with --tolerance, or keep it with --accept-drift",
                self.to_json(),
            )


@dataclass
class Same:
    """How many answers there were, and how many of them were the reference's."""

    answers: int = 0
    equal: int = 0

    @property
    def share(self) -> float:
        return self.equal / self.answers if self.answers else 0.0

    def count(self, logits: np.ndarray | None, wanted: np.ndarray) -> None:
        """logits (c,) or (n, v). An engine that gave none agrees in nothing."""
        answers = wanted.argmax(axis=-1)
        self.answers += answers.size
        self.equal += 0 if logits is None else int((logits.argmax(axis=-1) == answers).sum())


def verify(
    runtime: RMTRuntime,
    reference: Reference,
    segments: int = 16,
    tolerance: float | None = None,
    seed: int = 0,
    name: str = "PyTorch recurrence",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Runs a document of `segments` segments, one of them short, and a batch of unequal lengths through both.

    progress is called with (segments done, segments in all). Errors: ContractError for options out of range.
    """
    check_options(segments, tolerance)
    spec = runtime.spec
    limit = TOLERANCES.get(runtime.dtype) if tolerance is None else tolerance
    needed = AGREEMENT.get(runtime.dtype) if tolerance is None else None
    if limit is None and needed is None:
        raise ContractError(f"no tolerance is known for {runtime.dtype}; give one (--tolerance)")
    document = random_document(spec, (segments - 1) * spec.segment_length + max(1, spec.segment_length // 3), seed)
    lengths = sorted({1, max(1, spec.segment_length - 1), spec.segment_length + 1, 2 * spec.segment_length})
    batch = [random_document(spec, length, seed + 1 + i) for i, length in enumerate(lengths)]
    total = segments + sum(cut(n, spec.segment_length, spec.alignment).count(n) for n in lengths)

    rows: list[Drift] = []
    last: Piece | None = None
    end: tuple[tuple[np.ndarray, ...], np.ndarray] | None = None
    scores: list[np.ndarray] = []
    same = Same()
    pairs = zip(runtime.stream(document, memory=True), reference(document), strict=True)
    for number, (piece, (states, logits)) in enumerate(pairs, 1):
        rows.append(Drift(number, piece.stop, *_errors(piece.states, piece.logits, states, logits)))
        same.count(piece.logits, logits)
        if spec.logits == "lm":
            scores.append(token_scores(None if end is None else end[1][-1], logits, document[piece.start : piece.stop]))
        last, end = piece, (states, logits)  # one at a time: a model's logits of many segments would fill the memory
        progress(number, total)
    assert end is not None
    found = [_compare_batch(runtime, reference, batch, same), _compare_runs(runtime, document, *end, scores)]
    worst = [float(np.max(errors)) for errors in zip(*found, strict=True)]
    progress(total, total)
    return Report(
        engine=runtime.engine,
        dtype=runtime.dtype,
        reference=name,
        segments=segments,
        tolerance=limit,
        rows=tuple(rows),
        batch_memory=worst[0],
        batch_logits=worst[1],
        memory_effect=memory_effect(runtime, document, last),
        agreement=same.share,
        needed=needed,
    )


def check_options(segments: int, tolerance: float | None) -> None:
    """Errors: ContractError, for a number of segments below 2 or beyond MAX_SEGMENTS, a tolerance that is not above 0."""
    if isinstance(segments, bool) or not isinstance(segments, int) or segments < 2:
        raise ContractError(f"segments is {segments!r}; expected at least 2, one of which is short")
    if segments > MAX_SEGMENTS:
        raise ContractError(f"segments is {segments}; a verification goes through {MAX_SEGMENTS} at most")
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance > 0):
        raise ContractError(f"tolerance is {tolerance!r}; expected a number above 0 (--tolerance)")


def random_document(spec: StepSpec, length: int, seed: int) -> np.ndarray:
    """(length,) int64 ids drawn evenly from the vocabulary without the dropped ids."""
    allowed = np.setdiff1d(np.arange(spec.vocab_size), np.array(spec.dropped_ids, np.int64))
    return np.random.default_rng(seed).choice(allowed, length).astype(np.int64)


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """||value - reference|| / ||reference||, L2 over all entries, in float64."""
    wanted = reference.astype(np.float64)
    return float(np.linalg.norm(value.astype(np.float64) - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))


def model_reference(model: EncoderStep | DecoderStep) -> Reference:
    """The plain recurrence of a published model."""

    def run(tokens: np.ndarray) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        for memory, logits in recurrence(model, tokens.tolist()):
            yield (memory.numpy(),), logits.numpy()

    return run


def step_reference(step: nn.Module, spec: StepSpec, initial: Sequence[np.ndarray]) -> Reference:
    """A user's own step in PyTorch, one document by itself, never padded. initial: in the spec's order, each (*shape)."""

    @torch.no_grad()
    def run(tokens: np.ndarray) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        states = [torch.from_numpy(np.array(value))[None] for value in initial]
        plan, start, index = cut(len(tokens), spec.segment_length, spec.alignment), 0, 0
        while start < len(tokens):
            segment = tokens[start : start + plan.size(index)]
            *states, logits = step(*states, torch.from_numpy(segment)[None])
            yield tuple(state[0].numpy() for state in states), logits[0].numpy()
            start, index = start + len(segment), index + 1

    return run


def engine_reference(runtime: RMTRuntime) -> Reference:
    """Another engine, such as the fp32 graph on the CPU."""

    def run(tokens: np.ndarray) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        for piece in runtime.stream(tokens, memory=True):
            if piece.logits is not None:
                yield piece.states, piece.logits

    return run


def memory_effect(runtime: RMTRuntime, document: np.ndarray, last: Piece | None) -> float:
    """Relative change of the logits of a document's last piece when its segment starts from the initial memory."""
    if last is None or last.logits is None:
        return 0.0
    reset = next(runtime.stream(document[last.start : last.stop], alignment="left")).logits
    return relative_error(reset, last.logits) if reset is not None else 0.0


def _compare_batch(
    runtime: RMTRuntime, reference: Reference, batch: list[np.ndarray], same: Same
) -> tuple[float, float]:
    """The worst errors of memory and logits over every segment of every document, as many run together as the engine
    takes."""
    errors = []
    for start in range(0, len(batch), runtime.max_batch):
        together = batch[start : start + runtime.max_batch]
        wanted = [iter(reference(document)) for document in together]
        for piece in runtime.stream(together, memory=True):
            states, logits = next(wanted[piece.row])
            errors.append(_errors(piece.states, piece.logits, states, logits))
            same.count(piece.logits, logits)
    memory, logits = np.max(errors, axis=0)
    return float(memory), float(logits)


def _compare_runs(
    runtime: RMTRuntime,
    document: np.ndarray,
    states: Sequence[np.ndarray],
    logits: np.ndarray,
    scores: Sequence[np.ndarray],
) -> tuple[float, float]:
    """The errors of a run that stops at the end alone: heads "none" and "last", of a language model "loglik" too."""
    run = runtime.run(document, logits="last")
    errors = [_errors(tuple(run.states.values()), run.logits, states, logits[-1] if logits.ndim == 2 else logits)]
    if scores:
        scored = runtime.run(document, logits="loglik")
        memory, _ = _errors(tuple(scored.states.values()), None, states, logits)
        assert scored.loglik is not None
        errors.append((memory, relative_error(scored.loglik[1:], np.concatenate(scores)[1:])))
    memory, rows = np.max(errors, axis=0)
    return float(memory), float(rows)


def token_scores(before: np.ndarray | None, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(n,) float64: log-likelihood of each token of a segment, in nats. logits: (n, v), a row behind each token.
    before: (v,), the row behind the segment before, or None, which leaves the first token nan."""
    first = np.full((1, logits.shape[1]), np.nan) if before is None else before[None]
    rows = np.concatenate([first, logits[:-1]]).astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return np.asarray(rows[np.arange(len(tokens)), tokens] - np.log(np.exp(rows).sum(axis=1)))


def _errors(
    states: Sequence[np.ndarray], logits: np.ndarray | None, wanted: Sequence[np.ndarray], wanted_logits: np.ndarray
) -> tuple[float, float]:
    memory = float(np.max([relative_error(value, want) for value, want in zip(states, wanted, strict=True)]))
    return memory, float("inf") if logits is None else relative_error(logits, wanted_logits)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
