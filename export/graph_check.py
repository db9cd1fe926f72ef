"""Graphs that were made for another engine, run on ONNX Runtime's CPU provider and compared with the reference.

A wrong fusion is found at export then, on any machine. What a GPU's kernels do is for `verify`, on a machine with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.bundle import GraphEntry
from rmt_trt.contract import PAD, SEGMENT, StepSpec
from rmt_trt.errors import EngineError, VerificationError
from rmt_trt.export.verify import Reference, random_document, relative_error, token_scores
from rmt_trt.runtime import native
from rmt_trt.runtime.engines.cpu import ERRORS_ONLY, library
from rmt_trt.runtime.segments import cut

States = list[np.ndarray]


@dataclass(frozen=True)
class GraphCheck:
    """dtype: of the graphs that ran. worst: the largest relative L2 error over `segments` segments, by role and head
    ("full none")."""

    dtype: str
    segments: int
    tolerance: float
    worst: dict[str, float]

    @property
    def largest(self) -> float:
        return float(np.max([*self.worst.values()]))  # nan if one is

    def to_json(self) -> dict[str, Any]:
        """Plain values, of a check that passed."""
        return {"dtype": self.dtype, "segments": self.segments, "tolerance": self.tolerance, "worst": self.largest}


def check_graphs(
    entries: Sequence[GraphEntry],
    folder: Path,
    spec: StepSpec,
    initial: Sequence[np.ndarray],
    reference: Reference,
    segments: int,
    tolerance: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GraphCheck:
    """Runs every graph of `entries` (files in `folder`) through documents of `segments` segments, one of them short.

    initial: in the spec's order, each (*shape). Errors: VerificationError, naming the first graph that differs from
    the reference; EngineError, when the CPU provider refuses a graph or lacks a node.
    """
    size = spec.segment_length
    ragged = (segments - 1) * size + max(1, size // 3)
    lengths = {"step": (ragged, max(1, ragged // 2)), "full": (segments * size, 2 * size)}
    documents = {
        role: [
            list(_segments(random_document(spec, length, seed), spec, reference)) for seed, length in enumerate(both)
        ]
        for role, both in lengths.items()
        if any(entry.role == role for entry in entries)
    }
    total = len(entries) * segments
    worst: dict[str, float] = {}
    for number, entry in enumerate(entries):
        session = _session(folder / entry.file, native.NEED in entry.needs)
        error, done = 0.0, number * segments
        for index, found in enumerate(_run(session, entry, spec, initial, documents[entry.role])):
            error = max(error, found) if np.isfinite(found) else float("inf")
            if not error <= tolerance:
                raise VerificationError(
                    f"the {entry.dtype} graph '{entry.file}', run on the CPU, differs from the PyTorch recurrence by "
                    f"{error:.1e} after segment {index + 1}, more than {tolerance:.1e}: it does not compute this model. "
                    f"Export its graphs plainly (--plain)",
                    {"graph": entry.file, "segment": index + 1, "error": error, "tolerance": tolerance},
                )
            progress(min(done + index + 1, total), total)
        use = f"{entry.role} {entry.head}"  # several graphs may serve one, each from its own batch on
        worst[use] = max(worst.get(use, 0.0), error)
    return GraphCheck(entries[0].dtype, segments, tolerance, worst)


def _session(path: Path, ours: bool) -> Any:
    """A session that runs the nodes as they were written. ONNX Runtime 1.31's layout optimisation for the CPU ends the
    process on some half-precision graphs, and what it would make of them is not what is checked. ours: some nodes are
    rmt-trt's own."""
    ort = library()
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if ours:
        native.register(options)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as err:  # ONNX Runtime's exceptions share no base class of their own
        raise EngineError(
            f"ONNX Runtime's CPU provider refuses graph '{path.name}': {' '.join(str(err).split())[:300]}"
        ) from err


@dataclass(frozen=True, eq=False)
class _Segment:
    """Tokens (n,), and what the reference says of them: states, each (*shape), and logits."""

    tokens: np.ndarray
    states: tuple[np.ndarray, ...]
    logits: np.ndarray


def _segments(document: np.ndarray, spec: StepSpec, reference: Reference) -> Iterator[_Segment]:
    plan, start = cut(len(document), spec.segment_length, spec.alignment), 0
    for index, (states, logits) in enumerate(reference(document)):
        tokens = document[start : start + plan.size(index)]
        yield _Segment(tokens, tuple(states), logits)
        start += len(tokens)


def _run(
    session: Any, entry: GraphEntry, spec: StepSpec, initial: Sequence[np.ndarray], rows: list[list[_Segment]]
) -> Iterator[float]:
    """The largest error after every segment of two documents together. The one that ends first goes on as padding with
    role "step", and leaves the batch with role "full"."""
    states = [np.stack([value] * len(rows)) for value in initial]
    for index in range(max(map(len, rows))):
        batch = [row[index] if index < len(row) else None for row in rows]
        if entry.role == "full":
            batch = [segment for segment in batch if segment is not None]
            states = [value[: len(batch)] for value in states]  # the first document is the longer one
        states, error = _step(session, entry, spec, states, batch)
        yield error


def _step(
    session: Any, entry: GraphEntry, spec: StepSpec, states: States, rows: Sequence[_Segment | None]
) -> tuple[States, float]:
    """New states and the largest error of a step. A row that is None is padding: its states must not change at all."""
    batch = np.full((len(rows), spec.segment_length), PAD, np.int64)
    for row, segment in zip(batch, rows, strict=True):
        if segment is not None:
            row[: len(segment.tokens)] = segment.tokens
    feeds = {state.input: value for state, value in zip(spec.states, states, strict=True)} | {SEGMENT: batch}
    names = [value.name for value in session.get_outputs()]
    try:
        found: Mapping[str, np.ndarray] = dict(zip(names, session.run(None, feeds), strict=True))
    except Exception as err:  # ONNX Runtime's exceptions share no base class of their own
        raise EngineError(f"ONNX Runtime's CPU provider failed in graph '{entry.file}': {str(err)[:300]}") from err
    new = [found[state.output] for state in spec.states]
    answers = [found[name] for name in names[len(spec.states) :]]
    errors = []
    for number, segment in enumerate(rows):
        if segment is None:
            frozen = all(np.array_equal(a[number], b[number]) for a, b in zip(new, states, strict=True))
            errors.append(0.0 if frozen else float("inf"))
            continue
        errors += [relative_error(value[number], want) for value, want in zip(new, segment.states, strict=True)]
        errors += _answer_errors(entry.head, spec, [answer[number] for answer in answers], segment)
    return new, float(np.max(errors))


def _answer_errors(head: str, spec: StepSpec, found: Sequence[np.ndarray], segment: _Segment) -> list[float]:
    """Errors of one row's outputs behind its states: rows, and with head "loglik" what each token's follower scores."""
    wanted, count = segment.logits, len(segment.tokens)
    if len(found) != {"none": 0, "loglik": 2}.get(head, 1):
        return [float("inf")]
    if head == "none":
        return []
    if spec.logits == "classifier":
        return [relative_error(found[0], wanted)]
    if head == "all":
        return [relative_error(found[0][:count], wanted)]
    errors = [relative_error(found[0], wanted[-1])]
    if head == "loglik" and count > 1:
        scores = token_scores(None, wanted, segment.tokens)[1:]
        errors.append(relative_error(found[1][: count - 1], scores))
    return errors
