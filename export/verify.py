"""Verification: engines against the PyTorch recurrence, memory, logits and answers, after every one of many segments.

An error that one step hides can grow or die out along a recurrence: `drift.py` judges which. The reference is stepped once,
however many engines are compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from rmt_trt.contract import QUANTIZED, StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.export.drift_report import Curve, Drift, Octave, Report, Same, cosine
from rmt_trt.export.verify_documents import (
    MAX_SEGMENTS,
    Documents,
    check_segments,
    own_documents,
    random_document,
    random_documents,
)
from rmt_trt.model.recurrence import recurrence
from rmt_trt.model.step import DecoderStep, EncoderStep
from rmt_trt.runtime import Piece, RMTRuntime
from rmt_trt.runtime.segments import cut

__all__ = [
    "AGREEMENT",
    "MAX_SEGMENTS",
    "TOLERANCES",
    "Documents",
    "Drift",
    "Octave",
    "Reference",
    "Report",
    "Same",
    "check_options",
    "engine_reference",
    "limits",
    "memory_effect",
    "model_reference",
    "own_documents",
    "random_document",
    "random_documents",
    "relative_error",
    "step_reference",
    "token_scores",
    "verify",
    "verify_all",
]

# Largest relative L2 error of memory and logits that is accepted along the recurrence. fp32: the largest seen over
# all backbones and lengths of the parity tests is some 1e-6 (docs/results/parity.md), so a hundred times that. fp16 and
# bf16, measured on an H200 over 4,096 segments (docs/performance.md): the trained example 9e-4 and 6e-3, BERT-base with
# random weights 1.6e-3 and 1.4e-2. So some ten times that: what is wrong is off by far more, and what drifts further is
# worth a look.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
# Of dtypes whose rounding is no small error: the least share of answers that are the reference's own, an answer being the
# largest logit, after every segment of a classifier, behind every token of a language model. A dtype in neither table is
# held to LEAST_AGREEMENT.
LEAST_AGREEMENT = 0.99
AGREEMENT = dict.fromkeys(QUANTIZED, LEAST_AGREEMENT)
# What a document is compared by: after every segment, its states in the spec's order and its logits.
Reference = Callable[[np.ndarray], Iterable[tuple[tuple[np.ndarray, ...], np.ndarray]]]
Progress = Callable[[int, int], None]


def verify(
    runtime: RMTRuntime,
    reference: Reference,
    segments: int = 16,
    tolerance: float | None = None,
    seed: int = 0,
    name: str = "PyTorch recurrence",
    progress: Progress = lambda done, total: None,
) -> Report:
    """Runs a random document of `segments` segments, one of them short, and a batch of unequal lengths through both.

    progress is called with (segments done, segments in all). Errors: ContractError for options out of range.
    """
    check_options(segments, tolerance)
    documents = random_documents(runtime.spec, segments, seed)
    return verify_all([runtime], reference, documents, tolerance, name, progress)[0]


def verify_all(
    runtimes: Sequence[RMTRuntime],
    reference: Reference,
    documents: Documents,
    tolerance: float | None = None,
    name: str = "PyTorch recurrence",
    progress: Progress = lambda done, total: None,
) -> tuple[Report, ...]:
    """A report for each runtime of one model: all are stepped beside one pass of the reference over the document.

    tolerance: None takes what the tables have for each dtype. progress: as `verify`. Errors: ContractError for a tolerance
    that is not above 0, and for runtimes of different models.
    """
    check_options(2, tolerance)
    if not runtimes or any(one.spec != runtimes[0].spec for one in runtimes):
        raise ContractError(
            "verify_all got no runtimes, or runtimes of different models; expected engines of one model"
        )
    spec, document = runtimes[0].spec, documents.document
    total = documents.segments + len(runtimes) * documents.batch_segments(spec)
    compared = [_Compared(runtime, *limits(runtime.dtype, tolerance)) for runtime in runtimes]
    streams = [runtime.stream(document, memory=True) for runtime in runtimes]

    end: tuple[tuple[np.ndarray, ...], np.ndarray] | None = None
    scores: list[np.ndarray] = []
    for number, ((states, logits), *pieces) in enumerate(zip(reference(document), *streams, strict=True), 1):
        for one, piece in zip(compared, pieces, strict=True):
            one.add(piece, states, logits)
        if spec.logits == "lm":
            ids = document[pieces[0].start : pieces[0].stop]
            scores.append(token_scores(None if end is None else end[1][-1], logits, ids))
        end = states, logits  # one at a time: a model's logits of many segments would fill the memory
        progress(number, total)
    assert end is not None
    reports = []
    for one in compared:
        reports.append(one.report(reference, documents, *end, scores, name))
        progress(documents.segments + len(reports) * documents.batch_segments(spec), total)
    return tuple(reports)


@dataclass
class _Compared:
    """An engine on its way through the document."""

    runtime: RMTRuntime
    tolerance: float | None
    needed: float | None
    curve: Curve = field(init=False)
    same: Same = field(default_factory=Same)
    last: Piece | None = None

    def __post_init__(self) -> None:
        self.curve = Curve(self.tolerance)

    def add(self, piece: Piece, states: tuple[np.ndarray, ...], logits: np.ndarray) -> None:
        """The next segment, and what the reference gives there."""
        answers = Same()
        answers.count(piece.logits, logits)
        self.same.add(answers)
        errors = _errors(piece.states, piece.logits, states, logits)
        self.curve.add(piece.stop, *errors, cosine(piece.states, states), answers)
        self.last = piece

    def report(
        self,
        reference: Reference,
        documents: Documents,
        states: tuple[np.ndarray, ...],
        logits: np.ndarray,
        scores: Sequence[np.ndarray],
        name: str,
    ) -> Report:
        """After the last segment. states, logits: the reference's there; scores: of all tokens, of a language model."""
        runtime, document = self.runtime, documents.document
        found = [
            _compare_batch(runtime, reference, documents.batch, self.same),
            _compare_runs(runtime, document, states, logits, scores),
        ]
        memory, rows = (float(np.max(errors)) for errors in zip(*found, strict=True))
        return Report(
            engine=runtime.engine,
            dtype=runtime.dtype,
            reference=name,
            segments=documents.segments,
            tolerance=self.tolerance,
            rows=self.curve.rows(),
            batch_memory=memory,
            batch_logits=rows,
            memory_effect=memory_effect(runtime, document, self.last),
            agreement=self.same.share,
            needed=self.needed,
            octaves=self.curve.octaves(),
            document=documents.name,
        )


def limits(dtype: str, tolerance: float | None = None) -> tuple[float | None, float | None]:
    """(largest error, least agreement) that a dtype is held to; one of them is None."""
    if tolerance is not None:
        return tolerance, None
    if dtype in TOLERANCES:
        return TOLERANCES[dtype], None
    return None, AGREEMENT.get(dtype, LEAST_AGREEMENT)


def check_options(segments: int, tolerance: float | None) -> None:
    """Errors: ContractError, for a number of segments below 2 or beyond MAX_SEGMENTS, a tolerance not above 0 or infinite."""
    check_segments(segments)
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 < tolerance < math.inf):
        raise ContractError(f"tolerance is {tolerance!r}; expected a number above 0, and finite (--tolerance)")


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
    runtime: RMTRuntime, reference: Reference, batch: Sequence[np.ndarray], same: Same
) -> tuple[float, float]:
    """The worst errors of memory and logits over every segment of every document, as many run together as the engine
    takes."""
    errors = []
    for start in range(0, len(batch), runtime.max_batch):
        together = list(batch[start : start + runtime.max_batch])
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
