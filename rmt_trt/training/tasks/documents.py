"""Documents of a story in noise, whatever the words: streamed at constant memory.

A story is a fact or two, a question and the class that answers it, as token ids. The noise is a source of random
sentences. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from rmt_trt.errors import ContractError
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.task import DOCUMENTS, in_pieces

MAX_LENGTH = 1 << 40
MAX_SEED = (1 << 63) - 1
BLOCK = 2048  # sentences drawn at a time: large enough that numpy's calls cost nothing


class Noise(Protocol):
    """A source of random sentences.

    full_stop        the id that ends noise that is cut short
    sentence_length  tokens of a sentence, on average
    """

    @property
    def full_stop(self) -> int: ...
    @property
    def sentence_length(self) -> float: ...

    def draw_sentences(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids (n,) int64 of `count` sentences one after the other, and where each ends (count,) int64."""
        ...

    def text_of(self, parts: Iterable[np.ndarray]) -> Iterator[str]:
        """Parts of ids, each of whole sentences -> parts of readable text."""
        ...


@dataclass(frozen=True)
class Told:
    """A story as token ids: the facts in their order, the question, and the class that answers it."""

    facts: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]
    label: int

    @property
    def length(self) -> int:
        """Tokens of facts and question together."""
        return sum(len(fact) for fact in self.facts) + len(self.question)


@dataclass(frozen=True)
class StoryDocument:
    """A document that has been decided on but not written; see the protocol `Document`."""

    kind: str
    seed: int
    length: int
    positions: tuple[int, ...]
    story: Told
    noise: Noise = field(repr=False)

    @property
    def label(self) -> int:
        """The class of the answer."""
        return self.story.label

    @property
    def fact_spans(self) -> tuple[tuple[int, int], ...]:
        """The tokens of each fact, (start, stop)."""
        return tuple((at, at + len(fact)) for at, fact in zip(self.positions, self.story.facts, strict=True))

    @property
    def question_span(self) -> tuple[int, int]:
        """The question's tokens, (start, stop)."""
        return (self.length - len(self.story.question), self.length)

    def pieces(self, size: int = 1 << 16, first: int | None = None) -> Iterator[np.ndarray]:
        """The ids (<= size,) int64, piece by piece, in constant memory; the first piece may be given another size."""
        yield from in_pieces(self._parts(), size, first)

    def tokens(self) -> np.ndarray:
        """All ids (length,) int64: eight bytes a token."""
        return np.concatenate(list(self.pieces()))

    def text(self) -> Iterator[str]:
        """The document as readable text, part by part."""
        return self.noise.text_of(self._parts())

    def _parts(self) -> Iterator[np.ndarray]:
        draws = Draws(DOCUMENTS, self.seed, self.length, 1)
        at = 0
        for (start, stop), fact in zip(self.fact_spans, self.story.facts, strict=True):
            yield from self._noise(draws, start - at)
            yield np.array(fact, np.int64)
            at = stop
        yield from self._noise(draws, self.question_span[0] - at)
        yield np.array(self.story.question, np.int64)

    def _noise(self, draws: Draws, count: int) -> Iterator[np.ndarray]:
        """Exactly `count` tokens of noise; the last sentence is cut short, with its full stop."""
        while count > 0:
            sentences = min(BLOCK, int(count / self.noise.sentence_length) + 4)
            block = self.noise.draw_sentences(draws, sentences)[0][:count]
            count -= len(block)
            if count == 0:
                block[-1] = self.noise.full_stop
            yield block


@dataclass(frozen=True)
class Source:
    """What documents are made of: the stories of each kind, whose turn comes in this order, and noise."""

    stories: Mapping[str, Sequence[Told]]
    noise: Noise

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds in the order of their turns."""
        return tuple(self.stories)

    @cached_property
    def min_length(self) -> int:
        """Tokens of facts and question without noise, of the longest story."""
        return max(story.length for told in self.stories.values() for story in told)

    def document(self, length: int, seed: int, place: float | None = None) -> StoryDocument:
        """A document of exactly `length` tokens; see `Task.document`. Errors: ContractError."""
        kind = kind_of(self.kinds, seed)
        check_place(kind, place)
        if not self.min_length <= length <= MAX_LENGTH:
            raise ContractError(
                f"length is {length} tokens; facts and question take {self.min_length}, and at most it can be {MAX_LENGTH}"
            )
        draws = Draws(DOCUMENTS, seed, length, 0)
        told = self.stories[kind]
        story = told[int(draws.below(len(told), 1)[0])]
        room = length - story.length
        if kind == "memorize":
            gaps = [0]
        elif place is not None:
            gaps = [round(place * room)] * len(story.facts)
        else:
            gaps = sorted(draws.below_any(room + 1) for _ in story.facts)
        return StoryDocument(kind, seed, length, positions_of(story, gaps), story, self.noise)


def kind_of(kinds: Sequence[str], seed: int) -> str:
    """The kind of the document of a seed. Errors: ContractError, for a seed out of bounds."""
    if not 0 <= seed <= MAX_SEED:
        raise ContractError(f"seed is {seed}; expected a whole number from 0 to {MAX_SEED}")
    return kinds[seed % len(kinds)]


def check_place(kind: str, place: float | None) -> None:
    """Errors: ContractError, for a place that a document of this kind cannot have."""
    if place is None:
        return
    if not 0 <= place <= 1:
        raise ContractError(f"place is {place}; expected a share of the room before the question, 0 to 1")
    if kind == "memorize" and place != 0:
        raise ContractError(f"place is {place}; in a memorize document the fact stands at the very start, 0")


def positions_of(story: Told, gaps: Sequence[int]) -> tuple[int, ...]:
    """Tokens of noise before each fact, in rising order -> the token at which each begins."""
    before = 0
    positions = []
    for gap, fact in zip(gaps, story.facts, strict=True):
        positions.append(gap + before)
        before += len(fact)
    return tuple(positions)
