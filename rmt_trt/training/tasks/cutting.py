"""How training documents are cut into segments: their lengths, and which segment is the short one. Numpy only."""

from __future__ import annotations

import numpy as np

from rmt_trt.contract import PAD
from rmt_trt.errors import ContractError
from rmt_trt.training.tasks.draws import Draws

# Shares of the rows, out of 16. A quarter of the documents fill their segments. A quarter is cut with the short
# segment last, so that a model serves streams of unknown length too.
SIXTEENTHS = 16
FULL, SHORT_LAST = 4, 4


def lengths_of(draws: Draws, rows: int, segments: int, segment_length: int, least: int) -> np.ndarray:
    """Lengths (rows,) int64 of documents that take `segments` segments each: a quarter of them fills these.

    Errors: ContractError, when there is no room for `least` tokens, those of facts and question.
    """
    capacity = segments * segment_length
    if min(rows, segments, segment_length) < 1 or capacity < least:
        raise ContractError(
            f"a batch of {rows} documents in {segments} segments of {segment_length} tokens was asked for; expected at "
            f"least one of each, and room for {least} tokens, those of facts and question"
        )
    least = max(least, capacity - segment_length + 1)
    length = least + below(draws, capacity - least + 1, rows)
    length[share(draws, FULL, rows)] = capacity
    return length


def short_last(draws: Draws, rows: int) -> np.ndarray:
    """Whether a row's short segment is its last one (rows,) bool; else it is the first."""
    return share(draws, SHORT_LAST, rows)


def cut(text: np.ndarray, length: np.ndarray, segment_length: int, short_last: np.ndarray) -> np.ndarray:
    """Rows (b, n * s), of which `length` (b,) tokens count, -> segments (n, b, s), the short one padded with -1."""
    rows, capacity = text.shape
    place = np.arange(capacity)[None, :]
    length = length[:, None]
    missing = capacity - length
    source_first = np.where(place < segment_length - missing, place, place - missing)
    padding_first = (place >= segment_length - missing) & (place < segment_length)
    source = np.where(short_last[:, None], place, source_first)
    padding = np.where(short_last[:, None], place >= length, padding_first)
    whole = np.where(padding, PAD, np.take_along_axis(text, source, axis=1))
    return whole.reshape(rows, -1, segment_length).transpose(1, 0, 2)


def below(draws: Draws, bound: int | np.ndarray, count: int) -> np.ndarray:
    """`count` random numbers int64 below a bound, one for all or one for each."""
    return draws.below(bound, count).astype(np.int64)


def share(draws: Draws, sixteenths: int, rows: int) -> np.ndarray:
    """A random share of the rows (rows,) bool."""
    return below(draws, SIXTEENTHS, rows) < sixteenths
