"""Documents of a story in noise, whatever the words: streamed at constant memory, and training batches of them.

A story is a fact or two, a question and the class that answers it, as token ids. The noise is a source of random
sentences. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rmt_trt.errors import ContractError
from rmt_trt.training.tasks.cutting import below, cut, lengths_of, short_last
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.task import DOCUMENTS, Batch, in_pieces

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


def make_story_document(
    kinds: Sequence[str],
    stories: Mapping[str, Sequence[Told]],
    noise: Noise,
    length: int,
    seed: int,
    place: float | None = None,
) -> StoryDocument:
    """A document of exactly `length` tokens, of the kinds in turn by seed; see `Task.document`. Errors: ContractError."""
    kind = kind_of(kinds, seed)
    check_place(kind, place)
    draws = Draws(DOCUMENTS, seed, length, 0)
    story = stories[kind][int(draws.below(len(stories[kind]), 1)[0])]
    check_length(length, story.length)
    room = length - story.length
    if kind == "memorize":
        gaps = [0]
    elif place is not None:
        gaps = [round(place * room)] * len(story.facts)
    else:
        gaps = sorted(draws.below_any(room + 1) for _ in story.facts)
    return StoryDocument(kind, seed, length, positions_of(story, gaps), story, noise)


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


def check_length(length: int, least: int) -> None:
    """Errors: ContractError, for a length that no document can have."""
    if not least <= length <= MAX_LENGTH:
        raise ContractError(f"length is {length} tokens; facts and question take {least} to {MAX_LENGTH}")


def positions_of(story: Told, gaps: Sequence[int]) -> tuple[int, ...]:
    """Tokens of noise before each fact, in rising order -> the token at which each begins."""
    before = 0
    positions = []
    for gap, fact in zip(gaps, story.facts, strict=True):
        positions.append(gap + before)
        before += len(fact)
    return tuple(positions)


def make_story_batch(
    kinds: Sequence[str],
    stories: Mapping[str, Sequence[Told]],
    noise: Noise,
    rows: int,
    segments: int,
    segment_length: int,
    draws: Draws,
) -> Batch:
    """`rows` such documents of `segments` segments each, kinds, lengths and places mixed."""
    least = max(story.length for kind in kinds for story in stories[kind])
    length = lengths_of(draws, rows, segments, segment_length, least)
    chosen = [kinds[int(kind)] for kind in below(draws, len(kinds), rows)]
    which = below(draws, np.array([len(stories[kind]) for kind in chosen]), rows)
    told = [stories[kind][int(one)] for kind, one in zip(chosen, which, strict=True)]
    room = length - np.array([story.length for story in told])
    places = np.sort(below(draws, np.repeat(room + 1, 2), 2 * rows).reshape(rows, 2), axis=1)
    places[[kind == "memorize" for kind in chosen]] = 0
    last = short_last(draws, rows)

    text = np.zeros((rows, segments * segment_length), np.int64)
    feed = _Feed(noise, draws, int(room.sum()))
    for row, story in enumerate(told):
        _write(text[row], story, places[row].tolist(), int(length[row]), feed)
    return Batch(cut(text, length, segment_length, last), np.array([story.label for story in told], np.int64))


def _write(text: np.ndarray, story: Told, gaps: list[int], length: int, feed: _Feed) -> None:
    at = 0
    question = length - len(story.question)
    for position, fact in zip(positions_of(story, gaps[: len(story.facts)]), story.facts, strict=True):
        feed.fill(text[at:position])
        at = position + len(fact)
        text[position:at] = fact
    feed.fill(text[at:question])
    text[question:length] = story.question


class _Feed:
    """Noise for many small gaps out of one large draw; each gap begins with a sentence."""

    def __init__(self, noise: Noise, draws: Draws, tokens: int) -> None:
        self._noise, self._draws, self._at = noise, draws, 0
        self._ids, self._ends = noise.draw_sentences(draws, int(1.05 * tokens / noise.sentence_length) + 64)

    def fill(self, gap: np.ndarray) -> None:
        """Writes noise into the gap (n,); it ends with a full stop."""
        if not len(gap):
            return
        while self._at + len(gap) > len(self._ids):
            more, ends = self._noise.draw_sentences(self._draws, int(len(gap) / self._noise.sentence_length) + 64)
            self._ids, self._ends = (
                np.concatenate([self._ids, more]),
                np.concatenate([self._ends, ends + len(self._ids)]),
            )
        gap[:] = self._ids[self._at : self._at + len(gap)]
        gap[-1] = self._noise.full_stop
        self._at = int(self._ends[np.searchsorted(self._ends, self._at + len(gap))])
