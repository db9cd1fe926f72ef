"""What rmt-eval asks and how it counts: intervals, cases, rows, runs without an end, which models fit."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from eval_results import SIZE, head_of
from hypothesis import given
from hypothesis import strategies as st
from models import example_bundle

from rmt_trt import ContractError, RMTRuntime
from rmt_trt.benchmarks.driver import NullEngine
from rmt_trt.contract import Answer
from rmt_trt.evaluation import meters
from rmt_trt.evaluation.cases import Case, all_cases, documents, length_of, seed_of
from rmt_trt.evaluation.fit import answer_of, check_fit
from rmt_trt.evaluation.interval import wilson
from rmt_trt.evaluation.measure import LEFT_OUT, PIECE, Bench, OutOfTime, View, measure, measure_all
from rmt_trt.evaluation.meters import Memory, Meters
from rmt_trt.evaluation.report import markdown
from rmt_trt.evaluation.rows import Results, read_results
from rmt_trt.runtime import machine
from rmt_trt.training.tasks import open_task
from rmt_trt.training.tasks.words import PLACES


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


# Which models fit.


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
