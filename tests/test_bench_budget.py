"""rmt-bench: what it leaves out, what it takes, how it warms up. No figure that it measures is judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarked import prepared, took
from models import made

from rmt_trt import RMTRuntime
from rmt_trt.benchmarks import bench
from rmt_trt.benchmarks.bench import Extra, run_benchmark
from rmt_trt.benchmarks.budget import Budget, Task, carry_out
from rmt_trt.benchmarks.candidates import candidates
from rmt_trt.benchmarks.many import ManyOptions, bucket_sizes, many, warm
from rmt_trt.benchmarks.ours import choose_steps, steps_for
from rmt_trt.benchmarks.plan import Plan, documents
from rmt_trt.benchmarks.quiet import LIBRARIES_LOG
from rmt_trt.benchmarks.ratios import best_of_groups
from rmt_trt.benchmarks.report import markdown
from rmt_trt.benchmarks.rows import LEFT_OUT, Results, Row

TINY = Plan(
    engine="cpu", dtype="fp32", batches=(1, 2), tokens=(30,), peers=("lean",), repeat=1, steps=4, threads=1, quick=True
)


def task(name: str, seconds: float, done: list[str], **options: Any) -> Task:
    return Task("step", name, lambda: done.append(name), seconds, **options)


# The budget.


def test_what_no_longer_fits_is_left_out_and_what_is_shorter_still_runs(tmp_path):
    done: list[str] = []
    results = Results(tmp_path, {})
    tasks = [task("short", 1.0, done), task("long", 5000.0, done), task("last", 2.0, done)]
    carry_out(tasks, Budget(1000.0), results, lambda text: None)
    assert done == ["short", "last"]
    assert [(row.name, row.failed) for row in results.rows] == [("long", LEFT_OUT)]
    assert "| long | step | 1 | left out: budget |" in markdown({}, results.rows)


def test_without_a_budget_everything_is_measured(tmp_path):
    done: list[str] = []
    carry_out([task("a", 1e9, done, spare=True), task("b", 1e9, done)], Budget(), Results(tmp_path, {}), print)
    assert done == ["a", "b"]


def test_a_spare_measurement_leaves_room_for_what_follows(tmp_path):
    done: list[str] = []
    tasks = [
        task("spare", 600.0, done, spare=True),
        task("needed", 600.0, done),
        task("other", 600.0, done, spare=True),
    ]
    carry_out(tasks, Budget(1000.0), Results(tmp_path, {}), lambda text: None)
    assert done == ["needed", "other"]


def test_the_next_of_a_kind_is_expected_to_take_what_the_last_one_took():
    budget = Budget(100.0)
    first, second = (task(name, 10.0, [], cost="compile") for name in "ab")
    budget.learn(first, 300.0)
    assert budget.expected(second) == 300.0
    assert not budget.fits(second, [])
    assert budget.fits(task("c", 10.0, [], cost="peer"), [])


def test_a_failure_does_not_teach_how_long_the_next_one_takes(tmp_path):
    def broken() -> None:
        raise OSError("no compiler")

    budget = Budget(1000.0)
    tasks = [Task("step", "a", broken, 500.0, cost="compile"), task("b", 2000.0, [], cost="compile")]
    results = Results(tmp_path, {})
    carry_out(tasks, budget, results, lambda text: None)
    assert [row.failed for row in results.rows] == ["OSError: no compiler", LEFT_OUT]


def test_ours_is_measured_whatever_the_budget(tmp_path):
    extra = Extra(many=ManyOptions(4, 1, 3, 2), growth=900)
    found = run_benchmark(prepared("bert"), TINY, extra, tmp_path, tmp_path / "work", lambda text: None, Budget(1e-6))
    assert {row.batch for row in found.of("step", "rmt-trt") if row.timing is not None} == {1, 2}
    left = [(row.kind, row.name, row.batch) for row in found.rows if row.failed == LEFT_OUT]
    lean = [("step", "lean PyTorch: eager", batch) for batch in (1, 2)]
    assert left == [*lean, ("many", "rmt-trt", 2), ("growth", "rmt-trt", 1)]


# Peers and steps.


@pytest.mark.parametrize(
    ("given", "engine", "single"),
    [
        (("published",), "cuda", ("published-eager", "published-graph", "published-compile")),
        (("full", "lean", "lean-eager"), "cuda", ("lean-eager", "lean-graph", "lean-compile", "full")),
        (("published", "lean", "ort"), "cpu", ("published-eager", "lean-eager", "ort")),
        ((), "cuda", ()),
    ],
)
def test_groups_of_peers_stand_for_what_the_device_can_run(given, engine, single):
    assert Plan(engine=engine, peers=given).peers == single


def test_quick_measures_one_variant_of_each_and_the_published_step_at_one_size():
    def found(quick: bool) -> dict[str, bool]:
        peers = candidates(prepared("bert"), Plan(quick=quick, compile_mode="default"), None, Path())
        return {peer.name: peer.smallest_only for peer in peers}

    quick, whole = found(True), found(False)
    assert quick == {
        "lean PyTorch: eager": False,
        "lean PyTorch: CUDA graph": False,
        "lean PyTorch: torch.compile default + CUDA graph": False,
        "PyTorch, model as published: eager": True,
        "PyTorch, model as published: CUDA graph": True,
        "PyTorch, model as published: torch.compile default + CUDA graph": True,
        "ONNX Runtime: opset 20": False,
    }
    assert set(quick) < set(whole)
    assert not whole["PyTorch, model as published: eager"]
    assert whole["lean PyTorch: torch.compile default"]


def test_the_best_variant_of_each_group_is_what_ours_is_measured_by():
    rows = [
        Row("step", "rmt-trt", 1, 100, 10, took(1.0)),
        Row("step", "lean PyTorch: eager", 1, 100, 10, took(9.0)),
        Row("step", "lean PyTorch: CUDA graph", 1, 100, 10, took(3.0)),
        Row("step", "PyTorch, model as published: eager", 1, 100, 10, took(4.0)),
        Row("step", "ONNX Runtime: opset 20", 1, failed="OSError: x"),
        Row("step", "lean PyTorch: torch.compile default", 1, failed=LEFT_OUT),
    ]
    best = [(one.group, one.variant, one.times) for one in best_of_groups(rows, 1)]
    assert best == [
        ("lean PyTorch", "CUDA graph", pytest.approx(3.0)),
        ("PyTorch, model as published", "eager", pytest.approx(4.0)),
    ]
    text = markdown({}, rows)
    assert "| 3.00 times as fast as lean PyTorch, best variant | 1 | 100.000 | 300.000 | CUDA graph |" in text
    assert "| lean PyTorch: torch.compile default: left out | 1 |" in text
    assert "| ONNX Runtime: opset 20: failed | 1 |" in text


@pytest.mark.parametrize(("seconds", "steps"), [(2e-4, 2500), (8e-3, 63), (1.0, 32), (1e-6, 4096)])
def test_a_run_has_as_many_segments_as_make_it_long(seconds, steps):
    assert steps_for(seconds) == steps


def test_the_segments_of_a_run_are_chosen_by_a_probe_on_a_gpu_alone():
    with made("bert").open() as runtime:
        assert choose_steps(runtime, Plan(engine="cpu", dtype="fp32", peers=()), 2) == 8
        assert choose_steps(runtime, Plan(steps=2), 2) == 4  # as many as are compared with the fp32 step
        assert 32 <= choose_steps(runtime, Plan(), 2) <= 4096


@pytest.mark.parametrize(("seconds", "failed"), [(None, ""), (1e3, LEFT_OUT)])
def test_what_lasts_is_planned_by_a_short_run_where_nothing_was_compared(seconds, failed, tmp_path, monkeypatch):
    if seconds is not None:
        monkeypatch.setattr(bench, "step_seconds", lambda runtime, plan, batch: seconds)
    options = Plan(engine="cpu", dtype="fp32", peers=(), batches=(1,), tokens=(64,))
    extra = Extra(compare=False, growth=2000)
    found = run_benchmark(prepared("bert"), options, extra, tmp_path, tmp_path, lambda text: None, Budget(120.0))
    assert {row.failed for row in found.of("growth")} == {failed}


def test_libraries_write_into_a_file_while_they_are_kept_quiet(tmp_path):
    script = """
import os, sys
from pathlib import Path
from rmt_trt.benchmarks.quiet import quiet
with quiet(Path(sys.argv[1])):
    print("a table")
    sys.stderr.write("another\\n")
    os.write(2, b"from C\\n")
print("ours")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("ours\n", "")
    assert sorted((tmp_path / LIBRARIES_LOG).read_text().splitlines()) == ["a table", "another", "from C"]


# Many documents.


class Recorded:
    """An engine that notes what a GPU engine would capture for: the kind of a step and the documents of its bucket."""

    def __init__(self, engine: Any, size: int) -> None:
        self._engine, self._size = engine, size
        self.seen: set[tuple[str, int]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def steps(self, states: Any, segments: np.ndarray) -> Any:
        self._note("block", segments.shape[1])
        return self._engine.steps(states, segments)

    def step(self, states: Any, segment: np.ndarray, head: str, host: bool = True) -> Any:
        full = segment.shape[1] == self._size and bool((segment >= 0).all())
        self._note(f"{'full' if full else 'short'}, {head}", len(segment))
        return self._engine.step(states, segment, head, host)

    def _note(self, kind: str, batch: int) -> None:
        self.seen.add((kind, 1 << (batch - 1).bit_length()))


def recorded(name: str, slots: int) -> tuple[RMTRuntime, Recorded]:
    runtime = made(name).open(max_batch=slots)
    engine = Recorded(runtime._engine, runtime.spec.segment_length)
    runtime._engine = engine
    return runtime, engine


def test_every_size_that_an_engine_pads_to_is_warmed_up():
    assert [bucket_sizes(slots) for slots in (1, 2, 6, 32)] == [[1], [2, 1], [6, 4, 2, 1], [32, 16, 8, 4, 2, 1]]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("slots", [5, 8])
def test_nothing_is_left_to_capture_when_the_clock_starts(name, slots, tmp_path):
    runtime, engine = recorded(name, slots)
    pool = documents(runtime.spec, 1, 3 * runtime.spec.segment_length)[0]
    warm(runtime, slots, pool)
    sizes = {1 << (size - 1).bit_length() for size in bucket_sizes(slots)}
    assert engine.seen >= {(kind, size) for kind in ("block", "full, last", "short, last") for size in sizes}
    warmed = set(engine.seen)
    many(runtime, ManyOptions(23, 1, 9, slots), Results(tmp_path, {}), lambda text: None)
    random = np.random.default_rng(0)
    for _ in runtime.run_many([pool[: random.integers(1, 60)] for _ in range(40)], slots=slots, alignment="left"):
        pass
    assert engine.seen == warmed
