"""Does an error along a recurrence saturate, grow or die out? The judgement of a drift curve (docs/verification.md).

The error after segment n is taken to go as n ** rate. The rate is the slope of a straight line through the medians of
octaves of segments (8 to 15, 16 to 31, ...) in log-log space; numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["saturates", "grows", "dies out", "too few to say", "not finite"]

LEAST = 8  # segments that an octave needs to be judged by; in the first few the memory itself still settles
FEWEST, MOST = 3, 4  # octaves that a line goes through: the last ones, since a beginning says little of the end
# Errors that are independent, and never forgotten, add up to the square root of their number. That is the slowest way in
# which errors pile up. Half of it is nearer to a level than to that, and is called one.
PILING_UP, LEVEL = 0.5, 0.25
SURE = 2.0  # standard errors
FLOOR = (
    1e-12  # below it an error is as good as none: of float32 values, one that rounds otherwise in a thousand makes more
)
REACH = 10.0  # doublings beyond the last segment that a line is followed
MEDIAN = 1.2533  # standard error of a median, by that of a mean, of normal values
QUARTILES = 1.349  # distance of the quartiles of normal values, in standard deviations


@dataclass(frozen=True)
class Level:
    """An error in the segments `first` to `last`, counted from 1: median, largest, and the standard error of the median
    in doublings (log2). nan where an error is not finite."""

    first: int
    last: int
    median: float
    noise: float
    largest: float


@dataclass(frozen=True)
class Trend:
    """What became of an error along a recurrence, and the figures that this rests on.

    kind      "saturates", "grows", "dies out", "too few to say", "not finite"
    rate      doublings of the error with each doubling of the segments; noise: how far it may be off
    segments  how many were gone through; first: the first one that the line rests on
    level     the error on the line after the last segment; 0 where the last octave has none
    largest   in the octaves that the line rests on: medians say nothing of single segments
    crossing  segments after which the line crosses the tolerance, upwards where it grows, downwards where it dies out;
              earliest: at the fastest rate within the noise. None where it does not within 1,024 times the segments
    """

    kind: Kind
    segments: int
    first: int | None = None
    rate: float | None = None
    noise: float | None = None
    level: float | None = None
    largest: float | None = None
    tolerance: float | None = None
    crossing: float | None = None
    earliest: float | None = None

    @property
    def words(self) -> str:
        """The judgement in words, to be put behind the name of what was judged."""
        if self.kind == "not finite":
            return "is not finite"
        if self.kind == "too few to say":
            return f"cannot be judged: {self.segments:,} segments are too few to say what becomes of it"
        if self.rate is None or self.level is None or self.largest is None:
            return self.kind
        if self.level == 0:
            return f"{self.kind}: none after {self.segments:,} segments"
        factor = f"times {2**self.rate:.2f} with each doubling of the segments"
        after = f"{self.level:.1e} after {self.segments:,} segments, {self.largest:.1e} in the worst"
        return f"{self.kind}: {factor}, {after}{self._outlook()}"

    def _outlook(self) -> str:
        if self.tolerance is None or self.level is None or self.kind == "saturates":
            return ""
        beyond = self.level > self.tolerance
        if beyond != (self.kind == "dies out"):
            return f"; beyond the tolerance of {self.tolerance:.1e} already" if beyond else ""
        if self.crossing is None:
            stays = "above" if beyond else "below"
            return f"; at that rate it stays {stays} {self.tolerance:.1e} for {2**REACH:,.0f} times as many"
        falls = "falls below" if beyond else "passes"
        early = "" if self.earliest is None else f", {_rounded(self.earliest)} at the earliest"
        return f"; at that rate it {falls} {self.tolerance:.1e} after some {_rounded(self.crossing)}{early}"


def level(errors: Sequence[float] | np.ndarray, first: int) -> Level:
    """What the errors after segment `first` and those behind it come to."""
    values = np.asarray(errors, np.float64)
    last = first + len(values) - 1
    if not np.isfinite(values).all():
        return Level(first, last, math.nan, math.nan, math.nan)
    logs = np.log2(np.maximum(values, FLOOR))
    return Level(first, last, float(np.median(values)), _noise(logs, first), float(values.max()))


def octaves(errors: Sequence[float] | np.ndarray) -> tuple[Level, ...]:
    """The levels of a whole curve, an error for each segment: of 1, of 2 and 3, of 4 to 7, ..."""
    starts = [1 << power for power in range(len(errors).bit_length())]
    return tuple(level(errors[start - 1 : 2 * start - 1], start) for start in starts)


def judge(levels: Sequence[Level], tolerance: float | None = None) -> Trend:
    """The trend of a curve out of its octaves in order; tolerance: of the error, for the outlook."""
    segments = levels[-1].last if levels else 0
    if not all(math.isfinite(one.median) for one in levels):
        return Trend("not finite", segments, tolerance=tolerance)
    used = [one for one in levels if one.last - one.first + 1 >= LEAST][-MOST:]
    if len(used) < FEWEST:
        return Trend("too few to say", segments, tolerance=tolerance)
    rate, noise, end = _line(used, segments)
    largest = max(one.largest for one in used)
    if used[-1].median <= FLOOR:
        ended: Kind = "dies out" if any(one.median > FLOOR for one in levels) else "saturates"
        return Trend(ended, segments, used[0].first, rate, noise, 0.0, largest, tolerance)
    kind = _kind(rate, noise)
    crossing = earliest = None
    if kind in ("grows", "dies out"):
        crossing = _crossing(segments, end, rate, tolerance)
        earliest = _crossing(segments, end, rate + math.copysign(noise, rate), tolerance)
    return Trend(kind, segments, used[0].first, rate, noise, float(2**end), largest, tolerance, crossing, earliest)


def _kind(rate: float, noise: float) -> Kind:
    if abs(rate) > LEVEL and abs(rate) > noise:
        return "grows" if rate > 0 else "dies out"
    # Noise that could hide an error that piles up is no level.
    return "saturates" if abs(rate) <= LEVEL and abs(rate) + noise < PILING_UP else "too few to say"


def _line(levels: Sequence[Level], segments: int) -> tuple[float, float, float]:
    """(rate, its noise, log2 of the error after the last segment) of the least squares line through octaves' medians.

    The noise is SURE standard errors: of the medians, and of how far they lie off the line.
    """
    places = np.log2([(one.first + one.last) / 2 for one in levels])
    logs = np.log2([max(one.median, FLOOR) for one in levels])
    aside = places - places.mean()
    weights = aside / (aside @ aside)
    rate = float(weights @ logs)
    off = logs - logs.mean() - rate * aside
    scatter = float(off @ off) / (len(levels) - 2) / float(aside @ aside)
    medians = float(((weights * [one.noise for one in levels]) ** 2).sum())
    end = float(logs.mean() + rate * (math.log2(segments) - places.mean()))
    return rate, SURE * math.sqrt(medians + scatter), end


def _noise(logs: np.ndarray, first: int) -> float:
    """Standard error of the median, in which a trend within the octave has no part. Neighbours along a recurrence resemble
    each other, so that n of them say less than n values that are drawn anew."""
    if len(logs) < LEAST:
        return 0.0  # too few to tell noise from a trend; no line goes through these
    places = np.log2(np.arange(first, first + len(logs)))
    places -= places.mean()
    left = logs - logs.mean()
    left -= places * float(places @ left) / float(places @ places)
    spread = float(np.subtract(*np.percentile(left, [75, 25]))) / QUARTILES
    square = float(left @ left)
    likeness = min(max(float(left[:-1] @ left[1:]) / square, 0.0), 0.99) if square > 0 else 0.0
    return MEDIAN * spread * math.sqrt((1 + likeness) / (1 - likeness) / len(logs))


def _crossing(segments: int, end: float, rate: float, tolerance: float | None) -> float | None:
    """Segments after which the line through `end` crosses the tolerance, if that lies ahead and not too far."""
    if tolerance is None:
        return None
    doublings = (math.log2(tolerance) - end) / rate
    return segments * 2**doublings if 0 <= doublings <= REACH else None


def _rounded(segments: float) -> str:
    """Two digits: a line says no more."""
    unit = 10 ** max(0, int(math.log10(max(segments, 1))) - 1)
    return f"{round(segments / unit) * unit:,}"
