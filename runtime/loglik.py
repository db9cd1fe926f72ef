"""Log-likelihood per token of a language model, from logits, in numpy."""

from __future__ import annotations

import numpy as np


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
