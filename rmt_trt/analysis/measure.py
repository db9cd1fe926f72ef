"""The memory of a deployed model followed through documents: of a task, where facts are known, or of a user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmt_trt.analysis.layout import Span
from rmt_trt.analysis.summary import Marks
from rmt_trt.analysis.trajectory import Trajectory, follow
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.evaluation.fit import answer_of
from rmt_trt.runtime import RMTRuntime
from rmt_trt.runtime.segments import cut
from rmt_trt.training.tasks.task import Document, Task

MAX_ROWS = 1 << 18  # segments of all documents together: their figures are held until they are written


@dataclass(frozen=True, eq=False)
class Measured:
    """What was found, and plain values about each document and the task, if there was one."""

    trajectories: Sequence[Trajectory]
    marks: Sequence[Marks]
    documents: Sequence[dict[str, Any]]
    task: dict[str, Any] | None = field(default=None)


def of_task(
    runtime: RMTRuntime, task: Task, documents: Sequence[Document], first_seed: int,
    on_segment: Callable[[int], None] | None = None,
) -> Measured:  # fmt: skip
    """Documents of a task, equally long, streamed side by side; their seeds follow `first_seed`.

    Errors: ContractError, when the engine takes fewer documents, or there are too many segments.
    """
    spec, length = runtime.spec, documents[0].length
    check_amount(runtime, len(documents), len(documents) * _segments(spec, length))
    rows: dict[int, np.ndarray] = {}

    def pieces() -> Any:
        sources = [document.pieces() for document in documents]
        lengths = [document.length for document in documents]
        for piece in runtime.stream(sources, length=lengths, logits="last", memory=True):
            if piece.logits is not None:
                rows[piece.row] = piece.logits
            yield piece

    found = follow(pieces(), runtime.initial[0], on_segment)
    marks = [marks_of(document.fact_spans, document.question_span, document.length, spec) for document in documents]
    facts = [
        {
            "seed": first_seed + row,
            "tokens": document.length,
            "segments": len(one.figures),
            "fact_segments": [segment + 1 for segment in mark.facts],
            "answer": task.labels[document.label],
            "answered": task.labels[answer_of(spec, task, rows[row])],
            "right": answer_of(spec, task, rows[row]) == document.label,
        }
        for row, (document, one, mark) in enumerate(zip(documents, found, marks, strict=True))
    ]
    return Measured(found, marks, facts, task.describe(length))


def of_tokens(
    runtime: RMTRuntime, tokens: Any, segments: int | None, on_segment: Callable[[int], None] | None = None
) -> Measured:
    """Documents of one's own: an array (n,), or (b, n) whose rows may end in ids below 0, or a text; each up to its first
    `segments` segments. Errors: as `of_task`; TokenError for tokens that the model cannot read."""
    if isinstance(tokens, str):
        tokens = runtime.encode(tokens)
    count = tokens.shape[0] if tokens.ndim == 2 else 1
    longest = _segments(runtime.spec, max(1, tokens.size // max(1, count)))
    check_amount(runtime, count, count * min(longest, segments or longest))
    limit: dict[str, Any] = {} if segments is None else {"max_segments": segments, "overflow": "head"}
    stream = runtime.stream(tokens, logits="none", memory=True, **limit)
    found = follow(stream, runtime.initial[0], on_segment)
    facts = [{"tokens": one.stops[-1], "segments": len(one.figures)} for one in found]
    return Measured(found, [Marks()] * len(found), facts)


def marks_of(facts: Sequence[Span], question: Span, length: int, spec: StepSpec) -> Marks:
    """The segments (from 0) in which tokens of the facts and of the question stand, as the model cuts the document."""
    cutting = cut(length, spec.segment_length, spec.alignment)

    def touched(span: Span) -> list[int]:
        first, last = (max(0, 1 + (token - cutting.first) // cutting.rest) for token in (span[0], span[1] - 1))
        return list(range(first, last + 1))

    return Marks(tuple(sorted({segment for span in facts for segment in touched(span)})), tuple(touched(question)))


def _segments(spec: StepSpec, length: int) -> int:
    return cut(length, spec.segment_length, spec.alignment).count(length)


def check_amount(runtime: RMTRuntime, documents: int, rows: int) -> None:
    """Errors: ContractError, for more documents than the engine steps, or more segments of all of them than are held."""
    if documents > runtime.max_batch:
        raise ContractError(
            f"{documents} documents are to be followed side by side; engine '{runtime.engine}' was built for "
            f"{runtime.max_batch}. Give fewer"
        )
    if rows > MAX_ROWS:
        raise ContractError(
            f"{documents} documents have {rows:,} segments in all; the figures of {MAX_ROWS:,} are held at most. Give fewer "
            f"--documents or --segments"
        )
