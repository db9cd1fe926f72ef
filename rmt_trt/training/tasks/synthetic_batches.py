"""Training batches: many short documents at once, already cut into segments. Numpy only.

A batch follows from (seed, step, number of segments) alone, so that a run that was stopped goes on with the very
batches that it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rmt_trt.contract import PAD
from rmt_trt.training.tasks.cutting import SIXTEENTHS, below, cut, lengths_of, share, short_last
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.synthetic import LONGEST_FACT, MIN_LENGTH, QUESTION_LENGTH, TASKS, fact_of, sentences
from rmt_trt.training.tasks.task import BATCHES, Batch
from rmt_trt.training.tasks.words import FULL_STOP, SIZE, UNK_ID

# Shares of the rows, out of 16. The memorize task is half of all where both are mixed; a quarter has words that the
# vocabulary lacks, as a user's own text will.
MEMORIZE, UNKNOWN = 8, 4

FACTS = [
    fact_of(name, mover, bool(back), place)
    for name in range(SIZE["name"])
    for mover in range(SIZE["mover"])
    for back in range(2)
    for place in range(SIZE["place"])
]
_FACT_IDS = np.array([fact.fact + (PAD,) * (LONGEST_FACT - len(fact.fact)) for fact in FACTS], dtype=np.int64)
_FACT_LENGTH = (_FACT_IDS != PAD).sum(axis=1)
_QUESTION_IDS = np.array([fact.question for fact in FACTS], dtype=np.int64)
_ANSWER = np.array([fact.answer for fact in FACTS], dtype=np.int64)


def make_batch(rows: int, segments: int, segment_length: int, *seed: int, tasks: Sequence[str] = TASKS) -> Batch:
    """`rows` documents of `segments` segments each, tasks, lengths and places of the fact mixed. Errors: ContractError."""
    draws = Draws(BATCHES, *seed)
    length = lengths_of(draws, rows, segments, segment_length, MIN_LENGTH)
    which = below(draws, len(FACTS), rows)
    last = length - _FACT_LENGTH[which] - QUESTION_LENGTH
    position = below(draws, last + 1, rows)
    memorize = (MEMORIZE if "detect" in tasks else SIXTEENTHS) if "memorize" in tasks else 0
    position[share(draws, memorize, rows)] = 0

    text = _noise_rows(draws, rows, segments * segment_length)
    _write(text, which, position, length)
    return Batch(cut(text, length, segment_length, short_last(draws, rows)), _ANSWER[which])


def _noise_rows(draws: Draws, rows: int, width: int) -> np.ndarray:
    """Noise (rows, width); in a quarter of the rows, up to half of the words are unknown ones."""
    need = rows * width
    noise = sentences(draws, need // 8)
    while len(noise) < need:
        noise = np.concatenate([noise, sentences(draws, need // 32 + 8)])
    noise = noise[:need].reshape(rows, width)
    rate = np.where(share(draws, UNKNOWN, rows), below(draws, 1 << 15, rows), 0)
    unknown = below(draws, 1 << 16, need).reshape(rows, width) < rate[:, None]
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
