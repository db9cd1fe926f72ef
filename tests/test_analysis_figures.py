"""rmt-analyze: the figures of a memory, along a trajectory, and the tables that gather them."""

from __future__ import annotations

import math
import subprocess
import sys

import models
import numpy as np
import pytest
from memories import D, M, document_of, random_memory
from models import S

from rmt_trt import ContractError, RMTRuntime
from rmt_trt.analysis.measure import marks_of, of_tokens
from rmt_trt.analysis.summary import Marks, at_segments, by_kind
from rmt_trt.analysis.trajectory import FIGURES, Trajectory, figures, follow
from rmt_trt.export.verify import random_document
from rmt_trt.model.checkpoint import load_model
from rmt_trt.model.recurrence import recurrence, split

# Figures of memories that are made by hand.


def test_identical_memories_have_cosine_one_and_no_change():
    memory = random_memory(0)
    found = figures(memory, memory, memory, memory)
    for name in ("previous", "first", "initial"):
        assert getattr(found, name) == pytest.approx(np.ones(M)), name
    assert found.change == 0


def test_a_cosine_is_taken_vector_by_vector():
    memory = random_memory(0)
    other = memory * np.array([[1.0], [2.0], [-3.0], [0.5]])
    assert figures(memory, other, memory, memory).previous == pytest.approx([1, 1, -1, 1])


def test_change_and_norm_of_a_memory_that_was_doubled():
    memory = random_memory(1)
    found = figures(2 * memory, memory, memory, memory)
    assert found.change == pytest.approx(1)
    assert found.norms == pytest.approx(2 * np.sqrt((memory**2).sum(axis=1)))


@pytest.mark.parametrize(
    ("memory", "rank"),
    [
        (3 * np.eye(M, D), M),
        (np.ones((M, D)), 1),
        (np.repeat(np.eye(2, D), 2, axis=0), 2),
        (np.eye(M, 2), 2),
        (np.diag([3.0, 1.0]), math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
    ],
    ids=["orthogonal rows", "one direction", "two directions", "narrower than rows", "unequal"],
)
def test_effective_rank(memory, rank):
    assert figures(memory, memory, memory, memory).effective_rank == pytest.approx(rank)


def test_entropy_of_uniform_components_is_log_d_and_of_a_single_one_nothing():
    signs = np.where(np.arange(M * D).reshape(M, D) % 3, 1.0, -1.0)
    assert figures(5 * signs, signs, signs, signs).entropies == pytest.approx(np.full(M, math.log(D)))
    assert figures(5 * signs, signs, signs, signs).summary()["entropy_share"] == pytest.approx(1)
    single = np.eye(M, D)
    assert figures(single, single, single, single).entropies == pytest.approx(np.zeros(M))


def test_entropy_is_that_of_the_shares_of_energy():
    memory = np.array([[3.0, 0.0, -1.0, 0.0]])  # nine tenths, one tenth
    wanted = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert figures(memory, memory, memory, memory).entropies == pytest.approx([wanted])


@pytest.mark.filterwarnings("error")
def test_a_memory_of_zeros_has_no_cosine_entropy_or_rank_and_says_so():
    zeros, memory = np.zeros((M, D)), random_memory(2)
    found = figures(zeros, memory, memory, memory)
    assert np.isnan([*found.previous, *found.entropies, found.effective_rank]).all()
    assert (found.change, found.norms.tolist()) == (pytest.approx(1), [0] * M)
    assert math.isnan(figures(memory, zeros, memory, memory).change)


def test_a_trajectory_compares_with_the_memory_before_the_first_and_the_initial_one():
    one, other, third = (np.tile(row, (M, 1)) for row in np.eye(3, D))
    trajectory = Trajectory(one)
    for number, memory in enumerate((other, third, one, other), 1):
        trajectory.add(memory, 10 * number)
    series = trajectory.series()
    assert set(series) == set(FIGURES)
    assert series["previous"].tolist() == [0, 0, 0, 0]
    assert series["first"].tolist() == [1, 0, 0, 1]
    assert series["initial"].tolist() == [0, 0, 1, 0]
    assert trajectory.stops == [10, 20, 30, 40]


def test_a_state_that_is_no_memory_is_refused():
    with pytest.raises(ContractError, match=r"first state has shape \(3,\)"):
        Trajectory(np.zeros(3))


# Figures of models: any engine gives what the plain recurrence gives.


@pytest.mark.parametrize("name", ["example", "bert", "gpt2"])
def test_the_trajectory_of_an_engine_is_that_of_the_reference(name):
    """The example's as it was exported, on ONNX Runtime; the others' on the PyTorch engine."""
    path = models.example_bundle() if name == "example" else models.made(name).checkpoint
    model = load_model(models.EXAMPLE if name == "example" else models.made(name).checkpoint).model
    size = model.config.segment_length
    documents = [random_document(model.config.spec(), n, 0).tolist() for n in (7 * size, 3 * size + 7)]
    with RMTRuntime(path, threads=1) as runtime:
        assert runtime.engine == ("cpu" if name == "example" else "torch")
        found = follow(runtime.stream(documents, memory=True, logits="none"), runtime.initial[0])
    for trajectory, document in zip(found, documents, strict=True):
        wanted = Trajectory(model.memory.detach().numpy())
        for memory, _ in recurrence(model, document):
            wanted.add(memory.numpy(), 0)
        assert len(trajectory.figures) == len(split(document, model.config))
        for figure, values in wanted.series().items():
            assert trajectory.series()[figure] == pytest.approx(values, rel=1e-3, abs=1e-4), figure
        assert trajectory.stops[-1] == len(document)


def test_documents_of_ones_own_are_followed_up_to_a_number_of_segments():
    rows = np.full((2, 5 * S), -1)
    rows[0], rows[1, : 2 * S + 3] = document_of("gpt2", 5 * S), document_of("gpt2", 2 * S + 3, 1)
    with RMTRuntime(models.made("gpt2").checkpoint, threads=1, max_batch=2) as runtime:
        whole, head = of_tokens(runtime, rows, None), of_tokens(runtime, rows, 2)
    assert [len(one.figures) for one in whole.trajectories] == [5, 3]
    assert [len(one.figures) for one in head.trajectories] == [2, 2]
    assert head.trajectories[1].figures[1].effective_rank == pytest.approx(
        whole.trajectories[1].figures[1].effective_rank
    )


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("length", [S - 1, 3 * S, 3 * S + 7])
def test_marks_are_the_segments_in_which_a_spans_tokens_lie(alignment, length):
    config = models.model_config("gpt2", alignment=alignment)
    spec, cut = config.spec(), split(list(range(length)), config)
    for start in range(0, length - 5, 3):
        fact, question = (start, start + 5), (length - 4, length)
        found = marks_of([fact], question, length, spec)
        assert found.facts == tuple(i for i, segment in enumerate(cut) if set(segment) & set(range(*fact)))
        assert found.question == tuple(i for i, segment in enumerate(cut) if set(segment) & set(range(*question)))


def test_tables_gather_by_number_of_segments_and_by_what_stands_there():
    scales = ((1, 2, 4, 8, 16), (1, 3, 9))
    trajectories = []
    for row in scales:
        trajectories.append(Trajectory(np.ones((1, D))))
        for number, scale in enumerate(row, 1):
            trajectories[-1].add(scale * np.ones((1, D)), number)
    table = at_segments(trajectories)
    assert list(table) == [1, 2, 4, 5]
    assert table[2]["norm"].median == pytest.approx(2.5 * math.sqrt(D))
    assert (table[4]["norm"].count, table[5]["norm"].median) == (1, pytest.approx(16 * math.sqrt(D)))
    kinds = by_kind(trajectories, [Marks((1,), (4,)), Marks((0,), (2,))])
    assert {kind: row["change"].count for kind, row in kinds.items()} == {
        "first": 1, "fact": 2, "noise": 3, "question": 2,
    }  # fmt: skip
    assert kinds["question"]["change"].median == pytest.approx((1 + 2) / 2)


def test_an_engine_for_fewer_documents_is_said():
    with (
        RMTRuntime(models.made("gpt2").checkpoint, max_batch=2) as runtime,
        pytest.raises(ContractError, match=r"3 documents .* was built for 2"),
    ):
        of_tokens(runtime, np.full((3, S), 5), None)


def test_figures_and_marks_load_no_heavy_module(tmp_path):
    heavy = ("torch", "onnx", "onnxruntime", "matplotlib", "tokenizers")
    program = (
        "import sys, rmt_trt.analysis.trajectory, rmt_trt.analysis.measure, rmt_trt.analysis.pictures\n"
        "import rmt_trt.analysis.report, rmt_trt.commands.analyze\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
