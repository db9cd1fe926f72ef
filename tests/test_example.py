"""The trained example through its exported graph: recall, text input, and what the checkpoint may weigh."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from models import example_bundle

from rmt_trt import RMTRuntime
from rmt_trt.benchmarks.recall import by_segments, recall
from rmt_trt.bundle import Bundle
from rmt_trt.calibration import recurrent_feeds
from rmt_trt.training.questions import load_questions

LARGEST = 4_000_000  # bytes
QUESTIONS = 100


@pytest.fixture(scope="module")
def runtime() -> Iterator[RMTRuntime]:
    assert Bundle(example_bundle()).manifest.verification["passed"]
    with RMTRuntime(example_bundle(), max_batch=8, threads=1) as opened:
        yield opened


def test_the_checkpoint_is_at_most_4_mb(root: Path) -> None:
    assert (root / "examples/memorize/model.pt").stat().st_size <= LARGEST


@pytest.mark.parametrize("segments", [1, 16])
def test_exported_example_answers_99_of_100_fresh_questions(runtime: RMTRuntime, root: Path, segments: int) -> None:
    questions = by_segments(runtime, load_questions(root / "examples/memorize/questions.jsonl"))[segments]
    assert recall(runtime, questions[:QUESTIONS]) >= 99


def test_without_its_memory_the_example_cannot_answer(runtime: RMTRuntime, root: Path) -> None:
    """The recall above is the memory's doing: the last segment by itself holds the question and no fact."""
    asked = by_segments(runtime, load_questions(root / "examples/memorize/questions.jsonl"))[16]
    questions = [question for question in asked if question.position < question.length - 256][:QUESTIONS]
    last = [question.tokens()[-runtime.spec.segment_length :] for question in questions]
    right = sum(label == q.answer for label, q in zip(runtime.run(last).labels, questions, strict=True))
    assert right < 0.5 * len(questions)


def test_text_gives_the_same_answer_as_its_tokens(runtime: RMTRuntime, root: Path) -> None:
    question = load_questions(root / "examples/memorize/questions.jsonl")[1]
    from_text, from_ids = runtime.run("".join(question.text())), runtime.run(question.tokens())
    assert from_text.label == from_ids.label == question.answer
    assert (from_text.logits == from_ids.logits).all()


def test_recurrent_feeds_lead_the_graph_from_one_to_the_next(runtime: RMTRuntime, root: Path) -> None:
    question = by_segments(runtime, load_questions(root / "examples/memorize/questions.jsonl"))[16][0]
    feeds = list(recurrent_feeds(runtime, [question.tokens()]))
    assert [feed.segment for feed in feeds] == list(range(16))
    session = onnxruntime.InferenceSession(runtime.path / "step.onnx", providers=["CPUExecutionProvider"])
    for feed, following in itertools.pairwise(feeds):
        (new_memory,) = session.run(["new_memory"], feed.inputs)
        assert np.allclose(new_memory, following.inputs["memory"], atol=1e-5)
    assert [feed.segment for feed in recurrent_feeds(runtime, [question.tokens()], every=5)] == [0, 5, 10, 15]
