"""rmt-analyze: attention maps of a memory's operations, from what stands where in a segment to a picture's cells."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from memories import OPERATIONS, document_of, random_memory
from models import S

from rmt_trt import ContractError, RMTRuntime
from rmt_trt.analysis import attention as attention_module
from rmt_trt.analysis.attention import attention, examples, find_operations
from rmt_trt.analysis.cells import LARGE, SMALL, cells_of, pooled
from rmt_trt.analysis.layout import OPERATIONS as ALL_OPERATIONS
from rmt_trt.analysis.layout import Region, clipped, even, places, regions, rows_of, share, shares_by_region
from rmt_trt.model.recurrence import recurrence, split
from rmt_trt.training.tasks import open_task

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


def test_documents_of_every_task_show_their_operations():
    with RMTRuntime(models.example_bundle(), engine="cpu", threads=1) as runtime:
        size = runtime.spec.segment_length
    for name in ("memorize", "detect", "reasoning"):
        for one in examples(open_task(name), 4, size, 3, 0, None):
            assert len(one.tokens) == 4 * size
            assert len(one.facts) == (2 if name == "reasoning" else 1)


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
