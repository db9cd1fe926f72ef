"""The tasks in synthetic words: a closed vocabulary, which a small model learns from nothing in minutes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmt_trt.training.tasks.documents import Source, Told, check_place, kind_of
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.facts import stories
from rmt_trt.training.tasks.story_batches import make_story_batch
from rmt_trt.training.tasks.synthetic import QUESTION_LENGTH, TASKS, make_document, sentences
from rmt_trt.training.tasks.synthetic_batches import FACTS, make_batch
from rmt_trt.training.tasks.task import Batch, Document
from rmt_trt.training.tasks.words import FULL_STOP, ID, PLACES, REASONING_ID, TEMPLATES, text_of, tokenizer_json


@dataclass(frozen=True)
class SyntheticNoise:
    """Random sentences of the synthetic vocabulary, as a source of noise."""

    full_stop = FULL_STOP
    sentence_length = sum(len(template.split()) for template in TEMPLATES) / len(TEMPLATES)

    def draw_sentences(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids (n,) int64 of `count` sentences, and where each ends (count,) int64."""
        ids = sentences(draws, count)
        return ids, np.flatnonzero(ids == FULL_STOP) + 1

    def text_of(self, parts: Iterable[np.ndarray]) -> Iterator[str]:
        """Parts of ids -> parts of readable text."""
        return text_of(parts)


class SyntheticTask:
    """One task or several in turn in synthetic words; see the protocol `Task`.

    memorize and detect are those of `synthetic.py`. Reasoning has a few words more, and so has what is mixed with it.
    """

    labels = PLACES

    def __init__(self, kinds: Sequence[str]) -> None:
        """Errors: ContractError, for an unknown kind."""
        self.kinds = tuple(kinds)
        self._words = ID if set(self.kinds) <= set(TASKS) else REASONING_ID
        self._source = Source({kind: _told(kind) for kind in self.kinds}, SyntheticNoise())

    @property
    def name(self) -> str:
        """The kinds, with commas."""
        return ",".join(self.kinds)

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return len(self._words)

    @property
    def tokenizer(self) -> str:
        """tokenizer.json's text."""
        return tokenizer_json(self._words)

    @property
    def min_length(self) -> int:
        """Tokens of facts and question without noise, of the longest story."""
        return self._source.min_length

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The six places."""
        return tuple(ID[place] for place in PLACES)

    def document(self, length: int, seed: int, place: float | None = None) -> Document:
        """A document of exactly `length` tokens; see `Task.document`. Errors: ContractError."""
        kind = kind_of(self.kinds, seed)
        if kind not in TASKS:
            return self._source.document(length, seed, place)
        check_place(kind, place)
        document = make_document(kind, length, seed)
        if place is None:
            return document
        room = length - len(document.fact.fact) - QUESTION_LENGTH
        return make_document(kind, length, seed, round(place * room))

    def batch(self, rows: int, segments: int, segment_length: int, *seed: int, lean: float = 0.0) -> Batch:
        """`rows` documents of `segments` segments each. Errors: ContractError, where the facts find no room."""
        if self._words is ID:
            return make_batch(rows, segments, segment_length, *seed, tasks=self.kinds)
        return make_story_batch(self._source, rows, segments, segment_length, *seed, lean=lean)

    def describe(self, length: int | None = None) -> dict[str, Any]:
        """Plain values for reports. Synthetic noise is drawn word by word and never repeats as a whole."""
        value: dict[str, Any] = {"task": self.name, "text": None, "words": self.vocab_size}
        return value if length is None else {**value, "length": length}


def _told(kind: str) -> tuple[Told, ...]:
    if kind in TASKS:
        return tuple(Told((fact.fact,), fact.question, fact.answer) for fact in FACTS)
    return tuple(Told(tuple(_ids(fact) for fact in one.facts), _ids(one.question), one.label) for one in stories(kind))


def _ids(sentence: str) -> tuple[int, ...]:
    words = sentence.lower().replace(".", " .").replace("?", " ?").split()
    return tuple(REASONING_ID[word] for word in words)
