"""The judgement of a drift curve, on curves whose end is known, and what a report keeps of a long run."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmt_trt.commands.report import drift_table
from rmt_trt.export.drift import LEVEL, Level, judge, level, octaves
from rmt_trt.export.drift_report import Curve, Drift, Report, Same, cosine

FEW = 39  # segments from which on a curve is judged: 8 to 15, 16 to 31, 32 to 39


def segments(count: int) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.float64)


def shaken(curve: np.ndarray, doublings: float, seed: int, likeness: float = 0.0) -> np.ndarray:
    """The curve with noise of so many doublings; likeness: correlation of neighbours."""
    new = np.random.default_rng(seed).normal(size=len(curve))
    steps = list(itertools.accumulate(new, lambda before, one: likeness * before + math.sqrt(1 - likeness**2) * one))
    return np.asarray(curve * 2 ** (doublings * np.array(steps)))


# What is left of the exponents' range is clear of the rule's own borders.
RISING, LEVELS = st.floats(0.45, 3), st.floats(1e-8, 1e-1)
LENGTHS, SEEDS = st.integers(300, 3000), st.integers(0, 1 << 30)


@settings(max_examples=60)
@given(LEVELS, LENGTHS, SEEDS)
def test_an_error_that_stays_at_a_level_saturates_at_it(error: float, count: int, seed: int) -> None:
    found = judge(octaves(shaken(np.full(count, error), 0.2, seed)), 2 * error)
    assert found.kind == "saturates"
    assert found.level == pytest.approx(error, rel=0.2)
    assert found.crossing is None
    assert found.words.startswith("saturates: times ")
    assert f", {found.level:.1e} after {count:,} segments, " in found.words
    assert "at that rate" not in found.words


@settings(max_examples=60)
@given(RISING, LENGTHS, SEEDS, st.booleans())
def test_a_power_law_grows_or_dies_out_at_its_own_rate(rate: float, count: int, seed: int, dies: bool) -> None:
    sign = -1 if dies else 1
    found = judge(octaves(shaken((1.0 if dies else 1e-5) * segments(count) ** (sign * rate), 0.1, seed)))
    assert found.kind == ("dies out" if dies else "grows")
    assert found.rate == pytest.approx(sign * rate, abs=0.1)
    assert f"times {2**found.rate:.2f} with each doubling" in found.words


@settings(max_examples=40)
@given(SEEDS, st.floats(1e-3, 1e3))
def test_the_unit_of_an_error_changes_nothing_but_its_level(seed: int, unit: float) -> None:
    errors = shaken(1e-5 * segments(200) ** 0.2, 0.5, seed)
    one, other = judge(octaves(errors)), judge(octaves(unit * errors))
    assert (one.kind, one.first) == (other.kind, other.first)
    assert other.rate == pytest.approx(one.rate)
    assert other.level == pytest.approx(unit * (one.level or math.nan))


CURVES = {
    "rises at first, then stays": (1e-3 * (1 - np.exp(-segments(2000) / 50)), "saturates"),
    "rises, and the run ends there": (1e-3 * (1 - np.exp(-segments(60) / 50)), "grows"),
    "exponential": (1e-7 * np.exp(segments(500) / 50), "grows"),
    "decays": (1e-3 * np.exp(-segments(500) / 50), "dies out"),
    "decays to a level": (1e-3 * np.exp(-segments(4000) / 50) + 1e-6, "saturates"),
    "decays to nothing at all": (np.where(segments(500) < 20, 1e-3, 0.0), "dies out"),
    "reaches nothing late": (np.where(segments(500) < 250, 1e-3 / segments(500), 0.0), "dies out"),
    "none at all": (np.zeros(100), "saturates"),
    "a single large one": (np.where(segments(300) == 200, 0.5, 1e-6), "saturates"),
    "slower than errors that pile up": (1e-6 * np.log2(1 + segments(3000)), "saturates"),
    "like errors that pile up": (1e-6 * np.sqrt(segments(300)), "grows"),
    "one is nan": (np.where(segments(300) == 2, np.nan, 1e-6), "not finite"),
    "the last is infinite": (np.where(segments(300) == 300, np.inf, 1e-6), "not finite"),
    "too short": (1e-6 * segments(FEW - 1), "too few to say"),
    "just long enough": (1e-6 * segments(FEW), "grows"),
    "no segment": (np.empty(0), "too few to say"),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_of_each_kind(name: str) -> None:
    errors, kind = CURVES[name]
    found = judge(octaves(errors))
    assert found.kind == kind
    assert found.segments == len(errors)
    if not np.any(errors[-8:]) and len(errors):
        assert found.words == f"{kind}: none after {len(errors)} segments"
    judged = kind not in ("too few to say", "not finite")
    assert [value is not None for value in (found.rate, found.noise, found.level, found.first)] == [judged] * 4


@pytest.mark.parametrize("likeness", [0.0, 0.7])
def test_the_noise_of_a_rate_is_how_far_it_is_off(likeness: float) -> None:
    found = [judge(octaves(shaken(1e-5 * np.sqrt(segments(600)), 0.5, seed, likeness))) for seed in range(200)]
    off = np.array([abs((trend.rate or 0) - 0.5) for trend in found])
    noise = np.array([trend.noise for trend in found])
    assert (off <= noise).mean() >= 0.8
    assert np.median(noise) < 5 * np.median(off)


@pytest.mark.parametrize("likeness", [0.0, 0.7, 0.9])
def test_the_noise_of_a_median_is_how_far_medians_differ(likeness: float) -> None:
    found = [level(shaken(1e-5 * segments(1023) ** 2, 0.5, seed, likeness)[511:], 512) for seed in range(300)]
    differ = np.log2([one.median for one in found]).std()
    assert np.median([one.noise for one in found]) == pytest.approx(differ, rel=0.25)


@pytest.mark.parametrize(("doublings", "likeness"), [(0.5, 0.0), (1.0, 0.0), (0.5, 0.9)])
@pytest.mark.parametrize("count", [64, 512])
def test_noise_is_seldom_taken_for_a_trend(doublings: float, likeness: float, count: int) -> None:
    kinds = [judge(octaves(shaken(np.full(count, 1e-6), doublings, seed, likeness))).kind for seed in range(100)]
    false = sum(kind in ("grows", "dies out") for kind in kinds)
    assert false <= (25 if likeness and count < 100 else 8)
    if count > 100 and not likeness:
        assert kinds.count("saturates") >= 90


def test_a_level_is_only_claimed_where_noise_could_not_hide_errors_that_pile_up() -> None:
    quiet = [Level(first, 2 * first - 1, 1e-6, 0.1, 2e-6) for first in (8, 16, 32)]
    assert judge(quiet).kind == "saturates"
    assert judge([replace(one, noise=0.5) for one in quiet]).kind == "too few to say"
    wild = judge(octaves(shaken(np.full(64, 1e-6), 3.0, 1)))
    assert wild.kind == "too few to say"
    assert wild.words == "cannot be judged: 64 segments are too few to say what becomes of it"
    assert wild.rate is not None
    assert wild.noise is not None
    assert wild.noise > LEVEL


def test_single_segments_move_no_median_and_are_told() -> None:
    errors = np.full(300, 1e-6)
    errors[[4, 200, 201]] = 0.9, 0.5, 0.4
    found = judge(octaves(errors), 1e-4)
    assert (found.kind, found.largest) == ("saturates", 0.5)
    assert found.words.endswith("1.0e-06 after 300 segments, 5.0e-01 in the worst")


def test_the_outlook_is_where_the_line_crosses_the_tolerance() -> None:
    root = judge(octaves(1e-6 * np.sqrt(segments(512))), 1e-4)
    assert root.crossing == pytest.approx(10_000, rel=0.02)
    assert root.earliest is not None
    assert root.crossing is not None
    assert 9_000 < root.earliest <= root.crossing
    assert (
        "2.3e-05 after 512 segments, 2.3e-05 in the worst; at that rate it passes 1.0e-04 after some 10,000, "
        in root.words
    )
    far = judge(octaves(1e-9 * np.sqrt(segments(512))), 1e-4)
    assert (far.kind, far.crossing) == ("grows", None)
    assert far.words.endswith("at that rate it stays below 1.0e-04 for 1,024 times as many")
    over = judge(octaves(1e-3 * np.sqrt(segments(512))), 1e-4)
    assert over.crossing is None
    assert over.words.endswith("; beyond the tolerance of 1.0e-04 already")
    falling = judge(octaves(1.0 / segments(512)), 1e-4)
    assert falling.crossing == pytest.approx(10_000, rel=0.03)
    assert "; at that rate it falls below 1.0e-04 after some 10,000" in falling.words
    low = judge(octaves(1e-5 / segments(512)), 1e-4)
    assert low.crossing is None
    assert (
        low.words
        == f"dies out: times 0.50 with each doubling of the segments, {low.level:.1e} after 512 segments, {low.largest:.1e} in the worst"
    )
    assert "tolerance" not in judge(octaves(1e-6 * segments(512))).words


def report(errors: np.ndarray, tolerance: float | None = 1e-2, needed: float | None = None) -> Report:
    """A report of a run with these errors of the memory, and a hundredth of them in the logits."""
    curve, same = Curve(tolerance), Same()
    for error in errors:
        answer = Same(1, int(error < 0.5))
        same.add(answer)
        curve.add(7 * (same.answers), float(error), float(error) / 100, 1 - float(error) ** 2 / 2, answer)
    return Report("cpu", "int8", "PyTorch recurrence", len(errors), tolerance, curve.rows(), 0.0, 0.0, 0.5,
                  agreement=same.share, needed=needed, octaves=curve.octaves())  # fmt: skip


def test_a_report_of_many_segments_keeps_few_of_them_and_the_medians_of_all() -> None:
    count = 1 << 16
    errors = shaken(np.full(count, 1e-4), 1.0, 0)
    errors[[50_001, 60_003]] = 0.9, 0.03
    found = report(errors)
    kept = [row.segment for row in found.rows]
    assert kept[:1024] == list(range(1, 1025))
    assert len(kept) < 4100
    assert {50_002, count} <= set(kept)
    assert 60_004 not in kept
    assert found.worst == 0.9
    assert not found.passed
    assert [(one.first, one.last) for one in found.octaves] == [
        *((1 << power, (2 << power) - 1) for power in range(16)), (count, count),
    ]  # fmt: skip
    part = errors[32_767:65_535]
    late = found.octaves[15]
    assert (late.memory, late.memory_largest) == (np.median(part), 0.9)
    assert late.logits == pytest.approx(late.memory / 100)
    assert late.agreement == 1 - 1 / len(part)
    assert late.cosine == 1 - 0.9**2 / 2
    assert late.tokens == 7 * 65_535
    assert len(json.dumps(found.to_json(), indent=2)) < 4 << 20  # a bundle's report may have four times that


def test_the_first_segment_beyond_the_tolerance_is_kept_and_named() -> None:
    errors = np.full(3000, 1e-4)
    errors[[2000, 2500]] = 0.02, 0.5  # segment 2001 is none of those that are kept anyway
    found = report(errors)
    assert {2001, 2501} <= {row.segment for row in found.rows}
    with pytest.raises(ArithmeticError, match=r"by 5\.0e-01, more than 1\.0e-02, first after segment 2001 \(memory 2"):
        found.require()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_segment_that_is_not_finite_fails_the_report_wherever_it_stands(bad: float) -> None:
    errors = np.full(3000, 1e-4)
    errors[[100, 2002, 2010]] = 0.9, bad, 0.95
    found = report(errors, None, 0.5)
    assert not found.passed
    assert not math.isfinite(found.worst)
    assert found.trend("memory").kind == "not finite"
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["trend"]["memory"]["words"] == "is not finite"
    assert "the error of the memory and the logits is not finite" in str(drift_table(value).caption)


def test_growth_alone_is_a_warning_and_fails_nothing() -> None:
    found = report(1e-5 * np.sqrt(segments(200)))
    assert found.passed
    found.require()
    value = found.to_json()
    assert value["trend"]["memory"]["kind"] == "grows"
    assert value["trend"]["memory"]["rate"] == pytest.approx(0.5, abs=0.05)
    caption = str(drift_table(value).caption)
    assert "passed: " in caption
    assert "\nwarning: the error of the memory grows: times 1.41 with each doubling of the segments" in caption
    assert "warning" not in str(drift_table(report(np.full(200, 1e-5)).to_json()).caption)


def test_answers_are_counted_by_segment_and_so_far() -> None:
    found = report(np.array([0.1, 0.6, 0.1, 0.7]), None, 0.99)
    assert [(row.agreement, row.agreed) for row in found.rows] == [(1, 1), (0, 1 / 2), (1, 2 / 3), (0, 1 / 2)]
    assert [one.agreement for one in found.octaves] == [1, 1 / 2, 0]
    with pytest.raises(ArithmeticError, match=r"gives 50\.00% of the .*answers, fewer than 99%"):
        found.require()


def test_a_report_of_an_older_version_is_shown_too() -> None:
    value = report(np.full(6, 1e-5)).to_json()
    for name in ("octaves", "trend", "document"):
        del value[name]
    value["rows"] = [{name: row[name] for name in ("segment", "tokens", "memory", "logits")} for row in value["rows"]]
    table = drift_table(value)
    assert list(table.columns[0].cells) == ["1", "2", "4", "6", "batch"]
    assert list(table.columns[1].cells)[:2] == ["1.0e-05", "1.0e-05"]
    assert "the error of" not in str(table.caption)


def test_the_table_shows_octaves() -> None:
    table = drift_table(report(np.linspace(0.001, 0.02, 20)).to_json())
    assert list(table.columns[0].cells) == ["1", "2-3", "4-7", "8-15", "16-20", "batch"]
    assert list(table.columns[2].cells)[4] == "2.0e-02"
    assert list(table.columns[6].cells)[:5] == ["100.0%"] * 5


def test_a_strangers_report_does_not_steer_the_terminal() -> None:
    value = report(np.full(6, 1e-5)).to_json()
    value["trend"] = {"memory": {"kind": "grows", "words": "\x1b[2J" + "x" * 5000}, "logits": 3}
    value["octaves"] = [value["octaves"][0] | {"first": "\x1b[2J", "agreement": "\x1b[2J"}]
    table = drift_table(value)
    assert "\x1b" not in str(table.caption) + "".join(map(str, [*table.columns[0].cells, *table.columns[6].cells]))
    assert len(str(table.caption)) < 1000


def test_the_cosine_is_that_of_the_worst_state_in_double_precision() -> None:
    one, other = np.array([[1.0, 0.0]], np.float32), np.array([[1.0, 1.0]], np.float32)
    assert cosine([one], [one]) == 1
    assert cosine([one, one], [one, other]) == pytest.approx(math.sqrt(0.5))
    assert cosine([one], [-one]) == -1
    zero = np.zeros_like(one)
    assert (cosine([zero], [zero]), cosine([zero], [one])) == (1, 0)
    assert math.isnan(cosine([np.array([np.inf])], [np.array([1.0])]))
    near = np.full(1000, 1, np.float32)
    shifted = near.copy()
    shifted[0] += 1e-3
    assert cosine([shifted], [near]) == pytest.approx(1 - 5e-10, abs=1e-11)


def test_a_row_takes_what_an_older_report_has() -> None:
    row = Drift(**{"segment": 1, "tokens": 2, "memory": 0.1, "logits": 0.2})
    assert math.isnan(replace(row, segment=2).agreed)
