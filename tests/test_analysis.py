"""rmt-analyze: a memory's figures, attention maps of its operations, and the command that writes both."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import S

from rmt_trt import ContractError, RMTRuntime
from rmt_trt.analysis import attention as attention_module
from rmt_trt.analysis.attention import attention, examples, find_operations
from rmt_trt.analysis.cells import LARGE, SMALL, cells_of, pooled
from rmt_trt.analysis.layout import OPERATIONS as ALL_OPERATIONS
from rmt_trt.analysis.layout import Region, clipped, even, places, regions, rows_of, share, shares_by_region
from rmt_trt.analysis.measure import marks_of, of_tokens
from rmt_trt.analysis.report import markdown
from rmt_trt.analysis.summary import Marks, at_segments, by_kind
from rmt_trt.analysis.trajectory import FIGURES, Trajectory, figures, follow
from rmt_trt.commands import analyze
from rmt_trt.export.verify import random_document
from rmt_trt.model.checkpoint import load_model, save_model
from rmt_trt.model.recurrence import recurrence, split
from rmt_trt.training.tasks import open_task

M, D = 4, 16
OPERATIONS = {operation.name: operation for operation in ALL_OPERATIONS}
FILES = {
    "analysis.json", "analysis.md", "trajectory.csv", "trajectory.png", "attention_detect.png", "attention_write.png",
    "attention_retain.png", "attention_read.png",
}  # fmt: skip


def random_memory(seed: int, shape: tuple[int, int] = (M, D)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


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


def document_of(name: str, length: int, seed: int = 0) -> list[int]:
    """Ids for a model of the catalogue, none of which is dropped."""
    return random_document(models.model_config(name).spec(), length, seed).tolist()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of both forms without a tokenizer, each saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {name: folder / f"{name}.pt" for name in ("bert", "gpt2")}
    for name, path in found.items():
        save_model(path, models.make_model(name))
    return found


@pytest.mark.parametrize("name", ["example", "bert", "gpt2"])
def test_the_trajectory_of_an_engine_is_that_of_the_reference(name, checkpoints):
    """The example's as it was exported, on ONNX Runtime; the others' on the PyTorch engine."""
    path = models.example_bundle() if name == "example" else checkpoints[name]
    model = load_model(models.EXAMPLE if name == "example" else checkpoints[name]).model
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


def test_documents_of_ones_own_are_followed_up_to_a_number_of_segments(checkpoints):
    rows = np.full((2, 5 * S), -1)
    rows[0], rows[1, : 2 * S + 3] = document_of("gpt2", 5 * S), document_of("gpt2", 2 * S + 3, 1)
    with RMTRuntime(checkpoints["gpt2"], threads=1, max_batch=2) as runtime:
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


# What stands where in a segment.


@pytest.mark.parametrize("name", models.BACKBONES)
def test_regions_are_where_the_recurrence_lays_them_out(name):
    model, tokens = models.make_model(name), list(range(5, 5 + S))
    seen: list[torch.Tensor] = []
    hook = model.backbone.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["inputs_embeds"][0]), with_kwargs=True
    )
    list(recurrence(model, tokens))
    hook.remove()
    found = regions(model.config, S, [(3, 7)], [(17, S)])
    embed, config = model.backbone.get_input_embeddings(), model.config
    text = torch.tensor(tokens)
    wanted = {
        "prefix": embed(text.new_tensor(config.prefix_ids)), "middle": embed(text.new_tensor(config.middle_ids)),
        "suffix": embed(text.new_tensor(config.suffix_ids)), "fact": embed(text[3:7]), "question": embed(text[17:]),
        "noise": embed(torch.cat([text[:3], text[7:17]])),
        **dict.fromkeys(("memory", "read memory", "write memory"), model.memory),
    }  # fmt: skip
    assert [one.start for one in found] == [0, *(one.stop for one in found[:-1])]
    assert found[-1].stop == len(seen[0]) == config.positions
    for name in {one.name for one in found}:
        assert torch.equal(seen[0][places(found, (name,))], wanted[name]), name
    memories = {"encoder": {"memory"}, "decoder": {"read memory", "write memory"}}[config.form]
    assert {one.name for one in found if "memory" in one.name} == memories


def test_spans_are_clipped_to_a_segment_and_counted_from_it():
    assert clipped([(18, 25), (3, 7), (39, 45)], 20, 40) == [(0, 5), (19, 20)]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_shares_of_attention_sum_to_one_over_the_regions(name):
    model = models.make_model(name)
    ((_, maps),) = attention(model, document_of(name, 3 * S), {1})
    found = regions(model.config, S, [(3, 7)], [(17, S)])
    for operation in ALL_OPERATIONS:
        rows = rows_of(operation, found, model.config.form == "decoder")
        assert sum(shares_by_region(maps[1, 2], rows, found).values()) == pytest.approx(1)


def test_even_attention_gives_each_column_its_part_of_what_a_row_sees():
    found = regions(models.model_config("gpt2"), S, [(3, 7)])
    rows = rows_of(OPERATIONS["write"], found, causal=True)
    assert len(rows) == models.M
    wanted = np.mean([4 / (row + 1) for row in rows.tolist()])
    assert float(share(even(S + 2 * models.M, True), rows, places(found, ("fact",)))) == pytest.approx(wanted)
    assert float(share(even(10, False), np.arange(3), np.arange(4, 9))) == pytest.approx(0.5)


def test_rows_of_a_causal_model_come_behind_what_they_are_to_attend_to():
    found = regions(models.model_config("gpt2"), S, [(3, 7)])
    rows = rows_of(OPERATIONS["detect"], found, causal=True)
    assert rows.tolist() == list(range(models.M + 7, models.M + S))
    assert len(rows_of(OPERATIONS["detect"], found, causal=False)) == S - 4


def test_a_share_without_rows_is_no_number():
    assert np.isnan(share(np.ones((2, 3, 4, 4)) / 4, np.empty(0, int), np.arange(2))).all()


# Attention from the reference.


@pytest.mark.parametrize("name", models.BACKBONES)
def test_attention_maps_are_the_backbones_own_softmax_weights(name):
    model, document = models.make_model(name), document_of(name, 2 * S + 5)
    before = [memory for memory, _ in recurrence(model, document)]
    found = dict(attention(model, document))
    size, causal = model.config.positions, model.config.form == "decoder"
    cut = [len(segment) for segment in split(document, model.config)]
    assert [maps.shape for maps in found.values()] == [(2, 4, size - S + n, size - S + n) for n in cut]
    for maps in found.values():
        assert maps.sum(axis=-1) == pytest.approx(np.ones(maps.shape[:-1]), abs=1e-5)
        assert (np.abs(np.triu(maps, 1)).max() == 0) == causal
    assert [segment for segment, _ in attention(model, document, {2})] == [2]
    after = [memory for memory, _ in recurrence(model, document)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not model.backbone._forward_hooks
    assert not model.backbone._forward_pre_hooks


def test_the_first_layers_map_is_the_softmax_of_its_queries_and_keys():
    model, document = models.make_model("bert"), document_of("bert", S)
    ((_, maps),) = attention(model, document)
    seen: list[torch.Tensor] = []
    layer = model.backbone.bert.encoder.layer[0].attention.self
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    list(recurrence(model, document))
    hook.remove()
    query, key = (part(seen[0][0]).view(-1, 4, 8).transpose(0, 1) for part in (layer.query, layer.key))
    wanted = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(8), dim=-1)
    assert maps[0] == pytest.approx(wanted.detach().numpy(), abs=1e-5)


def story(length: int, facts: list[tuple[int, int]], question: tuple[int, int]) -> Any:
    return SimpleNamespace(
        length=length, label=0, fact_spans=tuple(facts), question_span=question, tokens=lambda: np.full(length, 5)
    )


def task_of(*stories: Any) -> Any:
    return SimpleNamespace(document=lambda length, seed, place: stories[seed % len(stories)])


GOOD = story(4 * S, [(S + 3, S + 7)], (4 * S - 4, 4 * S))


@pytest.mark.parametrize(
    "bad",
    [
        story(4 * S, [(S - 2, S + 2)], (4 * S - 4, 4 * S)),
        story(4 * S, [(2 * S + 1, 2 * S + 5)], (4 * S - 4, 4 * S)),
        story(4 * S, [(3, 7), (3 * S, 3 * S + 4)], (4 * S - 4, 4 * S)),
        story(4 * S, [(S - 4, S)], (4 * S - 4, 4 * S)),
        story(4 * S, [(3, 7)], (3 * S - 1, 4 * S)),
    ],
    ids=["fact across a border", "no noise between", "fact beside the question", "nothing behind it", "long question"],
)
def test_documents_for_maps_are_those_that_show_every_operation(bad):
    found = examples(task_of(bad, GOOD), 4, S, 2, 0, None)
    assert [one.seed for one in found] == [1, 3]
    assert found[0].segments == {"fact": (1,), "noise": (2,), "last": (3,)}
    assert found[0].text_spans(1, S) == ([(3, 7)], [])
    assert found[0].text_spans(3, S) == ([], [(S - 4, S)])


def test_where_no_document_shows_every_operation_it_is_said():
    bad = story(4 * S, [(3 * S, 3 * S + 4)], (4 * S - 4, 4 * S))
    with pytest.raises(ContractError, match=r"with facts at the place 1.0, 0 have each fact within a segment"):
        examples(task_of(bad), 4, S, 2, 0, 1.0)
    with pytest.raises(ContractError, match="take at least 3"):
        examples(task_of(GOOD), 2, S, 2, 0, None)


PLANTED = {"detect": (0, 3), "write": (1, 0), "retain": (0, 1), "read": (1, 2)}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_planted_attention_is_found_in_its_layer_and_head(name, monkeypatch):
    model = models.make_model(name)
    causal, n = model.config.form == "decoder", model.config.positions
    (document,) = examples(task_of(GOOD), 4, S, 1, 0, None)

    def planted(_, tokens, wanted):
        for segment in sorted(wanted):
            maps = np.tile(even(n, causal), (2, 4, 1, 1))
            found = regions(model.config, S, *document.text_spans(segment, S))
            for operation in ALL_OPERATIONS:
                if segment in document.segments[operation.segment]:
                    rows, columns = rows_of(operation, found, causal), places(found, operation.columns)
                    one = maps[PLANTED[operation.name]]
                    seen = columns if not causal else columns[columns <= rows.min()]
                    one[rows] = 0.0
                    one[np.ix_(rows, seen)] = 0.75 / len(seen)
                    one[rows, 5] += 0.25  # in both forms a place of neither memory nor fact
            yield segment, maps

    monkeypatch.setattr(attention_module, "attention", planted)
    for finding in find_operations(model, [document]):
        assert (finding.layer, finding.head) == PLANTED[finding.operation.name], finding.operation.name
        assert finding.shares[finding.layer, finding.head] == pytest.approx(0.75)
        others = np.delete(finding.shares.ravel(), 4 * finding.layer + finding.head)
        assert others == pytest.approx(np.full(7, finding.even))
        assert finding.drawn.share == pytest.approx(0.75)


def test_the_map_that_is_drawn_is_the_middle_one_and_the_table_the_mean(monkeypatch):
    model = models.make_model("bert")
    documents = examples(task_of(GOOD), 4, S, 3, 0, None)
    strengths = iter([s for s in (0.9, 0.2, 0.4) for _ in range(3)] + [0.4] * 4)
    size = model.config.positions

    def planted(_, tokens, wanted):
        for segment in sorted(wanted):
            maps = np.tile(np.eye(size), (2, 4, 1, 1))
            found = regions(model.config, S, *documents[0].text_spans(segment, S))
            strength, columns = next(strengths), places(found, ("fact",) if segment == 1 else ("memory",))
            maps[1, 3] = 0.0
            maps[1, 3][:, columns] = strength / len(columns)
            yield segment, maps

    monkeypatch.setattr(attention_module, "attention", planted)
    found = {finding.operation.name: finding for finding in find_operations(model, documents)}
    assert found["write"].each == pytest.approx((0.9, 0.2, 0.4))
    assert found["write"].shares[1, 3] == pytest.approx(0.5)
    assert (found["write"].drawn.seed, found["write"].drawn.share) == (2, pytest.approx(0.4))


# Pictures' cells.


def test_small_maps_are_drawn_token_by_token():
    found = regions(models.model_config("bert"), S, [(3, 7)])
    one, cells = random_memory(0, (27, 27)), cells_of(found, [f"w{i}" for i in range(S)])
    assert cells.pool == 1
    assert pooled(one, cells) == pytest.approx(one)
    assert [word for _, word in cells.words] == ["w3", "w4", "w5", "w6"]
    sides = {name: stop - start for name, start, stop in cells.bands if name in ("fact", "memory")}
    assert sides == {"fact": 4 * LARGE, "memory": models.M * LARGE}


def test_noise_is_pooled_and_nothing_else():
    found = [Region("memory", 0, 10), Region("noise", 10, 310), Region("fact", 310, 316), Region("noise", 316, 500)]
    cells, one = cells_of(found), random_memory(1, (500, 500))
    small = pooled(one, cells)
    assert len(small) < 80
    assert small[:10, :10] == pytest.approx(one[:10, :10])
    assert small[3, 10] == pytest.approx(one[3, 10 : 10 + cells.pool].mean())
    last = cells.starts[-2]
    assert small[-1, -1] == pytest.approx(one[last:, last:].mean())
    sizes = np.diff(cells.starts)
    assert (np.outer(sizes, sizes) * small).sum() == pytest.approx(one.sum())
    assert np.diff(cells.edges).tolist() == [LARGE if size == 1 else SMALL for size in sizes]
    assert cells.runs(np.array([310, 311, 315, 2])) == [
        (2 * LARGE, 3 * LARGE),
        (cells.edges[np.searchsorted(cells.starts, 310)], cells.edges[np.searchsorted(cells.starts, 312)]),
        (cells.edges[np.searchsorted(cells.starts, 315)], cells.edges[np.searchsorted(cells.starts, 316)]),
    ]


# The command.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs rmt-analyze in this process; gives its exit code and what it wrote to standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rmt-analyze", *map(str, arguments)])
        with pytest.raises(SystemExit) as info:  # noqa: PT012
            analyze.main()
            raise SystemExit(0)
        return int(info.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's bundle, analysed over documents whose fact stands in the fifth of twelve segments."""
    folder = tmp_path_factory.mktemp("analysed")
    before = sys.argv
    sys.argv = [
        "rmt-analyze", str(models.example_bundle()), "--task", "detect", "--segments", "12", "--documents", "3",
        "--place", "0.4", "--threads", "1", "--engine", "cpu", "--model", str(models.EXAMPLE), "-o", str(folder / "made"),
    ]  # fmt: skip
    try:
        with pytest.raises(SystemExit, match=r"^0$"):
            analyze.app()
    finally:
        sys.argv = before
    return folder / "made"


def test_the_command_writes_figures_report_and_pictures_that_open(analysed):
    import matplotlib.image

    assert {path.name for path in analysed.iterdir()} == FILES
    for path in analysed.glob("*.png"):
        assert path.stat().st_size < 150_000
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) >= 500
        assert image[..., :3].std() > 0.05, f"{path.name} is blank"


def test_the_report_tells_of_the_document_and_its_fact(analysed):
    facts = json.loads((analysed / "analysis.json").read_text(encoding="utf-8"))
    assert [one["fact_segments"] for one in facts["documents"]] == [[5]] * 3
    assert all(one["right"] and one["answer"] == one["answered"] for one in facts["documents"])
    assert facts["model"]["memory"] == [10, 128]
    assert [row["segments"] for row in facts["trajectory"]["at_segments"]] == [1, 2, 4, 8, 12]
    kinds = facts["trajectory"]["by_kind"]
    assert kinds["fact"]["change"]["median"] > 5 * kinds["noise"]["change"]["median"]
    text = (analysed / "analysis.md").read_text(encoding="utf-8")
    assert text == markdown(facts)
    assert str(models.example_bundle().parent) not in text
    assert all(f"({name})" in text for name in FILES if name.endswith(".png"))


def test_the_csv_holds_a_row_per_document_and_segment(analysed):
    with (analysed / "trajectory.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["document"], row["segment"]) for row in rows] == [
        (str(document), str(segment)) for document in (1, 2, 3) for segment in range(1, 13)
    ]
    assert {row["segment"]: row["kind"] for row in rows[:12]} == {
        **{str(n): "noise" for n in range(2, 12)}, "1": "first", "5": "fact", "12": "question",
    }  # fmt: skip
    for row in rows:
        each = [float(row[f"previous_{i}"]) for i in range(1, 11)]
        assert float(row["previous"]) == pytest.approx(np.mean(each), abs=1e-5)
    assert rows[0]["initial"] == rows[0]["previous"]


def test_the_report_of_attention_agrees_with_itself(analysed):
    facts = json.loads((analysed / "analysis.json").read_text(encoding="utf-8"))["attention"]
    assert [one["name"] for one in facts["operations"]] == list(OPERATIONS)
    task = open_task("detect")
    facts_of_seed = {seed: task.labels[task.document(4 * 128, seed, 0.4).label] for seed in facts["seeds"]}
    for one in facts["operations"]:
        shares = np.array(one["share_by_layer_and_head"])
        assert shares.shape == (4, 4)
        assert one["share"] == shares.max() == shares[one["layer"] - 1, one["head"] - 1]
        assert one["share"] == pytest.approx(np.mean(one["share_of_each_map"]), rel=1e-5)
        counts = Counter(facts_of_seed[seed] for seed in facts["seeds"])
        assert set(one["share_by_answer"]) == set(counts)
        if one["maps"] == len(facts["seeds"]):
            parts = [counts[name] * value for name, value in one["share_by_answer"].items()]
            assert sum(parts) / one["maps"] == pytest.approx(one["share"], rel=1e-5)
        drawn = one["drawn"]
        assert sum(drawn["share_by_region"].values()) == pytest.approx(1, abs=1e-4)
        columns = [drawn["share_by_region"].get(name, 0) for name in one["columns"]]
        assert drawn["share"] == pytest.approx(sum(columns), abs=1e-5)
        assert drawn["regions"][-1]["stop"] == 141
        assert len(drawn["words"]) == len(drawn["ids"]) == 128
    write = facts["operations"][1]
    assert write["share"] > 3 * write["even_attention"]  # the example was trained to find the fact


def test_a_document_of_ones_own_is_followed_without_marks_or_maps(command, checkpoints, tmp_path):
    np.save(tmp_path / "ids.npy", document_of("gpt2", 3 * S + 5))
    code, err = command(checkpoints["gpt2"], "--tokens", tmp_path / "ids.npy", "-o", tmp_path / "out")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name for name in FILES if "attention" not in name}
    facts = json.loads((tmp_path / "out/analysis.json").read_text(encoding="utf-8"))
    assert (facts["engine"], facts["documents"]) == ("torch", [{"tokens": 3 * S + 5, "segments": 4}])
    assert "## By what stands" not in (tmp_path / "out/analysis.md").read_text(encoding="utf-8")


def test_a_text_of_the_users_is_the_background(command, place):
    """By the example's own tokenizer, which lacks the words of the one task and knows those of the other."""
    options = "--task memorize,reasoning --text words.txt --part 0.5:1 --segments 2 --documents 2 --attention 0 -o out"
    code, err = command("e.rmt", *options.split())
    assert code == 1
    assert "use one that knows these words" in err
    code, err = command("e.rmt", *options.replace(",reasoning", "").split())
    assert code == 0, err
    facts = json.loads(Path("out/analysis.json").read_text(encoding="utf-8"))
    assert (facts["task"]["text"], facts["task"]["part"]) == ("words.txt", [0.5, 1.0])
    assert [one["fact_segments"] for one in facts["documents"]] == [[1], [1]]
    assert "in words.txt" in Path("out/analysis.md").read_text(encoding="utf-8")


BAD: dict[str, tuple[str, str]] = {
    "neither task nor tokens": ("e.rmt", "give either --task, of which documents are made, or --tokens FILE"),
    "both": ("e.rmt --task detect --tokens ids.npy", "give either --task"),
    "text with tokens": ("e.rmt --tokens ids.npy --text words.txt", "--text, --part and --place go with --task"),
    "no segments": ("e.rmt --task detect --segments 0", "--segments is 0; expected at least 1"),
    "no documents": ("e.rmt --task detect --documents 0", "--documents is 0; expected at least 1"),
    "more segments than are held": (
        "e.rmt --task detect --segments 100000 --documents 32", "32 documents have 3,200,000 segments in all"
    ),
    "place beyond the text": ("e.rmt --task detect --place 1.5", "--place is 1.5; expected 0, the very start, to 1"),
    "too few segments for maps": ("e.rmt --task detect --attention 2", "--attention is 2; a fact, noise and the question"),
    "place without noise behind it": (
        "e.rmt --task detect --place 1 --documents 1 --segments 1", "with facts at the place 1.0, 0 have each fact"
    ),
    "unknown task": ("e.rmt --task memorise", "task is 'memorise'; expected one or several of memorize"),
    "missing model": ("x.rmt --task detect", "x.rmt cannot be opened (No such file or directory)"),
    "missing text": ("e.rmt --task detect --text x.txt", "x.txt"),
    "missing tokens": ("e.rmt --tokens x.npy", "x.npy cannot be read"),
    "model without tokenizer": ("b.pt --task detect --text words.txt", "b.pt holds no tokenizer"),
    "tokens as text for a model without tokenizer": ("b.pt --tokens words.txt", "b.pt holds no tokenizer"),
    "tokens beyond the vocabulary": ("b.pt --tokens ids.npy", "500"),
    "another model's classes": ("b.pt --task detect", "the task's ids go up to 332"),
    "part without text": ("e.rmt --task detect --part 0:1", "--part 0:1 is a part of a text"),
    "part that is none": ("e.rmt --task detect --text words.txt --part all", "--part is 'all'; expected two shares"),
    "part out of order": ("e.rmt --task detect --text words.txt --part 0.9:0.1", "0.9"),
    "checkpoint of a checkpoint": ("e.pt --task detect --model e.pt", "--model goes with a bundle; e.pt is a checkpoint"),
    "another model's checkpoint": ("e.rmt --task detect --model b.pt", "(--attention 0 leaves the maps out)"),
    "a graph without its model": ("e.rmt/step.onnx --task detect", "e.rmt/step.onnx is no bundle's folder"),
    "a file for a folder": ("e.rmt --task detect --attention 0 -o words.txt", "--out is words.txt, a file"),
    "a folder in a file": ("e.rmt --task detect --attention 0 -o words.txt/out", "cannot write words.txt/out"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models and inputs."""
    monkeypatch.chdir(tmp_path)
    for name, target in {
        "e.rmt": models.example_bundle(), "e.pt": models.EXAMPLE, "b.pt": checkpoints["bert"],
    }.items():  # fmt: skip
        Path(name).symlink_to(target)
    np.save("ids.npy", np.array([5, 6, 500]))
    Path("words.txt").write_text("A miller found a rope. The old captain slept.\n" * 50, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_nonsense_gets_one_clear_line(case, command, place):
    arguments, message = BAD[case]
    code, err = command(*arguments.split())
    assert (code, len(err.strip().splitlines())) == (1, 1), err
    assert message in err
    assert "Traceback" not in err


def test_a_bundles_maps_without_torch_say_how_to_go_on(command, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, err = command("e.rmt", "--task", "detect")
    assert code == 1
    assert "the attention maps (--attention 0 leaves the maps out) come from the PyTorch recurrence" in err
    assert "pip install 'rmt-trt[export]'" in err
    code, err = command("e.rmt", "--task", "detect", "--attention", 0, "--segments", 3, "--engine", "cpu", "-o", "out")
    assert code == 0, err


def test_without_matplotlib_it_is_said_before_the_work(command, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, err = command("e.rmt", "--task", "detect")
    assert code == 1
    assert "pip install 'rmt-trt[analyze]'" in err


def test_an_engine_for_fewer_documents_is_said(checkpoints):
    with (
        RMTRuntime(checkpoints["gpt2"], max_batch=2) as runtime,
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


def test_documents_of_every_task_show_their_operations():
    with RMTRuntime(models.example_bundle(), engine="cpu", threads=1) as runtime:
        size = runtime.spec.segment_length
    for name in ("memorize", "detect", "reasoning"):
        for one in examples(open_task(name), 4, size, 3, 0, None):
            assert len(one.tokens) == 4 * size
            assert len(one.facts) == (2 if name == "reasoning" else 1)
