"""What the rows of a run say about each other: ratios, extrapolations, shares. Plain functions of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rmt_trt.benchmarks.fits import Curve, crossing, fit, interpolate
from rmt_trt.benchmarks.ours import OURS
from rmt_trt.benchmarks.rows import Row

LONGEST_CROSSING = 1e8


@dataclass(frozen=True)
class Ratio:
    """A peer beside ours at one batch size; `times` is how many times as fast ours is."""

    name: str
    batch: int
    ours_seconds: float
    seconds: float | None
    times: float | None
    failed: str = ""

    @property
    def group(self) -> str:
        """The group that the peer is a variant of."""
        return self.name.split(": ")[0]

    @property
    def variant(self) -> str:
        """Its name within the group."""
        return self.name.split(": ")[-1]


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Every peer's step beside ours of the same batch size, by batch, the fastest peer first, failures last."""
    steps = [row for row in rows if row.kind == "step"]
    ours = {row.batch: row.per_segment for row in steps if row.name == OURS and row.per_segment}
    found = []
    for row in steps:
        mine = ours.get(row.batch)
        if row.name == OURS or mine is None:
            continue
        each = row.per_segment
        if f"{OURS}_seconds" in row.values and row.segments:  # taken in turn with this peer
            mine = row.values[f"{OURS}_seconds"] / row.segments
        found.append(Ratio(row.name, row.batch, mine, each, each / mine if each else None, row.failed))
    return sorted(found, key=lambda one: (one.batch, one.seconds if one.seconds is not None else float("inf")))


def best_peer(rows: Sequence[Row], batch: int) -> Ratio | None:
    """The fastest peer at a batch size that ran, or None."""
    return next((one for one in ratios(rows) if one.batch == batch and one.seconds is not None), None)


def best_of_groups(rows: Sequence[Row], batch: int) -> list[Ratio]:
    """Of each group of peers its fastest variant that ran at a batch size, the fastest group first."""
    best: dict[str, Ratio] = {}
    for one in ratios(rows):
        if one.batch == batch and one.seconds is not None:
            best.setdefault(one.group, one)
    return list(best.values())


@dataclass(frozen=True)
class FullAttention:
    """Full attention by length: the measured points, the curve through them, and where ours becomes faster."""

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    curve: Curve | None
    crossing: float | None

    def at(self, length: int) -> tuple[float, bool] | None:
        """(seconds, whether they are extrapolated) of a pass over `length` tokens; None where nothing can be said."""
        if not self.lengths:
            return None
        if min(self.lengths) <= length <= max(self.lengths):
            return interpolate(self.lengths, self.seconds)(length), False
        return None if self.curve is None else (self.curve(length), True)


def full_attention(rows: Sequence[Row]) -> FullAttention:
    """What the rows of full attention say, beside ours by length."""
    points = [(row.tokens, row.timing.median) for row in rows if row.kind == "full" and row.timing is not None]
    lengths, seconds = tuple(n for n, _ in points), tuple(s for _, s in points)
    curve = fit(lengths, seconds)
    return FullAttention(lengths, seconds, curve, _crossing(lengths, seconds, curve, our_curve(rows)))


def our_curve(rows: Sequence[Row]) -> Callable[[float], float] | None:
    """Seconds of ours by length, a + b n through the measured lengths."""
    points = [(row.tokens, row.timing.median) for row in rows if row.kind == "length" and row.timing is not None]
    return fit([n for n, _ in points], [s for _, s in points], degree=1)


def _crossing(
    lengths: tuple[int, ...], seconds: tuple[float, ...], curve: Curve | None, ours: Callable[[float], float] | None
) -> float | None:
    if not lengths or ours is None:
        return None
    measured = interpolate(lengths, seconds)

    def full(length: float) -> float:
        return curve(length) if curve is not None and length > max(lengths) else measured(length)

    high = LONGEST_CROSSING if curve is not None else max(lengths)
    return crossing(ours, full, min(lengths), high) if high > min(lengths) else None
