"""Training batches: many short documents at once, already cut into segments. Numpy only.

A batch follows from (seed, step, number of segments) alone, so that a run that was stopped goes on with the very
batches that it would have seen.
"""

from __future__ import annotations

import numpy as np

from rmt_trt.contract import PAD
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.synthetic import LONGEST_FACT, MIN_LENGTH, QUESTION_LENGTH, fact_of, sentences
from rmt_trt.training.tasks.task import BATCHES, Batch
from rmt_trt.training.tasks.words import FULL_STOP, SIZE, UNK_ID

# Shares of the rows, out of 16. The memorize task is half of all; a quarter of the documents fill their segments.
# A quarter is cut with the short segment last, so that a model serves streams of unknown length too, and a quarter
# has words that the vocabulary lacks, as a user's own text will.
SIXTEENTHS = 16
MEMORIZE, FULL, SHORT_LAST, UNKNOWN = 8, 4, 4, 4

_FACTS = [
    fact_of(name, mover, bool(back), place)
    for name in range(SIZE["name"])
    for mover in range(SIZE["mover"])
    for back in range(2)
    for place in range(SIZE["place"])
]
_FACT_IDS = np.array([fact.fact + (PAD,) * (LONGEST_FACT - len(fact.fact)) for fact in _FACTS], dtype=np.int64)
_FACT_LENGTH = (_FACT_IDS != PAD).sum(axis=1)
_QUESTION_IDS = np.array([fact.question for fact in _FACTS], dtype=np.int64)
_ANSWER = np.array([fact.answer for fact in _FACTS], dtype=np.int64)


def make_batch(rows: int, segments: int, segment_length: int, *seed: int) -> Batch:
    """`rows` documents of `segments` segments each, tasks, lengths and places of the fact mixed."""
    draws = Draws(BATCHES, *seed)
    capacity = segments * segment_length
    least = max(MIN_LENGTH, capacity - segment_length + 1)
    length = least + _below(draws, capacity - least + 1, rows)
    length[_share(draws, FULL, rows)] = capacity
    which = _below(draws, len(_FACTS), rows)
    last = length - _FACT_LENGTH[which] - QUESTION_LENGTH
    position = _below(draws, last + 1, rows)
    position[_share(draws, MEMORIZE, rows)] = 0

    text = _noise_rows(draws, rows, capacity)
    _write(text, which, position, length)
    short_last = _share(draws, SHORT_LAST, rows)
    cut = _cut(text, length, segment_length, short_last)
    return Batch(cut.reshape(rows, segments, segment_length).transpose(1, 0, 2), _ANSWER[which])


def _noise_rows(draws: Draws, rows: int, width: int) -> np.ndarray:
    """Noise (rows, width); in a quarter of the rows, up to half of the words are unknown ones."""
    need = rows * width
    noise = sentences(draws, need // 8)
    while len(noise) < need:
        noise = np.concatenate([noise, sentences(draws, need // 32 + 8)])
    noise = noise[:need].reshape(rows, width)
    rate = np.where(_share(draws, UNKNOWN, rows), _below(draws, 1 << 15, rows), 0)
    unknown = _below(draws, 1 << 16, need).reshape(rows, width) < rate[:, None]
    return np.where(unknown, UNK_ID, noise)


def _write(text: np.ndarray, which: np.ndarray, position: np.ndarray, length: np.ndarray) -> None:
    """Puts fact and question into each row, and a full stop before each of them where there is noise."""
    row = np.arange(len(text))
    question = length - QUESTION_LENGTH
    for border in (position, question):
        begun = border > 0
        text[row[begun], border[begun] - 1] = FULL_STOP
    for column in range(LONGEST_FACT):
        ids = _FACT_IDS[which, column]
        used = ids != PAD
        text[row[used], position[used] + column] = ids[used]
    for column in range(QUESTION_LENGTH):
        text[row, question + column] = _QUESTION_IDS[which, column]


def _cut(text: np.ndarray, length: np.ndarray, segment_length: int, short_last: np.ndarray) -> np.ndarray:
    """Rows (b, n * s) -> the same with the short segment first, or last where `short_last`, padded with -1."""
    capacity = text.shape[1]
    place = np.arange(capacity)[None, :]
    length = length[:, None]
    missing = capacity - length
    source_first = np.where(place < segment_length - missing, place, place - missing)
    padding_first = (place >= segment_length - missing) & (place < segment_length)
    source = np.where(short_last[:, None], place, source_first)
    padding = np.where(short_last[:, None], place >= length, padding_first)
    return np.where(padding, PAD, np.take_along_axis(text, source, axis=1))


def _below(draws: Draws, bound: int | np.ndarray, count: int) -> np.ndarray:
    return draws.below(bound, count).astype(np.int64)


def _share(draws: Draws, sixteenths: int, rows: int) -> np.ndarray:
    return _below(draws, SIXTEENTHS, rows) < sixteenths
