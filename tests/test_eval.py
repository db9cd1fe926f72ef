"""rmt-eval: what it asks, how it counts, what it writes, and what it refuses."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import example_bundle, made

from rmt_trt import ContractError, FormatError, RMTRuntime
from rmt_trt.benchmarks.driver import NullEngine
from rmt_trt.bundle import MANIFEST
from rmt_trt.commands import eval as command_file
from rmt_trt.contract import Answer
from rmt_trt.evaluation import meters
from rmt_trt.evaluation.cases import Case, all_cases, documents, length_of, seed_of
from rmt_trt.evaluation.fit import answer_of, check_fit
from rmt_trt.evaluation.interval import wilson
from rmt_trt.evaluation.measure import LEFT_OUT, PIECE, Bench, OutOfTime, View, measure, measure_all
from rmt_trt.evaluation.meters import Memory, Meters
from rmt_trt.evaluation.plots import BY_POSITION, BY_SEGMENTS, draw
from rmt_trt.evaluation.report import markdown
from rmt_trt.evaluation.rows import FORMAT, RESULTS, Results, Row, open_results, read_results
from rmt_trt.runtime import machine
from rmt_trt.training.tasks import open_task
from rmt_trt.training.tasks.words import PLACES

EXCERPT = Path(__file__).parent / "data" / "coriolanus.txt"
SIZE = 128  # tokens of a segment of the example
LARGEST_PLOT = 150_000  # bytes


class Constant(NullEngine):
    """Answers the same class, whatever it reads."""

    def __init__(self, spec: Any, answer: int) -> None:
        super().__init__(spec)
        self._answer = answer

    def step(self, states: Any, segment: np.ndarray, head: Any, host: bool = True) -> Any:
        rows = np.zeros((len(segment), self._spec.num_logits), np.float32)
        rows[:, self._answer] = 1
        return states, None if head == "none" else Answer(rows)


def silent() -> View:
    return View(lambda case, tokens: None, lambda tokens: None, lambda line: None)


@pytest.fixture
def runtime() -> Iterator[RMTRuntime]:
    with RMTRuntime(example_bundle(), engine="cpu", threads=1, max_batch=8) as opened:
        yield opened


def bench(runtime: RMTRuntime, *tasks: str, meter: Meters | None = None) -> Bench:
    return Bench(runtime, {name: open_task(name) for name in tasks}, meter or Meters(None), 8, 0)


# The interval.


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table I.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_an_interval_is_that_of_the_literature(right, count, low, high):
    assert wilson(right, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 100_000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_at_its_bounds_the_count_is_just_as_far_off_as_the_confidence_allows(count, share, confidence):
    right = round(share * count)
    low, high = wilson(right, count, confidence)
    assert 0 <= low <= right / count <= high <= 1
    assert low < high
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for bound in (low, high):
        if 0 < bound < 1:
            off = abs(right / count - bound) / (bound * (1 - bound) / count) ** 0.5
            assert off == pytest.approx(z, rel=1e-6)
    mirrored = wilson(count - right, count, confidence)
    assert mirrored == (pytest.approx(1 - high, abs=1e-9), pytest.approx(1 - low, abs=1e-9))


@pytest.mark.parametrize(("right", "count"), [(-1, 5), (6, 5), (0, 0)])
def test_an_interval_of_no_count_is_refused(right, count):
    with pytest.raises(ValueError, match=f"an interval of {right} of {count}"):
        wilson(right, count)


# Cases and their documents.


@given(st.integers(0, 10_000), st.integers(1, 5000), st.integers(16, 1000), st.integers(1, 16))
def test_a_document_has_the_segments_that_were_asked_for(sample, segments, size, least):
    length = length_of(sample, segments, size, least)
    assert -(-length // size) == segments
    assert length >= least
    assert length == segments * size or sample % 4 >= 2


def test_half_of_the_documents_fill_their_segments_and_the_others_lack_many_numbers_of_tokens():
    lengths = [length_of(sample, 4, SIZE, 11) for sample in range(400)]
    assert sum(length == 4 * SIZE for length in lengths[:200]) >= 100
    assert len(set(lengths)) >= SIZE // 2


def test_cases_go_from_short_to_long_whatever_order_they_were_asked_in():
    found = all_cases(("memorize", "detect"), (16, 1), None, (3, 7))
    assert [(case.segments, case.task, case.samples) for case in found] == [
        (1, "memorize", 7), (1, "detect", 7), (16, "memorize", 3), (16, "detect", 3),
    ]  # fmt: skip
    placed = all_cases(("detect",), (2,), (50, 0), (5,))
    assert [case.position for case in placed] == [50, 0]


def test_a_case_has_the_same_documents_again_whatever_else_is_asked(runtime):
    case = Case("detect", 3, 50, 12)
    task, mixed = open_task("detect"), all_cases(("detect",), (1, 3), (0, 50), (40,))
    again = next(other for other in mixed if (other.segments, other.position) == (3, 50))
    first, second = documents(task, case, runtime.spec, 7), documents(task, again, runtime.spec, 7)
    assert first == second[:12]
    assert documents(task, case, runtime.spec, 8) != first


def test_no_two_documents_share_a_seed():
    cases = [
        Case(task, segments, position, 600_000)
        for task in ("memorize", "detect", "reasoning")
        for segments in (1, 2, 4096, 1 << 22)
        for position in (None, 0, 1, 100)
    ]
    spans = sorted((seed_of(case, seed, 0), seed_of(case, seed, 599_999)) for case in cases for seed in (0, 1))
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))
    assert 0 <= spans[0][0] <= spans[-1][1] < 1 << 63


@pytest.mark.parametrize("position", [0, 25, 100])
def test_the_fact_stands_where_it_was_asked_for(runtime, position):
    for document in documents(open_task("detect"), Case("detect", 8, position, 8), runtime.spec, 0):
        start, stop = document.fact_spans[0]
        room = document.question_span[0] - (stop - start)
        assert document.positions[0] == pytest.approx(position / 100 * room, abs=1)


def test_documents_that_a_segment_does_not_hold_are_refused(runtime):
    spec = runtime.spec.with_(segment_length=8)
    with pytest.raises(ContractError, match="1 segments of 8 tokens holds 8 tokens; facts and question take 11"):
        documents(open_task("detect"), Case("detect", 1, None, 1), spec, 0)


# The count.


@pytest.mark.parametrize("kind", ["classifier", "lm"])
@pytest.mark.parametrize("answer", range(len(PLACES)))
def test_a_model_that_always_answers_the_same_is_right_where_that_is_the_answer(runtime, answer, kind):
    this, case = bench(runtime, "detect"), Case("detect", 3, None, 60)
    if kind == "lm":
        runtime.spec = runtime.spec.with_(logits="lm", num_logits=runtime.spec.vocab_size, id2label=())
    runtime._engine = Constant(runtime.spec, this.tasks["detect"].answer_ids[answer] if kind == "lm" else answer)
    labels = [document.label for document in documents(this.tasks["detect"], case, runtime.spec, 0)]
    row = measure(this, case, float("inf"), silent())
    assert (row.right, row.count) == (labels.count(answer), 60)
    assert row.wrong == tuple(index for index, label in enumerate(labels) if label != answer)
    assert row.interval == wilson(labels.count(answer), 60)
    assert row.tokens == sum(length_of(sample, 3, SIZE, 11) for sample in range(60))
    assert (row.longest, row.slots) == (3 * SIZE, 8)


def test_a_language_model_answers_by_the_answers_first_tokens_alone(runtime):
    task = open_task("memorize")
    spec = runtime.spec.with_(logits="lm", num_logits=runtime.spec.vocab_size, id2label=())
    check_fit(spec, task.tokenizer, task)
    logits = np.zeros(spec.num_logits, np.float32)
    logits[0] = 9
    logits[task.answer_ids[4]] = 1
    assert answer_of(spec, task, logits) == 4


def test_a_row_is_read_piece_by_piece_and_tells_its_progress(runtime):
    runtime._engine = NullEngine(runtime.spec)
    sizes, told, begun = [], [], []
    this = bench(runtime, "detect")

    class Watched:
        def __init__(self, document: Any) -> None:
            self._document, self.length, self.label = document, document.length, document.label

        def pieces(self, size: int) -> Iterator[np.ndarray]:
            for piece in self._document.pieces(size):
                sizes.append(len(piece))
                yield piece

    class WatchedTask:
        def __init__(self, task: Any) -> None:
            self.task, self.describe, self.min_length = task, task.describe, task.min_length

        def document(self, *arguments: Any) -> Watched:
            return Watched(self.task.document(*arguments))

    watched = replace(this, tasks={"detect": WatchedTask(this.tasks["detect"])})
    view = View(lambda case, tokens: begun.append(tokens), told.append, lambda line: None)
    row = measure(watched, Case("detect", 1000, None, 2), float("inf"), view)
    assert max(sizes) <= PIECE < sum(sizes) == row.tokens
    assert begun == [row.tokens]
    assert told == sorted(told)
    assert told[-1] == row.tokens


def test_memory_is_read_at_the_start_after_a_tenth_and_at_the_end(runtime):
    class Counting(Meters):
        def __init__(self) -> None:
            super().__init__(None)
            self.count = 0

        def read(self) -> Memory:
            self.count += 1
            return Memory(self.count, 10 * self.count)

    runtime._engine = NullEngine(runtime.spec)
    row = measure(bench(runtime, "detect", meter=Counting()), Case("detect", 300, None, 2), float("inf"), silent())
    wanted = {mark: {"host": n, "device": 10 * n} for n, mark in enumerate(("start", "tenth", "end"), 1)}
    assert row.memory == wanted
    assert "| 3.0 | 10.0 | 20.0 | 30.0 |" in markdown(head_of(), [replace(row, memory=scaled(wanted, 10**6))])


def scaled(memory: dict[str, dict[str, int]], factor: int) -> dict[str, dict[str, int]]:
    return {mark: {kind: factor * count for kind, count in found.items()} for mark, found in memory.items()}


def test_memory_is_this_process_and_the_whole_gpu_where_there_is_one(monkeypatch):
    driver = SimpleNamespace(cuMemGetInfo=lambda: (0, 3 << 30, 8 << 30))
    monkeypatch.setattr(machine, "current", lambda device: nullcontext())
    monkeypatch.setattr(meters.importlib, "import_module", lambda name: {"cuda.bindings.driver": driver}[name])
    found = Meters(0).read()
    assert found.device == 5 << 30
    assert found.host is None or found.host > 1 << 20
    driver.cuMemGetInfo = lambda: (201, 0, 0)  # the driver's error is no reason to stop a run
    assert Meters(0).read().device is None
    assert Meters(None).read().device is None


# Runs that do not come to their end.


def test_a_row_that_takes_longer_than_what_is_left_is_broken_off(runtime):
    runtime._engine = NullEngine(runtime.spec)
    told: list[int] = []
    view = View(lambda case, tokens: None, told.append, lambda line: None)
    with pytest.raises(OutOfTime):
        measure(bench(runtime, "detect"), Case("detect", 2000, None, 8), 1e-9, view)
    assert told[-1] < 0.5 * 2000 * 8 * SIZE
    assert measure(bench(runtime, "detect"), Case("detect", 2, None, 8), float("inf"), silent()).count == 8


def test_what_no_longer_fits_is_left_out_and_measured_when_there_is_time(runtime, tmp_path):
    cases = all_cases(("detect",), (1, 2), None, (4,))
    results, lines = Results(tmp_path, head_of()), []
    view = replace(silent(), say=lines.append)
    measure_all(bench(runtime, "detect"), cases, results, lambda: 0.0, view)
    assert [row.left_out for row in results.rows] == [LEFT_OUT, LEFT_OUT]
    assert "| detect | 2 | random | left out: budget |" in markdown(results.head, results.rows)
    measure_all(bench(runtime, "detect"), cases, results, lambda: float("inf"), view)
    assert [(row.segments, row.count) for row in read_results(tmp_path).rows] == [(1, 4), (2, 4)]
    measure_all(bench(runtime, "detect"), cases, results, lambda: 0.0, view)  # nothing is left to be done
    assert lines[-1] == "detect, 2 segments: measured before"
    assert len(results.rows) == 2


# Results.


def head_of(**model: Any) -> dict[str, Any]:
    known = {"name": "m.rmt", "fingerprint": "f", "engine": "cpu", "dtype": "fp32", "segment_length": SIZE}
    return {
        "format": FORMAT, "model": known | model, "tasks": {"detect": {"task": "detect", "words": 333}},
        "labels": list(PLACES), "seed": 0,
    }  # fmt: skip


def results_of(folder: Path, task: str = "detect", positions: tuple[int, ...] = (), **model: Any) -> Results:
    """Plausible rows."""
    lengths = [(segments, None) for segments in (1, 4, 16, 64)] + [(64, place) for place in positions]
    rows = [
        Row(task, segments, place, 40, 40 - i, 40 * segments * SIZE, segments * SIZE, 1.0, 8, text={"repeats": segments / 3})
        for i, (segments, place) in enumerate(lengths)
    ]  # fmt: skip
    return Results(folder, head_of(**model), rows)


def test_rows_come_back_from_the_file_as_they_were(tmp_path):
    made_rows = results_of(tmp_path, positions=(0, 50))
    made_rows.add(Row("detect", 4096, left_out=LEFT_OUT))
    assert read_results(tmp_path).rows == made_rows.rows
    value = json.loads((tmp_path / RESULTS).read_text(encoding="utf-8"))["rows"][1]
    low, high = wilson(39, 40)
    wanted = {"accuracy": 39 / 40, "low": low, "high": high, "tokens_per_second": 40 * 4 * SIZE}
    assert {name: value[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "another seed: it was 0 and is 1"),
        ({"model": head_of(dtype="fp16")["model"]}, "another model: dtype was 'fp32' and is 'fp16'"),
        ({"tasks": {"detect": {"task": "detect", "words": 9}}}, "another task detect: words was 333 and is 9"),
    ],
)
def test_results_of_another_kind_are_not_gone_on_with(tmp_path, changes, message):
    results_of(tmp_path).save()
    with pytest.raises(FormatError, match=re.escape(message)):
        open_results(tmp_path, head_of() | changes)


def test_a_task_that_is_new_joins_those_that_were_measured(tmp_path):
    results_of(tmp_path).save()
    both = open_results(tmp_path, head_of() | {"tasks": {"memorize": {"task": "memorize"}}})
    assert list(both.head["tasks"]) == ["detect", "memorize"]
    assert len(both.rows) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is no results file of rmt-eval"),
        ('{"rows": []}', "is no results file of rmt-eval"),
        (json.dumps({"format": FORMAT}), "is damaged (KeyError: 'rows')"),
        (json.dumps({"format": FORMAT, "rows": [{"task": "a", "segments": 1}]}), "is damaged (ValueError"),
    ],
)
def test_a_file_that_holds_no_results_is_named(tmp_path, text, message):
    (tmp_path / RESULTS).write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=re.escape(str(tmp_path / RESULTS)) + ".*" + re.escape(message)):
        read_results(tmp_path)


# Plots.


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_several_results_are_drawn_in_one_picture_that_a_readme_can_hold(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda figure: (drawn.append(figure.axes[0]), close(figure)))
    given_results = [
        results_of(tmp_path, "memorize", dtype="fp16"),
        results_of(tmp_path, "detect", tuple(range(0, 101, 10)), dtype="fp16"),
        results_of(tmp_path, "detect", dtype="bf16"),
    ]
    assert draw(tmp_path, given_results) == [BY_SEGMENTS, BY_POSITION]
    for name in (BY_SEGMENTS, BY_POSITION):
        assert (tmp_path / name).stat().st_size < LARGEST_PLOT
        assert 600 <= png_size(tmp_path / name)[0] <= 1200
    lines = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in drawn]
    assert lines[0] == ["chance, 16.7 %", "memorize", "detect, fp16", "detect, bf16"]
    assert lines[1] == ["chance, 16.7 %", "detect, 64 segments"]
    assert drawn[0].get_xscale() == "log"
    assert [tick.get_text() for tick in drawn[0].get_xticklabels()] == ["1", "4", "16", "64"]
    assert all(axes.get_xlabel() and "%" in axes.get_ylabel() for axes in drawn)
    assert [line.get_ydata()[0] for line in drawn[0].lines if line.get_linestyle() == ":"] == [100 / 6]


# The command.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """Runs rmt-eval in this process, in a folder of its own that holds m.rmt; its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    Path("m.rmt").symlink_to(example_bundle())
    Path("t.txt").write_bytes(EXCERPT.read_bytes())

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rmt-eval", *line.split()])
        try:
            command_file.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


QUICK = "--engine cpu --threads 1 --slots 8"


def test_the_example_answers_right_at_one_and_four_segments_and_all_of_it_is_written(command):
    line = f"m.rmt --task memorize,detect --segments 1,4 --samples 16,8 -o out {QUICK}"
    code, shown, err = command(line)
    assert code == 0, err
    found = read_results(Path("out"))
    assert [(row.task, row.segments, row.count) for row in found.rows] == [
        ("memorize", 1, 16), ("detect", 1, 16), ("memorize", 4, 8), ("detect", 4, 8),
    ]  # fmt: skip
    assert all(row.right >= row.count - 1 for row in found.rows)
    assert found.head["command"].startswith("rmt-eval m.rmt --task memorize,detect")
    assert found.head["model"]["fingerprint"] == RMTRuntime("m.rmt").spec.fingerprint
    assert all(row.memory["end"]["host"] and row.memory["end"]["device"] is None for row in found.rows)
    text = Path("out/results.md").read_text(encoding="utf-8")
    for words in ("| detect | 4 | 512 | random | 8 of 8 | 100.0% | 67.6% to 100.0% |", f"![{BY_SEGMENTS}]", "Wilson"):
        assert words in text
    assert "Accuracy" in shown
    assert 0 < Path("out", BY_SEGMENTS).stat().st_size < LARGEST_PLOT
    assert not Path("out", BY_POSITION).exists()

    # The same again elsewhere; and here nothing is run twice.
    command(line.replace("-o out", "-o again"))
    facts = [(row.right, row.wrong, row.tokens, row.steps) for row in found.rows]
    assert facts == [(row.right, row.wrong, row.tokens, row.steps) for row in read_results(Path("again")).rows]
    assert "out holds results already. Go on with them (--resume)" in command(line)[2]
    code, _, err = command(f"{line} --resume --segments 1,2,4 --samples 16,8,8")
    assert (code, err.count("measured before")) == (0, 4)
    assert {(row.task, row.segments) for row in read_results(Path("out")).rows} > {("detect", 2), ("memorize", 2)}
    assert read_results(Path("out")).rows[:4] == found.rows


def test_positions_give_a_row_each_and_a_plot_of_their_own(command):
    code, _, err = command(f"m.rmt --task detect --segments 2,3 --positions 0,50,100 --samples 4 -o out {QUICK}")
    assert code == 0, err
    found = read_results(Path("out"))
    assert [(row.segments, row.position) for row in found.rows] == [(n, p) for n in (2, 3) for p in (0, 50, 100)]
    text = Path("out/results.md").read_text(encoding="utf-8")
    assert "| fact at | detect, 2 segments | detect, 3 segments |" in text
    assert f"![{BY_POSITION}]" in text
    assert sorted(path.name for path in Path("out").iterdir()) == [BY_POSITION, RESULTS, "results.md"]
    code, _, err = command("--plot out out/results.json -o both")
    assert (code, err.split()) == (0, [f"both/{BY_POSITION}"])


def test_a_text_hides_the_facts_by_the_bundles_own_tokenizer_and_is_told_with_its_repeats(command):
    line = f"m.rmt --task detect --text t.txt --part 0.5:1 --segments 1,8 --samples 4 -o out {QUICK}"
    code, _, err = command(line)
    assert code == 0, err
    found = read_results(Path("out"))
    about = found.head["tasks"]["detect"]
    assert (about["text"], about["part"]) == ("t.txt", [0.5, 1.0])
    assert [row.text["repeats"] for row in found.rows] == [row.longest / about["tokens"] for row in found.rows]
    assert "| 95 % interval | repeats |" in Path("out/results.md").read_text(encoding="utf-8")


def test_an_interrupt_leaves_the_rows_so_far_with_their_report(command, monkeypatch):
    first = f"m.rmt --segments 1,2 --samples 4 -o out {QUICK}"
    steps = RMTRuntime.run_many

    def interrupted(self: RMTRuntime, documents: Any, **options: Any) -> Any:
        if options["length"][0] > SIZE:
            raise KeyboardInterrupt
        return steps(self, documents, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RMTRuntime, "run_many", interrupted)
        code, shown, err = command(first)
    assert code == 130
    assert "interrupted; out/results.json holds 1 rows. Go on with --resume" in err
    assert [row.segments for row in read_results(Path("out")).rows] == [1]
    assert Path("out/results.md").exists()
    assert "Accuracy" in shown
    assert command(f"{first} --resume")[0] == 0
    assert [row.segments for row in read_results(Path("out")).rows] == [1, 2]


def test_without_matplotlib_there_are_tables_and_no_plots(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, shown, err = command(f"m.rmt --segments 1 --samples 4 -o out {QUICK}")
    assert code == 0
    assert "no plots: plots needs the Python package 'matplotlib'" in err
    assert sorted(path.name for path in Path("out").iterdir()) == [RESULTS, "results.md"]
    assert "Accuracy" in shown
    code, _, err = command("--plot out -o plots")
    assert (code, "needs the Python package 'matplotlib'" in err) == (1, True)


BAD: dict[str, tuple[str, str]] = {
    "task unknown": ("m.rmt --task memorise", "--task is 'memorise'; expected memorize, detect, reasoning, or several"),
    "no task": ("m.rmt --task ,", "--task is empty; expected memorize"),
    "position above": ("m.rmt --positions 0,101", "--positions is 0,101; expected percents from 0 to 100, each once"),
    "position below": ("m.rmt --positions=-1", "--positions is -1; expected percents from 0 to 100"),
    "position twice": ("m.rmt --positions 5,5", "--positions is 5,5; expected percents from 0 to 100, each once"),
    "position no number": ("m.rmt --positions middle", "--positions is 'middle'; expected whole numbers with commas"),
    "no position": ("m.rmt --positions ,", "--positions is empty; expected percents"),
    "position of memorize": ("m.rmt --task detect,memorize --positions 50", "memorize has its fact at the very start"),
    "samples of other lengths": ("m.rmt --segments 1,2,4 --samples 5,6", "--samples has 2 numbers and --segments 3"),
    "samples 0": ("m.rmt --samples 0", "--samples is 0; expected numbers from 1 to 600000"),
    "samples absurd": ("m.rmt --samples 10_000_000", "--samples is 10000000; expected numbers from 1 to 600000"),
    "segments 0": ("m.rmt --segments 0,4", "--segments is 0,4; expected numbers of at least 1, each once"),
    "segments twice": ("m.rmt --segments 4,4", "--segments is 4,4; expected numbers of at least 1, each once"),
    "no segments": ("m.rmt --segments ,", "--segments is empty"),
    "segments absurd": ("m.rmt --segments 99999999999", "length is 12799999999872 tokens"),
    "part without a text": ("m.rmt --part 0.9:1", "--part 0.9:1 is a part of a text; give the text with --text FILE"),
    "part in wrong order": ("m.rmt --text t.txt --part 0.9:0.1", "--part is '0.9:0.1'; expected two shares of the text"),
    "part beyond": ("m.rmt --text t.txt --part 0.9:1.1", "--part is '0.9:1.1'; expected two shares of the text"),
    "part of one number": ("m.rmt --text t.txt --part 0.9", "--part is '0.9'; expected two shares of the text"),
    "part no numbers": ("m.rmt --text t.txt --part a:b", "--part is 'a:b'; expected two shares of the text"),
    "text missing": ("m.rmt --text none.txt", "none.txt"),
    "text without a tokenizer": ("bare.rmt --text t.txt", "holds no tokenizer, by which --text t.txt is to be read"),
    "bundle missing": ("none.rmt", "none.rmt cannot be opened"),
    "two bundles": ("m.rmt m.rmt", "measures one model at a time and got 2"),
    "folder under a file": ("m.rmt -o t.txt/out", "cannot write t.txt/out: Not a directory"),
    "folder is a file": ("m.rmt -o t.txt", "cannot write t.txt: File exists"),
    "engine unknown": ("m.rmt --engine gpu", "engine is 'gpu'; expected"),
    "words that the model lacks": ("m.rmt --task reasoning", "the task's ids go up to"),
    "another model": ("other.rmt", "the task's ids go up to 332; the model's vocabulary has ids 0 to 95"),
    "plot of nothing": ("--plot none.json", "none.json cannot be read"),
    "plot into a file": ("--plot done -o t.txt", "cannot write t.txt: File exists"),
    "plot without rows": ("--plot empty -o plots", "no row was measured"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(command, name):
    line, message = BAD[name]
    Path("other.rmt").symlink_to(made("bert").bundle)
    if line.startswith("bare"):
        shutil.copytree(example_bundle(), "bare.rmt")
        manifest = json.loads(Path("bare.rmt", MANIFEST).read_text(encoding="utf-8"))
        del manifest["files"]["tokenizer.json"]
        Path("bare.rmt", MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    for folder, rows in (("done", results_of(Path("done")).rows), ("empty", [])):
        Path(folder).mkdir()
        Results(Path(folder), head_of(), rows).save()
    code, shown, err = command(line)
    assert (code, shown, len(err.splitlines())) == (1, "", 1), err
    assert err.startswith("rmt-eval: ")
    assert message in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": (), "num_logits": 5}, "the model's classes are 5 classes without names; those of detect are"),
        ({"id2label": ("a", "b", "c", "d", "e", "f")}, "the model's classes are a, b, c, d, e, f; those of detect are"),
        (
            {"id2label": PLACES[::-1]},
            f"the model's classes are {', '.join(PLACES[::-1])}; those of detect are bathroom",
        ),
        ({"vocab_size": 300}, "the task's ids go up to 332; the model's vocabulary has ids 0 to 299"),
        ({"logits": "lm", "num_logits": 20, "id2label": ()}, "the answers' ids go up to"),
    ],
)
def test_a_model_of_other_ids_or_classes_is_refused(runtime, changes, message):
    task = open_task("detect")
    with pytest.raises(ContractError, match=re.escape(message)):
        check_fit(runtime.spec.with_(**changes), task.tokenizer, task)


def test_a_model_without_names_of_classes_is_taken_by_their_number(runtime):
    task = open_task("detect")
    check_fit(runtime.spec.with_(id2label=()), None, task)


def test_a_model_of_another_tokenizer_is_refused(runtime):
    task = open_task("detect")
    other = json.loads(task.tokenizer)
    words = other["model"]["vocab"]
    words["lamp"], words["chair"] = words["chair"], words["lamp"]
    with pytest.raises(ContractError, match=r"'lamp' has the id \d+ by the task's tokenizer and not by the model's"):
        check_fit(runtime.spec, json.dumps(other), task)
