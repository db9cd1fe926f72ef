"""rmt-bench: what is computed from given numbers, and what the report says of them."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarked import took

from rmt_trt.benchmarks.endurance import powers_of_two
from rmt_trt.benchmarks.fits import crossing, fit, interpolate
from rmt_trt.benchmarks.kernels import by_name
from rmt_trt.benchmarks.many import ManyOptions, lengths
from rmt_trt.benchmarks.ratios import best_peer, full_attention, ratios
from rmt_trt.benchmarks.report import markdown
from rmt_trt.benchmarks.rows import Row
from rmt_trt.benchmarks.timing import Effort, Timing, measure, measure_in_turn


def test_a_ratio_is_the_peers_time_by_ours_of_the_same_batch():
    rows = [
        Row("step", "rmt-trt", 1, 100, 10, took(2.0)),
        Row("step", "rmt-trt", 8, 100, 10, took(4.0)),
        Row("step", "slow", 1, 100, 10, took(9.0)),
        Row("step", "slow", 8, 100, 5, took(10.0)),
        Row("step", "fast", 1, 100, 10, took(1.0)),
        Row("step", "broken", 8, failed="OSError: no compiler"),
        Row("step", "alone", 32, 100, 10, took(1.0)),
    ]
    found = {(one.name, one.batch): one.times for one in ratios(rows)}
    assert found == {("fast", 1): 0.5, ("slow", 1): 4.5, ("slow", 8): 5.0, ("broken", 8): None}
    assert [one.name for one in ratios(rows)] == ["fast", "slow", "slow", "broken"]
    assert best_peer(rows, 1).name == "fast"
    assert best_peer(rows, 32) is None


def test_a_ratio_prefers_what_ours_took_in_turn_with_the_peer():
    rows = [
        Row("step", "rmt-trt", 1, 100, 10, took(2.0)),
        Row("step", "slow", 1, 100, 10, took(9.0), {"rmt-trt_seconds": 3.0}),
    ]
    assert [(one.times, one.ours_seconds) for one in ratios(rows)] == [(3.0, 0.3)]


def test_a_row_knows_its_time_per_segment_and_its_throughput():
    row = Row("step", "rmt-trt", 4, 1000, 10, took(2.0))
    assert (row.per_segment, row.tokens_per_second) == (0.2, 2000.0)
    assert (Row("step", "x", failed="y").per_segment, Row("step", "x").tokens_per_second) == (None, None)


def test_a_timing_has_the_median_and_the_spread():
    timing = Timing.of([3.0, 1.0, 2.0])
    assert (timing.median, timing.low, timing.high, timing.repeats) == (2.0, 1.0, 3.0, 3)
    assert timing.low < timing.p10 < timing.p90 < timing.p99 < timing.high


def test_calls_take_turns_and_a_call_is_warm_before_it_is_timed():
    calls: list[str] = []
    timings = measure_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], Effort(3, 100.0))
    assert (calls, [t.repeats for t in timings]) == (["a", "b"] * 3, [3, 3])
    calls.clear()
    assert measure(lambda: calls.append("a"), Effort(2, 100.0), warm=lambda: calls.append("w")).repeats == 2
    assert calls == ["w", "a", "a"]


def test_a_slow_call_is_repeated_no_more_than_it_must_be():
    assert measure_in_turn([lambda: None], Effort(20, 0.0, at_least=3))[0].repeats == 3
    assert measure_in_turn([lambda: None], Effort(20, 0.0, at_least=1))[0].repeats == 1


def test_the_fit_extrapolates_a_known_quadratic():
    lengths = [4096, 8192, 16384, 32768]
    curve = fit(lengths, [0.01 + 2e-6 * n + 3e-11 * n * n for n in lengths])
    assert curve is not None
    for length in (10_000, 1_000_000, 10_000_000):
        assert curve(length) == pytest.approx(0.01 + 2e-6 * length + 3e-11 * length * length, rel=1e-6)


def test_the_fit_refuses_too_few_points_and_times_that_do_not_grow():
    assert fit([4096, 8192], [1.0, 2.0]) is None
    assert fit([4096, 8192, 16384], [3.0, 4.0, 4.5]) is None
    assert fit([10, 20], [1.0, 2.0], degree=1)(40) == pytest.approx(4.0)


def test_between_measured_lengths_times_are_interpolated_in_logarithms():
    between = interpolate([100, 400], [1.0, 16.0])
    assert between(200) == pytest.approx(4.0)


def test_the_crossing_of_a_line_and_a_parabola_is_found():
    assert crossing(lambda n: 100 * n, lambda n: n * n, 10, 1e6) == pytest.approx(100, rel=1e-6)
    assert crossing(lambda n: 1.0, lambda n: n, 10, 1e6) == pytest.approx(10)
    assert crossing(lambda n: n * n, lambda n: n, 10, 1e6) is None


def test_full_attention_is_measured_extrapolated_and_crossed():
    def full(n: int) -> float:
        return 1e-3 + 1e-6 * n + 1e-10 * n * n

    rows = [Row("full", "full attention", 1, n, 0, took(full(n))) for n in (4096, 8192, 16384, 32768)]
    rows += [Row("full", "full attention", 1, 65536, failed="out of device memory")]
    rows += [Row("length", "rmt-trt", 1, n, n // 512, took(0.01 + 3e-6 * n)) for n in (4096, 65536, 1 << 20)]
    found = full_attention(rows)
    assert found.at(8192) == (pytest.approx(full(8192)), False)
    assert found.at(2_000_000) == (pytest.approx(full(2_000_000)), True)
    assert found.crossing == pytest.approx(
        (2e-6 + (4e-12 + 4 * 1e-10 * 9e-3) ** 0.5) / 2e-10, rel=0.03
    )  # between two measured lengths


def test_kernels_are_summed_by_name():
    assert by_name([("a", 1.0), ("b", 5.0), ("a", 2.0)]) == [("b", 1, 5.0), ("a", 2, 3.0)]


def test_lengths_of_many_documents_lie_within_their_bounds_and_stay_the_same():
    found = lengths(ManyOptions(1000, 10, 1000, 32))
    assert (found.min() >= 10, found.max() <= 1000, len(found)) == (True, True, 1000)
    assert 80 < np.exp(np.mean(np.log(found))) < 125  # log-uniform: the geometric mean is 100
    assert np.array_equal(found, lengths(ManyOptions(1000, 10, 1000, 32)))


def test_drift_is_looked_at_after_powers_of_two_and_at_the_end():
    assert [powers_of_two(n) for n in (1, 8, 20)] == [[1], [1, 2, 4, 8], [1, 2, 4, 8, 16, 20]]


def test_the_report_names_machine_versions_and_command():
    head = {
        "command": "rmt-bench x.rmt",
        "machine": {"gpu": {"name": "H1", "driver": "9", "cuda": "13"}, "rmt-trt": "1", "versions": {"torch": "2"}},
        "model": {"name": "x", "engine": "cuda", "dtype": "fp16", "weights": "random", "flops_per_segment": 1e9},
    }
    rows = [
        Row("limit", "matrix product fp16", values={"flops_per_second": 1e12}),
        Row("step", "rmt-trt", 2, 100, 10, took(0.1), {"error": 1e-3, "once_seconds": 2e-4}),
        Row("bare", "rmt-trt", 2, 100, 10, took(0.08)),
    ]
    text = markdown(head, rows)
    assert "H1, driver 9, CUDA 13; rmt-trt 1" in text
    assert "    rmt-bench x.rmt" in text
    assert "| 20.0% | 1.250 | 0.200 |" in text  # 2 x 1e9 operations in 10 ms of 1e12 a second; 10 ms by 8 ms
