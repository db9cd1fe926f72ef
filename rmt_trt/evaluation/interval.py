"""The confidence interval of a share that was counted."""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95


def wilson(right: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """(low, high) of the share of right answers, `right` of `count`, each 0 to 1.

    The score interval of E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of
    the American Statistical Association 22 (1927), 209-212, without a correction for continuity. With p = right / count,
    n = count and z the (1 + confidence) / 2 quantile of the normal distribution:

        (p + z^2 / 2n -+ z * sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    It stays within 0 to 1 and has a width where all or no answers were right. Errors: ValueError.
    """
    if not 0 <= right <= count or count < 1 or not 0 < confidence < 1:
        raise ValueError(f"an interval of {right} of {count} at {confidence}; expected 0 <= right <= count, count > 0")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, z2 = right / count, z * z / count
    middle, half = p + z2 / 2, math.sqrt(z2 * (p * (1 - p) + z2 / 4))
    # At the ends the two terms are equal, and rounding must not leave the range.
    low = 0.0 if right == 0 else (middle - half) / (1 + z2)
    high = 1.0 if right == count else (middle + half) / (1 + z2)
    return low, high
