"""The tasks in natural language: facts in the style of bAbI, hidden in a text of the user's (arXiv 2304.11062, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from rmt_trt.errors import ContractError
from rmt_trt.training.tasks.background import Background
from rmt_trt.training.tasks.documents import Source, StoryDocument, Told
from rmt_trt.training.tasks.facts import PLACES, Story, stories
from rmt_trt.training.tasks.running_text import RunningText
from rmt_trt.training.tasks.story_batches import make_story_batch
from rmt_trt.training.tasks.task import Batch


class TextTask:
    """One task or several in turn over a background; see the protocol `Task`."""

    labels = PLACES

    def __init__(self, kinds: Sequence[str], background: Background) -> None:
        """Errors: ContractError, for an unknown kind or a tokenizer that cannot tell the facts apart."""
        self.kinds = tuple(kinds)
        self.background = background
        self._source = Source(tell({kind: stories(kind) for kind in self.kinds}, background.words), background)

    @property
    def name(self) -> str:
        """The kinds, with commas."""
        return ",".join(self.kinds)

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return self.background.words.vocab_size

    @property
    def tokenizer(self) -> str:
        """tokenizer.json's text."""
        return self.background.words.json

    @property
    def min_length(self) -> int:
        """Tokens of facts and question without noise, of the longest story."""
        return self._source.min_length

    @cached_property
    def answer_ids(self) -> tuple[int, ...]:
        """The first token of each place as it stands in running text. Errors: ContractError, where two share it."""
        ids = tuple(one[0] for one in self.background.words.encode(PLACES))
        if len(set(ids)) < len(ids):
            raise ContractError(
                f"the tokenizer begins two of the answers with the same token: {dict(zip(PLACES, ids, strict=True))}; "
                "a language model cannot answer with one token. Use another tokenizer, or a classifier"
            )
        return ids

    def document(self, length: int, seed: int, place: float | None = None) -> StoryDocument:
        """A document of exactly `length` tokens; see `Task.document`. Errors: ContractError."""
        return self._source.document(length, seed, place)

    def batch(self, rows: int, segments: int, segment_length: int, *seed: int, lean: float = 0.0) -> Batch:
        """`rows` documents of `segments` segments each. Errors: ContractError, where the facts find no room."""
        return make_story_batch(self._source, rows, segments, segment_length, *seed, lean=lean)

    def describe(self, length: int | None = None) -> dict[str, Any]:
        """Plain values for reports; `repeats` is how often a document of `length` tokens repeats the background."""
        text = self.background
        value: dict[str, Any] = {
            "task": self.name,
            "text": text.name,
            "sha256": text.sha256,
            "part": list(text.part),
            "sentences": text.sentences,
            "tokens": text.tokens,
        }
        if length is not None:
            value |= {"length": length, "repeats": length / text.tokens}
        return value


def tell(of_kind: dict[str, tuple[Story, ...]], words: RunningText) -> dict[str, tuple[Told, ...]]:
    """Stories as ids. Errors: ContractError, where the ids of two stories are the same and their answers are not."""
    every = [story for kind in of_kind.values() for story in kind]
    sentences = sorted({sentence for story in every for sentence in (*story.facts, story.question)})
    ids = dict(zip(sentences, (tuple(one) for one in words.encode(sentences)), strict=True))
    seen: dict[tuple[object, ...], Story] = {}
    told: dict[str, tuple[Told, ...]] = {}
    for kind, some in of_kind.items():
        told[kind] = tuple(Told(tuple(ids[f] for f in story.facts), ids[story.question], story.label) for story in some)
        for story, one in zip(some, told[kind], strict=True):
            other = seen.setdefault((one.facts, one.question), story)
            if other.label != story.label:
                raise ContractError(
                    f"the tokenizer gives {_said(other)!r} and {_said(story)!r} the same ids, and their answers differ; use one "
                    "that knows these words"
                )
    return told


def _said(story: Story) -> str:
    return " ".join((*story.facts, story.question))
