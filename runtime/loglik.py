"""What a step's logits are reduced to in numpy: the last token's row, and the log-likelihood of each token."""

from __future__ import annotations

import numpy as np

from rmt_trt.contract import Answer, Head, LogitsKind


def log_likelihood(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """log p(ids[i]) under the softmax of logits[i]. logits (n, v), ids (n,) -> (n,) float64, in nats.

    The sum of exponentials is accumulated in float64; each row is treated alone, so that a value does not depend on
    which rows are computed together.
    """
    if not len(ids):
        return np.empty(0)
    top = logits.max(axis=1)
    total = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(ids)), ids].astype(np.float64)
    scores: np.ndarray = chosen - top - np.log(total)
    return scores


def last_rows(logits: np.ndarray, segment: np.ndarray, kind: LogitsKind) -> np.ndarray:
    """The logits of each row's last text token, (batch, c) or (batch, v), the caller's own.

    logits (batch, c), or (batch, s, v) of a language model; segment (batch, s), ids below 0 are padding at a row's end.
    A row that is padding from the start has no last token: what is given for it means nothing.
    """
    if kind == "classifier":
        return logits.copy()
    last = np.maximum((segment >= 0).sum(axis=1) - 1, 0)
    rows: np.ndarray = logits[np.arange(len(segment)), last]
    return rows


def token_scores(logits: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Log-likelihood of each token given those before it in its row: (batch, s) float64, in nats.

    nan in the first column, whose token the previous segment's last row scores, and at padding.
    logits (batch, s, v); segment (batch, s), ids below 0 are padding at a row's end.
    """
    scores = np.full(segment.shape, np.nan)
    for row, (rows, ids, count) in enumerate(zip(logits, segment, (segment >= 0).sum(axis=1), strict=True)):
        scores[row, 1:count] = log_likelihood(rows[: max(count - 1, 0)], ids[1:count])
    return scores


def reduced(logits: np.ndarray, segment: np.ndarray, head: Head, kind: LogitsKind) -> Answer:
    """What a head other than "none" says, out of the logits of a whole step: for engines that compute all of them."""
    if head == "all":
        return Answer(logits)
    rows = last_rows(logits, segment, kind)
    return Answer(rows, token_scores(logits, segment) if head == "loglik" else None)
