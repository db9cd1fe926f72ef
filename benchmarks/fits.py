"""Times by length: a fit of a + b n + c n^2, what it says beyond the measured lengths, and where two curves cross."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """seconds(n) = a + b n + c n^2, fitted to lengths up to `longest`. c is 0 for a curve that is linear by nature."""

    a: float
    b: float
    c: float
    longest: int

    def __call__(self, length: float) -> float:
        """Seconds at a length, measured or not."""
        return self.a + self.b * length + self.c * length * length


def fit(lengths: Sequence[int], seconds: Sequence[float], degree: int = 2) -> Curve | None:
    """The least squares of the relative errors; None with fewer points than coefficients, or if time would fall."""
    if len(set(lengths)) < degree + 1:
        return None
    n, t = np.asarray(lengths, float), np.asarray(seconds, float)
    scale = n.max()
    powers = np.stack([(n / scale) ** power / t for power in range(degree + 1)], axis=1)
    found = np.linalg.lstsq(powers, np.ones(len(n)), rcond=None)[0]
    a, b, c = (float(value) / scale**power for power, value in enumerate([*found, 0.0][:3]))
    if (c if degree == 2 else b) <= 0:
        return None
    return Curve(a, b, c, int(max(lengths)))


def interpolate(lengths: Sequence[int], seconds: Sequence[float]) -> Callable[[float], float]:
    """Seconds between measured lengths, straight in the logarithms; beyond them, those of the nearest end."""
    x, y = np.log(np.asarray(lengths, float)), np.log(np.asarray(seconds, float))
    return lambda length: float(np.exp(np.interp(np.log(length), x, y)))


def crossing(
    slow_start: Callable[[float], float], grows: Callable[[float], float], low: float, high: float
) -> float | None:
    """The smallest length from `low` to `high` from which `slow_start` takes no longer than `grows`; None if none does."""
    grid = np.geomspace(low, high, 400)
    faster = [slow_start(n) <= grows(n) for n in grid]
    if True not in faster:
        return None
    first = faster.index(True)
    if first == 0:
        return float(grid[0])
    left, right = float(grid[first - 1]), float(grid[first])
    for _ in range(50):
        middle = (left * right) ** 0.5
        left, right = (left, middle) if slow_start(middle) <= grows(middle) else (middle, right)
    return right
