"""What a verification reads: one long document and a batch of unequal lengths, out of random ids or of a user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError, TokenError
from rmt_trt.runtime.segments import cut
from rmt_trt.runtime.tokens import PIECE, Document

MAX_SEGMENTS = 1 << 16  # the document is held in memory


@dataclass(frozen=True, eq=False)
class Documents:
    """document (n,) int64 ids, `segments` of them and one of these short; batch: of unequal lengths; name: for the report."""

    document: np.ndarray
    batch: tuple[np.ndarray, ...]
    segments: int
    name: str

    def batch_segments(self, spec: StepSpec) -> int:
        return sum(_segments(spec, len(one)) for one in self.batch)


def check_segments(segments: int) -> None:
    """Errors: ContractError, for a number below 2 or beyond MAX_SEGMENTS."""
    if isinstance(segments, bool) or not isinstance(segments, int) or segments < 2:
        raise ContractError(f"segments is {segments!r}; expected at least 2, one of which is short")
    if segments > MAX_SEGMENTS:
        raise ContractError(f"segments is {segments}; a verification goes through {MAX_SEGMENTS} at most")


def random_document(spec: StepSpec, length: int, seed: int) -> np.ndarray:
    """(length,) int64 ids drawn evenly from the vocabulary without the dropped ids."""
    allowed = np.setdiff1d(np.arange(spec.vocab_size), np.array(spec.dropped_ids, np.int64))
    return np.random.default_rng(seed).choice(allowed, length).astype(np.int64)


def random_documents(spec: StepSpec, segments: int, seed: int) -> Documents:
    """Errors: ContractError, as `check_segments`, and for a seed below 0."""
    check_segments(segments)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ContractError(f"seed is {seed!r:.60}; expected a whole number from 0 on (--seed)")
    lengths = enumerate(_batch_lengths(spec), seed + 1)
    return Documents(
        random_document(spec, _length(spec, segments), seed),
        tuple(random_document(spec, length, number) for number, length in lengths),
        segments,
        f"random ids, seed {seed}",
    )


def own_documents(spec: StepSpec, tokens: Any, segments: int | None, name: str) -> Documents:
    """A user's own document, its first `segments` segments or all of them, and pieces of it as the batch.

    tokens: an array, a memmap or an iterator, as the runtime takes them. name: of the document, in messages and the report.
    Errors: ContractError, as `check_segments`; TokenError, for ids that the model cannot read, and for a document of fewer
    segments than 2 or `segments`, or of more than MAX_SEGMENTS where none are given.
    """
    if segments is not None:
        check_segments(segments)
    most = _length(spec, segments) if segments is not None else MAX_SEGMENTS * spec.segment_length + 1
    document = _read(Document(tokens, spec, name), most)
    found = _segments(spec, len(document))
    have = f"{name} has {len(document):,} tokens that the model reads, {found:,} segment{'' if found == 1 else 's'}"
    if found < 2:
        raise TokenError(
            f"{have} of {spec.segment_length}; expected at least 2 segments, so more than {spec.segment_length} tokens, the "
            f"more the better"
        )
    if segments is None and found > MAX_SEGMENTS:
        raise TokenError(f"{name} has more than {MAX_SEGMENTS:,} segments; say how many to go through with --segments")
    if segments is not None and found < segments:
        raise TokenError(f"{have}, fewer than --segments {segments:,}; leave --segments out to take all")
    pieces = []
    for number, length in enumerate(_batch_lengths(spec)):
        start = min(number * spec.segment_length, len(document) - min(length, len(document)))
        pieces.append(document[start : start + length])
    return Documents(document, tuple(pieces), found, f"{name}, {len(document):,} tokens")


def _read(document: Document, most: int) -> np.ndarray:
    pieces, left = [np.empty(0, np.int64)], most
    while left and len(ids := document.read(min(PIECE, left))):
        pieces.append(ids)
        left -= len(ids)
    return np.concatenate(pieces)


def _length(spec: StepSpec, segments: int) -> int:
    """Tokens of so many segments, of which one is a third as long."""
    return (segments - 1) * spec.segment_length + max(1, spec.segment_length // 3)


def _batch_lengths(spec: StepSpec) -> list[int]:
    return sorted({1, max(1, spec.segment_length - 1), spec.segment_length + 1, 2 * spec.segment_length})


def _segments(spec: StepSpec, length: int) -> int:
    return cut(length, spec.segment_length, spec.alignment).count(length) if length else 0
