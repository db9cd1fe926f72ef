"""rmt-bench: what it leaves out, how it warms up, and several runs as one. No figure that it measures is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import example_bundle, made
from typer.testing import CliRunner

from rmt_trt import RMTRuntime
from rmt_trt.benchmarks import bench, recall, suite
from rmt_trt.benchmarks.bench import Extra, run_benchmark
from rmt_trt.benchmarks.budget import Budget, Task, carry_out
from rmt_trt.benchmarks.candidates import candidates
from rmt_trt.benchmarks.command_line import shown
from rmt_trt.benchmarks.many import ManyOptions, bucket_sizes, many, warm
from rmt_trt.benchmarks.ours import choose_steps, steps_for
from rmt_trt.benchmarks.plan import Plan, documents
from rmt_trt.benchmarks.presets import EXAMPLE, Prepared
from rmt_trt.benchmarks.quiet import LIBRARIES_LOG
from rmt_trt.benchmarks.ratios import best_of_groups
from rmt_trt.benchmarks.report import markdown
from rmt_trt.benchmarks.rows import LEFT_OUT, Results, Row, read_results
from rmt_trt.benchmarks.suite import Part, SuiteOptions, command_of, run_suite
from rmt_trt.benchmarks.timing import Timing
from rmt_trt.commands.bench import app
from rmt_trt.errors import ContractError, FormatError

TINY = Plan(
    engine="cpu", dtype="fp32", batches=(1, 2), tokens=(30,), peers=("lean",), repeat=1, steps=4, threads=1, quick=True
)


def task(name: str, seconds: float, done: list[str], **options: Any) -> Task:
    return Task("step", name, lambda: done.append(name), seconds, **options)


def took(seconds: float) -> Timing:
    return Timing.of([seconds])


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
    prepared = Prepared("bert", made("bert").bundle, made("bert").model, "random")
    extra = Extra(many=ManyOptions(4, 1, 3, 2), growth=900)
    found = run_benchmark(prepared, TINY, extra, tmp_path, tmp_path / "work", lambda text: None, Budget(1e-6))
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
    prepared = Prepared("bert", made("bert").bundle, made("bert").model, "random")

    def found(quick: bool) -> dict[str, bool]:
        peers = candidates(prepared, Plan(quick=quick, compile_mode="default"), None, Path())
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
    this = made("bert")
    prepared = Prepared("bert", this.bundle, this.model, "random")
    options = Plan(engine="cpu", dtype="fp32", peers=(), batches=(1,), tokens=(64,))
    extra = Extra(compare=False, growth=2000)
    found = run_benchmark(prepared, options, extra, tmp_path, tmp_path, lambda text: None, Budget(120.0))
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


# What is written.


def test_rows_come_back_from_their_file(tmp_path):
    results = Results(tmp_path, {"command": "rmt-bench x"})
    rows = [
        Row("step", "rmt-trt", 4, 1000, 10, took(2.0), {"error": 1e-3}),
        Row("full", "full attention", 1, 4096, failed="out of device memory"),
        Row("drift", "fp16", values={"table": [{"segments": 1, "memory": 1e-3}]}),
    ]
    results.add(*rows)
    assert read_results(tmp_path) == ({"command": "rmt-bench x"}, rows)
    assert read_results(tmp_path / "none") == ({}, [])
    (tmp_path / "results.json").write_text('{"rows": [{"king": 1}]}')
    with pytest.raises(FormatError, match=r"results\.json is no results file of rmt-bench"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["--preset", "example", "-o", "/tmp/x", "--work=/root/w"], "--preset example -o bench --work=bench-work"),
        (["m.rmt", "--out", "here", "--tokens", "1,2"], "m.rmt --out here --tokens 1,2"),
        (["/data/m.rmt", "--suite", "/s"], "m.rmt --suite suite"),
        ([str(Path.cwd() / "models/m.pt")], "models/m.pt"),
    ],
)
def test_a_command_is_written_without_the_machines_paths(arguments, written):
    assert shown(arguments) == f"rmt-bench {written}"


# Recall.


def test_fresh_questions_have_the_segments_that_were_asked_for_and_are_the_same_again():
    bundle_spec = made("bert").spec.with_(segment_length=128, alignment="right")
    for segments in (1, 3):
        questions = recall.fresh(bundle_spec, segments, 40)
        assert questions == recall.fresh(bundle_spec, segments, 40)
        assert {-(-question.length // 128) for question in questions} == {segments}
        assert sum(question.length % 128 == 0 for question in questions) >= 20
        assert len({question.document.seed for question in questions}) == 40


def test_recall_writes_one_table_of_the_same_questions_for_each_dtype(tmp_path):
    arguments = [str(EXAMPLE), "--engine", "cpu", "--dtype", "fp32,fp16", "--segments", "1,3", "--count", "24"]
    where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--slots", "10"]
    done = CliRunner().invoke(recall.app, [*arguments, *where])
    assert done.exception is None, done.output
    _, rows = read_results(tmp_path / "out")
    right = [(row.name, row.segments, row.values["right"], row.values["count"]) for row in rows if not row.failed]
    assert [(name, segments, count) for name, segments, _, count in right] == [("fp32", 1, 24), ("fp32", 3, 24)]
    assert all(number >= 23 for _, _, number, _ in right)
    assert [row.name for row in rows if row.failed] == ["fp16"]  # the CPU engine has no such graph
    text = (tmp_path / "out/results.md").read_text(encoding="utf-8")
    assert "| segments | fp32 | fp32, s |" in text


def test_a_file_with_too_few_questions_is_named(root, tmp_path):
    questions = root / "examples/memorize/questions.jsonl"
    arguments = [str(example_bundle()), str(questions), "--segments", "16", "--count", "129", "--work", str(tmp_path)]
    done = CliRunner().invoke(recall.app, arguments)
    assert isinstance(done.exception, ContractError)
    assert f"{questions} has 128 questions of 16 segments, not 129" in str(done.exception)


# A suite.


def results_of(name: str, step: float) -> dict[str, Any]:
    rows = [
        Row("step", "rmt-trt", 1, 1000, 10, took(10 * step)),
        Row("step", "lean PyTorch: CUDA graph", 1, 1000, 10, took(20 * step)),
        Row("step", "lean PyTorch: eager", 1, 1000, 10, failed=LEFT_OUT),
        Row("drift", "fp16", values={"table": [{"segments": 1, "memory": 1e-3}, {"segments": 8, "memory": 2e-3}]}),
    ]
    return {"model": {"name": name, "dtype": "fp16"}, "rows": [row.to_json() for row in rows]}


def scripted(monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> list[Part]:
    """Parts that run scripts in their place; a script is given its folder."""

    def command(part: Part, folder: Path, *_: object) -> list[str]:
        return [sys.executable, "-c", scripts[part.name], str(folder / part.name)]

    monkeypatch.setattr(suite, "command_of", command)
    return [Part(name, suite.BENCH, (), 1) for name in scripts]


def writing(name: str, then: str = "") -> str:
    text = json.dumps(results_of(name, 1e-3))
    write = "p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'results.json').write_text(" + repr(text) + ")"
    return f"import os, pathlib, sys; {write}; {then}"


def test_a_part_that_crashes_costs_itself_alone_and_keeps_what_it_has(tmp_path, monkeypatch):
    parts = scripted(
        monkeypatch, {"one": writing("one", "os.abort()"), "two": "raise SystemExit(3)", "three": writing("three")}
    )
    section = run_suite(tmp_path, tmp_path, SuiteOptions(), lambda text: None, parts)
    one = ("1", "1.000", "100,000", "", "2.00", "", "", "fp16 2.0e-03", "0", "1")
    assert section.rows == [("one, fp16", *one), ("three, fp16", *one)]
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "- one: ended by signal 6 after" in text
    assert "- two: failed with status 3 after" in text
    assert "- three: done after" in text


def test_an_interrupted_suite_keeps_what_it_has_and_interrupts_its_part(tmp_path, monkeypatch):
    parts = scripted(monkeypatch, {"one": writing("one"), "two": "import time; time.sleep(600)"})
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):
        def __init__(self, command: list[str]) -> None:
            super().__init__(command)
            started.append(self)

        def wait(self, timeout: float | None = None) -> int:
            if len(started) == 2 and timeout is None:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(suite.subprocess, "Popen", Interrupted)
    monkeypatch.setattr(suite, "SECONDS_TO_END", 2)
    with pytest.raises(KeyboardInterrupt):
        run_suite(tmp_path, tmp_path, SuiteOptions(), lambda text: None, parts)
    assert started[1].poll() not in (None, 0)
    assert "| one, fp16 | 1 |" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_the_seconds_of_a_suite_are_dealt_out_by_shares_and_what_is_saved_goes_on(tmp_path, monkeypatch):
    given: list[float] = []

    def command(part: Part, folder: Path, work: Path, options: SuiteOptions, seconds: float) -> list[str]:
        given.append(seconds)
        return [sys.executable, "-c", "pass"]

    monkeypatch.setattr(suite, "command_of", command)
    parts = [Part("a", suite.BENCH, (), 3), Part("b", suite.BENCH, (), 1), Part("c", suite.BENCH, (), 1)]
    run_suite(tmp_path, tmp_path, SuiteOptions(budget=10_000.0), lambda text: None, parts)
    first, second, third = given
    assert 5_500 < first <= 6_000
    assert 4_500 < second <= 5_000
    assert 9_000 < third <= 10_000


def test_every_part_of_the_suite_is_a_command_that_its_module_takes(tmp_path):
    apps: dict[str, Callable[..., Any]] = {suite.BENCH: app, suite.RECALL: recall.app}
    for part in suite.PARTS:
        command = command_of(part, tmp_path, tmp_path / "work", SuiteOptions(100.0, True, 0, "default"), 42.4)
        assert command[1:3] == ["-m", part.module]
        assert command[command.index("--budget") + 1] == "42"
        done = CliRunner().invoke(apps[part.module], [*command[3:], "--help"])
        assert done.exit_code == 0, done.output
    assert [part.name for part in suite.PARTS] == ["bert-base", "gpt2-small", "llama-1b", "example", "recall"]


def test_a_suite_takes_no_model_of_its_own(tmp_path):
    done = CliRunner().invoke(app, ["--suite", str(tmp_path / "all"), "--preset", "example"])
    assert isinstance(done.exception, ContractError)
    assert "give no model and no --preset" in str(done.exception)
