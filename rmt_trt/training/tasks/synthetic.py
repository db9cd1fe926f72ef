"""Synthetic documents of any length: one fact, noise, and a question at the end (arXiv 2304.11062, section 4).

    memorize   [fact] [noise ............................] [question]
    detect     [noise ......] [fact] [noise .............] [question]

A document of length n has exactly n tokens. It is a few numbers until it is read, and it is read in pieces: the
noise is drawn as it goes. Numpy only: who runs a model needs no torch to make its documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rmt_trt.errors import ContractError
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.task import DOCUMENTS, in_pieces
from rmt_trt.training.tasks.words import CLASSES, FIRST, FULL_STOP, ID, PLACES, SIZE, TEMPLATES, WORDS, encode, text_of

TASKS = ("memorize", "detect")
LONGEST_FACT = 7
QUESTION_LENGTH = 4
MIN_LENGTH = LONGEST_FACT + QUESTION_LENGTH
MAX_LENGTH = 1 << 40
BLOCK = 2048  # sentences drawn at a time: some 150 KB, and large enough that numpy's calls cost nothing

# Each cell of a template is a run of ids: (first, size); size 1 is a fixed word, size 0 no word.
_CELLS = [
    [(FIRST[w[1:-1]], SIZE[w[1:-1]]) if w.startswith("{") else (ID[w], 1) for w in template.split()]
    for template in TEMPLATES
]
_WIDTH = max(len(cells) for cells in _CELLS)
_TABLE = np.array([cells + [(0, 0)] * (_WIDTH - len(cells)) for cells in _CELLS], dtype=np.uint64)


def sentences(draws: Draws, count: int) -> np.ndarray:
    """The ids (n,) int64 of `count` random sentences, one after the other: no name, no place."""
    cells = _TABLE[draws.below(len(TEMPLATES), count).astype(np.intp)]
    first, size = cells[..., 0].ravel(), cells[..., 1].ravel()
    used = size > 0
    first, size = first[used], size[used]
    ids: np.ndarray = (first + draws.below(size, len(size))).astype(np.int64)
    return ids


@dataclass(frozen=True)
class Fact:
    """Who went where: token ids of the fact and of its question, and the class that answers it (0 .. 5)."""

    fact: tuple[int, ...]
    question: tuple[int, ...]
    answer: int


def fact_of(name: int, mover: int, back: bool, place: int) -> Fact:
    """The fact about the name, verb and place with these indices."""
    who, verb, where = CLASSES["name"][name], CLASSES["mover"][mover], PLACES[place]
    way = "back to" if back else "to"
    return Fact(tuple(encode(f"{who} {verb} {way} the {where} .")), tuple(encode(f"where is {who} ?")), place)


@dataclass(frozen=True)
class Document:
    """A document that has been decided on but not written: it always reads the same.

    length    tokens, the question included
    position  the token at which the fact begins
    """

    task: str
    seed: int
    length: int
    position: int
    fact: Fact

    @property
    def positions(self) -> tuple[int, ...]:
        """The token at which the fact begins."""
        return (self.position,)

    @property
    def fact_spans(self) -> tuple[tuple[int, int], ...]:
        """The fact's tokens, (start, stop)."""
        return ((self.position, self.position + len(self.fact.fact)),)

    @property
    def question_span(self) -> tuple[int, int]:
        """The question's tokens, (start, stop)."""
        return (self.length - len(self.fact.question), self.length)

    @property
    def label(self) -> int:
        """The class of the answer."""
        return self.fact.answer

    @property
    def answer(self) -> str:
        """The place, one of the six."""
        return PLACES[self.fact.answer]

    def pieces(self, size: int = 1 << 16, first: int | None = None) -> Iterator[np.ndarray]:
        """The ids (<= size,) int64, piece by piece, in constant memory.

        Each piece but the last has `size` tokens; the first may be given another size, as a short segment has.
        """
        yield from in_pieces(self._parts(), size, first)

    def tokens(self) -> np.ndarray:
        """All ids (length,) int64: eight bytes a token."""
        return np.concatenate(list(self.pieces()))

    def text(self) -> Iterator[str]:
        """The document as readable text, piece by piece."""
        return text_of(self.pieces())

    def _parts(self) -> Iterator[np.ndarray]:
        draws = Draws(DOCUMENTS, self.seed, self.length, 1)
        fact, question = np.array(self.fact.fact, np.int64), np.array(self.fact.question, np.int64)
        yield from _noise(draws, self.position)
        yield fact
        yield from _noise(draws, self.length - self.position - len(fact) - len(question))
        yield question


def make_document(task: str, length: int, seed: int, position: int | None = None) -> Document:
    """A document of exactly `length` tokens; the same arguments give the same document.

    `position` is where the fact begins: 0 for "memorize"; for "detect" any place before the question, random
    without it. Errors: ContractError.
    """
    if task not in TASKS:
        raise ContractError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise ContractError(f"length is {length} tokens; a fact and its question take {MIN_LENGTH} to {MAX_LENGTH}")
    if not 0 <= seed < 1 << 63:
        raise ContractError(f"seed is {seed}; expected a whole number from 0 to {(1 << 63) - 1}")
    draws = Draws(DOCUMENTS, seed, length, 0)
    name, mover, back, place = (
        int(n) for n in draws.below(np.array([SIZE["name"], SIZE["mover"], 2, SIZE["place"]]), 4)
    )
    fact = fact_of(name, mover, bool(back), place)
    last = length - len(fact.fact) - len(fact.question)
    if position is None:
        position = 0 if task == "memorize" else draws.below_any(last + 1)
    if not 0 <= position <= (0 if task == "memorize" else last):
        allowed = "0" if task == "memorize" else f"0 to {last}"
        raise ContractError(f"position is {position}; in a {task} document of {length} tokens it can be {allowed}")
    return Document(task, seed, length, position, fact)


def words_of(ids: tuple[int, ...]) -> str:
    """Ids as they stand in the vocabulary, divided by blanks."""
    return " ".join(WORDS[i] for i in ids)


def _noise(draws: Draws, count: int) -> Iterator[np.ndarray]:
    """Exactly `count` tokens of noise; the last sentence is cut short, with its full stop."""
    while count > 0:
        block = sentences(draws, BLOCK)[:count]
        count -= len(block)
        if count == 0:
            block[-1] = FULL_STOP
        yield block
