"""What a task is: documents of any length with a question at the end, and training batches of them. Numpy only.

    memorize    [fact] [noise ................................] [question]
    detect      [noise .......] [fact] [noise ................] [question]
    reasoning   [noise ...] [fact] [noise ...] [fact] [noise .] [question]      both facts are needed

The noise is synthetic (`synthetic.py`, a closed vocabulary) or a text of the user's (`text.py`, any tokenizer).
Everything follows from seeds; a document is a few numbers until it is read, and it is read in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rmt_trt.errors import ContractError

NAMES = ("memorize", "detect", "reasoning")

# Streams of random numbers are told apart by their first number: no document shares one with a training batch.
DOCUMENTS, BATCHES = 0, 1


@dataclass(frozen=True)
class Batch:
    """segments (n, b, s) int64, -1 where a segment is short; answers (b,) int64, the class."""

    segments: np.ndarray
    answers: np.ndarray


class Document(Protocol):
    """A document that has been decided on but not written: it always reads the same."""

    @property
    def length(self) -> int:
        """Tokens, the question included."""
        ...

    @property
    def positions(self) -> tuple[int, ...]:
        """The token at which each fact begins."""
        ...

    @property
    def fact_spans(self) -> tuple[tuple[int, int], ...]:
        """The tokens of each fact, (start, stop) as in a slice, in the order of `positions`."""
        ...

    @property
    def question_span(self) -> tuple[int, int]:
        """The tokens of the question, (start, stop); it stops where the document does."""
        ...

    @property
    def label(self) -> int:
        """The class that is the right answer, an index into the task's `labels`."""
        ...

    def pieces(self, size: int = 1 << 16, first: int | None = None) -> Iterator[np.ndarray]:
        """The ids (<= size,) int64, piece by piece, in constant memory; the first piece may be given another size."""
        ...

    def tokens(self) -> np.ndarray:
        """All ids (length,) int64."""
        ...


class Task(Protocol):
    """A source of documents and training batches.

    name        "memorize", "detect", "reasoning", or several of them with commas: documents of each in turn
    labels      the answers by class, the same for every task of a run
    answer_ids  the first token of each answer as it follows the question: what a language model is to say
    vocab_size  ids are below it
    tokenizer   tokenizer.json's text
    min_length  tokens of the shortest document: facts and question without noise
    """

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def answer_ids(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tokenizer(self) -> str: ...
    @property
    def min_length(self) -> int: ...

    def document(self, length: int, seed: int, place: float | None = None) -> Document:
        """A document of exactly `length` tokens; the same arguments give the same document.

        `place`, 0 to 1, is where the facts stand in the room before the question: 0 the very start, 1 right before the
        question, None a random place for each fact (the very start for memorize). Errors: ContractError.
        """
        ...

    def batch(self, rows: int, segments: int, segment_length: int, *seed: int, lean: float = 0.0) -> Batch:
        """`rows` documents of `segments` segments each, lengths and places mixed; the same arguments, the same batch.

        `lean`, 0 to 1, is the share of reasoning's questions that are turned to ask for the north or the east, if they
        do not anyway: what is stored and how it is asked for can then be learned one after the other.
        """
        ...

    def describe(self, length: int | None = None) -> dict[str, Any]:
        """Plain values for reports: names, the text with its SHA-256 and part, how often it repeats at a length."""
        ...


def in_pieces(parts: Iterator[np.ndarray], size: int, first: int | None = None) -> Iterator[np.ndarray]:
    """Ids that come in parts of any size -> pieces of `size`, the first one of `first`, the last one what is left.

    Errors: ContractError, for pieces of no tokens.
    """
    wanted = size if first is None else first
    if min(size, wanted) < 1:
        raise ContractError(f"pieces of {size} tokens, the first of {first}, were asked for; expected at least 1")
    held: list[np.ndarray] = []
    count = 0
    for part in parts:
        held.append(part)
        count += len(part)
        if count < wanted:
            continue
        whole, start = np.concatenate(held), 0
        while count >= wanted:
            yield whole[start : start + wanted]
            start, count, wanted = start + wanted, count - wanted, size
        held = [whole[start:]]
    if count:
        yield np.concatenate(held)
