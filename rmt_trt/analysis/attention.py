"""Attention maps of the operations with memory, from the PyTorch recurrence.

The maps are the backbone's own, of its eager attention, while `rmt_trt.model.recurrence` drives it: softmax weights, so
that each row is a sum of 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rmt_trt.analysis.layout import OPERATIONS, Operation, Region, Span, clipped, even, places, regions, rows_of, share
from rmt_trt.errors import ContractError, EngineError
from rmt_trt.model.recurrence import recurrence
from rmt_trt.model.step import RMTModel
from rmt_trt.training.tasks.task import Document, Task

LEAST_SEGMENTS = 3  # a fact, noise, the question
TRIES = 4_000  # seeds that are looked at for a document that shows every operation


@dataclass(frozen=True, eq=False)
class Drawn:
    """A map that shows an operation: `map` (n, n) float64 of one layer and head, in segment `segment` (from 0)."""

    seed: int
    segment: int
    map: np.ndarray
    regions: tuple[Region, ...]
    ids: tuple[int, ...]  # of the segment's text
    share: float


@dataclass(frozen=True, eq=False)
class Finding:
    """An operation's share of attention.

    shares  (layers, heads) float64: how much of the rows' attention goes to the columns, the mean over all maps
    even    what it would be if each row attended evenly to all that it sees, the mean over the same maps
    layer, head   from 0: where the share is largest
    each    the share of each map of that layer and head: documents times segments of the kind
    labels  the class that answers each map's document
    """

    operation: Operation
    shares: np.ndarray
    even: float
    layer: int
    head: int
    each: tuple[float, ...]
    labels: tuple[int, ...]
    drawn: Drawn


@dataclass(frozen=True)
class Example:
    """A document that shows every operation, and the segments in which it does (from 0), by kind."""

    seed: int
    label: int
    tokens: tuple[int, ...]
    facts: tuple[Span, ...]
    question: Span
    segments: Mapping[str, tuple[int, ...]]

    def text_spans(self, segment: int, size: int) -> tuple[list[Span], list[Span]]:
        """What of the facts and of the question stands in a segment of `size` tokens."""
        start, stop = segment * size, (segment + 1) * size
        return clipped(self.facts, start, stop), clipped([self.question], start, stop)


def attention(
    model: RMTModel, tokens: Sequence[int], wanted: Collection[int] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(segment, its maps (layers, heads, n, n) float32) for the segments that are wanted, all by default.

    n are the positions of the segment, memory and special tokens included, as `layout.regions` names them.
    Errors: EngineError, when the backbone gives no attention weights.
    """
    with _kept(model.backbone) as kept:
        kept.ask = wanted is None or 0 in wanted
        for segment, _ in enumerate(recurrence(model, tokens)):
            if kept.ask:
                yield segment, kept.taken()
            kept.ask = wanted is None or segment + 1 in wanted


def examples(task: Task, segments: int, size: int, count: int, seed: int, place: float | None) -> list[Example]:
    """The first `count` documents of `segments` full segments, by seed, that show every operation.

    Each fact stands within one segment with noise behind it, none in the last segment, and at least one segment of noise
    alone comes between. Errors: ContractError, when there are no such documents.
    """
    if segments < LEAST_SEGMENTS:
        raise ContractError(
            f"attention maps are asked for in documents of {segments} segments; a fact, noise and the question take at "
            f"least {LEAST_SEGMENTS}"
        )
    found: list[Example] = []
    for number in range(seed, seed + TRIES):
        document = task.document(segments * size, number, place)
        kinds = _kinds(document, segments, size)
        if kinds is not None:
            tokens = tuple(document.tokens().tolist())
            spans = document.fact_spans, document.question_span
            found.append(Example(number, document.label, tokens, *spans, kinds))
        if len(found) == count:
            return found
    where = "at random places" if place is None else f"at the place {place}"
    raise ContractError(
        f"of {TRIES} documents of {segments} segments with facts {where}, {len(found)} have each fact within a segment, a "
        f"segment of noise behind it and the question after that; {count} are wanted. Give more segments, or another place"
    )


def find_operations(
    model: RMTModel, documents: Sequence[Example], on_document: Callable[[int], None] | None = None
) -> list[Finding]:
    """Of each operation the shares by layer and head over all documents, and a map of that where the mean is largest.

    The map that is drawn is the middle one of those of this layer and head, by its share.
    """
    found: dict[str, list[_Seen]] = {operation.name: [] for operation in OPERATIONS}
    for number, document in enumerate(documents, 1):
        for operation, seen in _shares(model, document):
            found[operation.name].append(seen)
        if on_document is not None:
            on_document(number)
    return [_finding(model, operation, found[operation.name]) for operation in OPERATIONS]


@dataclass(frozen=True, eq=False)
class _Seen:
    """An operation's shares (layers, heads) in one segment, and that of even attention."""

    document: Example
    segment: int
    shares: np.ndarray
    even: float


def _shares(model: RMTModel, document: Example) -> Iterator[tuple[Operation, _Seen]]:
    """The operations in all segments of one document that show them."""
    causal, size = model.config.form == "decoder", model.config.segment_length
    wanted = {segment for kind in document.segments.values() for segment in kind}
    for segment, maps in attention(model, document.tokens, wanted):
        found = regions(model.config, size, *document.text_spans(segment, size))
        for operation in OPERATIONS:
            if segment in document.segments[operation.segment]:
                rows, columns = rows_of(operation, found, causal), places(found, operation.columns)
                evenly = float(share(even(maps.shape[-1], causal), rows, columns))
                yield operation, _Seen(document, segment, share(maps, rows, columns), evenly)


def _finding(model: RMTModel, operation: Operation, seen: Sequence[_Seen]) -> Finding:
    shares = np.mean([one.shares for one in seen], axis=0)
    layer, head = (int(i) for i in np.unravel_index(int(shares.argmax()), shares.shape))
    each = [float(one.shares[layer, head]) for one in seen]
    middle = seen[int(np.argsort(each, kind="stable")[(len(each) - 1) // 2])]
    return Finding(
        operation, shares, float(np.mean([one.even for one in seen])), layer, head, tuple(each),
        tuple(one.document.label for one in seen), _drawn(model, middle, operation, layer, head),
    )  # fmt: skip


def _drawn(model: RMTModel, seen: _Seen, operation: Operation, layer: int, head: int) -> Drawn:
    document, segment, size = seen.document, seen.segment, model.config.segment_length
    ((_, maps),) = attention(model, document.tokens[: (segment + 1) * size], {segment})
    found = tuple(regions(model.config, size, *document.text_spans(segment, size)))
    ids = document.tokens[segment * size : (segment + 1) * size]
    return Drawn(
        document.seed, segment, maps[layer, head].astype(np.float64), found, ids, float(seen.shares[layer, head])
    )


def _kinds(document: Document, segments: int, size: int) -> dict[str, tuple[int, ...]] | None:
    """The segments that show each operation, or None if one of them cannot be seen in this document."""
    facts, last = document.fact_spans, segments - 1
    inside = all(a // size == (b - 1) // size and b % size for a, b in facts)
    behind = max(b for _, b in facts) // size + 1  # the first segment behind the facts
    if not inside or behind >= last or document.question_span[0] < last * size:
        return None
    return {
        "fact": tuple(sorted({a // size for a, _ in facts})),
        "noise": tuple(range(behind, last)),
        "last": (last,),
    }


class _Kept:
    """The attention weights of a backbone's newest pass, kept while `ask` is set."""

    def __init__(self) -> None:
        self.ask = False
        self._maps: tuple[torch.Tensor, ...] = ()

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A hook: asks for the weights."""
        return args, kwargs | {"output_attentions": self.ask}

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """A hook: keeps them."""
        self._maps = tuple(out.attentions or ()) if self.ask else ()

    def taken(self) -> np.ndarray:
        maps, self._maps = self._maps, ()
        if not maps or any(one is None for one in maps):
            raise EngineError("the backbone gave no attention weights; maps need one with an eager attention")
        return torch.cat([one.detach().float() for one in maps]).cpu().numpy()


@contextlib.contextmanager
def _kept(backbone: nn.Module) -> Iterator[_Kept]:
    """While it is open, the weights of each pass are kept. The recurrence is run as it is; it need not know."""
    kept = _Kept()
    hooks = (
        backbone.register_forward_pre_hook(kept.before, with_kwargs=True),
        backbone.register_forward_hook(kept.after, with_kwargs=True),
    )
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
