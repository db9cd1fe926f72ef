"""Training batches of the documents that `documents.py` makes one by one: the same kinds of text, other random numbers."""

from __future__ import annotations

import numpy as np

from rmt_trt.training.tasks.cutting import below, cut, lengths_of, short_last
from rmt_trt.training.tasks.documents import Noise, Source, Told, positions_of
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.task import BATCHES, Batch


def make_story_batch(
    source: Source, rows: int, segments: int, segment_length: int, *seed: int, lean: float = 0.0
) -> Batch:
    """`rows` documents of `segments` segments each, kinds, lengths and places mixed; `lean` as in `Task.batch`.

    Errors: ContractError.
    """
    draws = Draws(BATCHES, *seed)
    length = lengths_of(draws, rows, segments, segment_length, source.min_length)
    kinds = [source.kinds[int(kind)] for kind in below(draws, len(source.kinds), rows)]
    which = below(draws, np.array([len(source.stories[kind]) for kind in kinds]), rows)
    if lean:
        turned = (below(draws, 1 << 16, rows) < lean * (1 << 16)) & np.array([kind == "reasoning" for kind in kinds])
        which = which | turned  # of two stories with the same facts the second asks for the north or the east
    told = [source.stories[kind][int(one)] for kind, one in zip(kinds, which, strict=True)]
    room = length - np.array([story.length for story in told])
    gaps = below(draws, np.repeat(room + 1, 2), 2 * rows).reshape(rows, 2)
    gaps[[kind == "memorize" for kind in kinds]] = 0
    last = short_last(draws, rows)

    text = np.zeros((rows, segments * segment_length), np.int64)
    feed = _Feed(source.noise, draws, int(room.sum()))
    for row, story in enumerate(told):
        _write(text[row], story, sorted(gaps[row, : len(story.facts)].tolist()), int(length[row]), feed)
    return Batch(cut(text, length, segment_length, last), np.array([story.label for story in told], np.int64))


def _write(text: np.ndarray, story: Told, gaps: list[int], length: int, feed: _Feed) -> None:
    at = 0
    question = length - len(story.question)
    for position, fact in zip(positions_of(story, gaps), story.facts, strict=True):
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
