"""From what a caller passes to tracks: documents opened, lengths and limits settled, states checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmt_trt.contract import ALIGNMENTS, Alignment, Head, StepSpec
from rmt_trt.errors import ContractError, TokenError
from rmt_trt.runtime.segments import Limit, cut
from rmt_trt.runtime.state import State
from rmt_trt.runtime.tokens import Document, split_batch
from rmt_trt.runtime.track import Track

LOGITS_MODES: tuple[Head, ...] = ("last", "all", "loglik", "none")
EMPTY = np.empty(0, np.int64)


@dataclass(frozen=True)
class Reading:
    """How documents are read: a caller's options, checked once. `RMTRuntime.run` says what they mean."""

    alignment: Alignment
    logits: Head
    limit: Limit | None

    @classmethod
    def of(cls, spec: StepSpec, alignment: str | None, logits: Any, max_segments: int | None, overflow: str) -> Reading:
        """Errors: ContractError."""
        alignment = spec.alignment if alignment is None else alignment
        if alignment not in ALIGNMENTS:
            raise ContractError(f"alignment is {alignment!r}; expected one of {', '.join(ALIGNMENTS)}")
        if logits not in LOGITS_MODES:
            raise ContractError(f"logits is {logits!r}; expected one of {', '.join(LOGITS_MODES)}")
        if logits == "loglik" and spec.logits != "lm":
            raise ContractError(
                "logits='loglik' is for language models; this model is a classifier. Use 'last' or 'all'"
            )
        if max_segments is None and overflow != "error":
            raise ContractError(f"overflow={overflow!r} without max_segments says nothing; pass max_segments too")
        return cls(alignment, logits, None if max_segments is None else Limit(max_segments, overflow))


@dataclass(frozen=True)
class Opener:
    """Opens documents for a model. initial: the states that they begin with; encode: text to ids."""

    reading: Reading
    spec: StepSpec
    initial: tuple[np.ndarray, ...]
    encode: Callable[[str], np.ndarray]

    def open(self, tokens: Any, state: Any, length: Any) -> tuple[list[Track], bool]:
        """(tracks in the order of the documents, whether a batch came).

        Errors: TokenError, ContractError, FormatError.
        """
        documents, batch = ([tokens], False) if isinstance(tokens, str) else split_batch(tokens)
        distinct(documents)
        states = one_each(state, len(documents), batch, "state")
        lengths = one_each(length, len(documents), batch, "length")
        return [
            self.open_one(row, document, begin, stated, f"document {row} of the batch" if batch else "the document")
            for row, (document, begin, stated) in enumerate(zip(documents, states, lengths, strict=True))
        ], batch

    def open_one(self, row: int, tokens: Any, state: Any, length: Any, where: str) -> Track:
        """One document, which `where` names in messages. Errors: as `open`."""
        reading, spec = self.reading, self.spec
        document = Document(self.encode(tokens) if isinstance(tokens, str) else tokens, spec, where, length)
        begin = _begin(state, reading, spec, self.initial, where)
        count = document.count() if reading.alignment != "left" or reading.limit is not None else None
        limit = None
        if reading.limit is not None:
            limit = _apply(reading.limit, document, count, spec.segment_length, len(begin.pending))
            count = limit if count is not None else None
        if document.at_end() and not len(begin.pending):
            dropped = f" after dropping the ids {list(spec.dropped_ids)}" if spec.dropped_ids else ""
            kept = " and the state that it goes on from has none pending" if begin.position else ""
            raise TokenError(
                f"{document.where} is empty: it has no token{dropped}{kept}. Leave it out, or give it at least one"
            )
        plan = cut(count, spec.segment_length, reading.alignment)
        size = size_of(tokens, length) if count is None else count
        return Track(row, document, plan, reading.alignment, begin, limit, size)


def size_of(tokens: Any, length: Any = None) -> int | None:
    """Tokens, or characters, that a document has as it came, without reading it; None if that cannot be told."""
    if isinstance(length, int):
        return length
    try:
        return len(tokens)
    except TypeError:
        return None


def distinct(documents: list[Any]) -> None:
    """An iterator that stands for two documents would deal its tokens out between them."""
    first: dict[int, int] = {}
    for row, document in enumerate(documents):
        if isinstance(document, Iterator) and first.setdefault(id(document), row) != row:
            raise TokenError(
                f"documents {first[id(document)]} and {row} of the batch are one and the same iterator, which gives its "
                f"tokens once only. Pass an iterator for each, or a list"
            )


def _apply(limit: Limit, document: Document, length: int | None, segment_length: int, pending: int) -> int:
    """Passes over the head for overflow="tail"; returns how many tokens may be read."""
    if length is None:
        if limit.overflow == "head":
            return limit.tokens(segment_length, pending)
        raise TokenError(
            f"{document.where}: max_segments with overflow='{limit.overflow}' needs the number of tokens beforehand, and an "
            f"iterator does not tell it. Pass length=, pass an array, or use overflow='head'"
        )
    start, stop = limit.window(length, segment_length, document.where, pending)
    document.skip(start)
    return stop - start


def _begin(state: Any, reading: Reading, spec: StepSpec, initial: tuple[np.ndarray, ...], where: str) -> State:
    if state is None:
        return State(initial, EMPTY, 0, 0, 0, None, 0.0, spec.fingerprint)
    if not isinstance(state, State):
        raise ContractError(f"{where}: state is {type(state).__name__}; expected out.state or rt.load_state(path)")
    if reading.alignment != "left":
        raise ContractError(
            f"{where}: going on from a state needs alignment='left'; with '{reading.alignment}' a document in two parts is "
            f"cut differently from the whole. Pass alignment='left' for every part"
        )
    if reading.logits == "loglik" and state.segments and state.last_logits is None:
        raise ContractError(
            f"{where}: the state holds no logits row, so the next token cannot be scored. Run the earlier part with "
            f"logits='loglik' or 'last', not 'none'"
        )
    state.check(spec, f"{where}: the state")
    return state


def one_each(values: Any, count: int, batch: bool, name: str) -> list[Any]:
    """One value per document: of a batch a list of as many, or None for none."""
    if not batch or values is None:
        return [values] * count
    if not isinstance(values, (list, tuple)) or len(values) != count:
        came = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
        raise ContractError(
            f"{name} of a batch of {count} documents is {came}; expected a list of {count}, None where unset"
        )
    return list(values)
