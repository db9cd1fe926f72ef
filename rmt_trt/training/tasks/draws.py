"""Random numbers that are the same in every version of numpy."""

from __future__ import annotations

import numpy as np


class Draws:
    """A stream of uniform random numbers, the same in every version of numpy.

    PCG64 and its seeding are frozen by numpy, the methods of `Generator` are not: hence whole numbers are made
    here from the raw bits.
    """

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def below(self, bound: int | np.ndarray, count: int) -> np.ndarray:
        """`count` numbers uint64, 0 <= number < bound; bound below 2**32, one for all or one for each."""
        raw = self._bits.random_raw((count + 1) // 2).view(np.uint32)[:count]
        numbers: np.ndarray = (raw.astype(np.uint64) * np.asarray(bound, dtype=np.uint64)) >> np.uint64(32)
        return numbers

    def below_any(self, bound: int) -> int:
        """One number below a bound of up to 2**62, made of two."""
        high, low = (int(n) for n in self.below(1 << 31, 2))
        return ((high << 31 | low) * bound) >> 62
