"""Mixed precision: what each unit does when quantized alone, the search for a mix, its file, and rescaling by channel."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import S, made

from rmt_trt.bundle import Bundle
from rmt_trt.calibration import (
    FP8,
    INT8,
    UINT8_INT8,
    CollectOptions,
    Kind,
    Ranges,
    Source,
    collect,
    load_ranges,
    static_graph,
)
from rmt_trt.calibration import search as searching
from rmt_trt.calibration.beside import At, Drifted, Through, beside
from rmt_trt.calibration.mix import Budget, Reached
from rmt_trt.calibration.recall import Answered
from rmt_trt.calibration.search import MixOptions, choose_mix, drift_of, keepable, search
from rmt_trt.calibration.sensitivity import sensitivity
from rmt_trt.calibration.smooth import noise, scales, smoothed
from rmt_trt.calibration.step_graph import read_step
from rmt_trt.calibration.switched import switched
from rmt_trt.calibration.tables import tables
from rmt_trt.calibration.tapped import step_entry
from rmt_trt.calibration.units import Unit, memory_units, table_units, units_of
from rmt_trt.errors import FormatError, VerificationError
from rmt_trt.export.verify import relative_error
from rmt_trt.runtime.engines.cpu import open_session

THROUGH = Through(segments=5, documents=2)
MEMORY = "memory"


def documents(name: str, *lengths: int) -> list[Source]:
    return [Source(f"{seed}", lambda n=n, seed=seed: made(name).document(n, seed)) for seed, n in enumerate(lengths)]


SOURCES = documents("bert", 6 * S + 3, 4 * S)


@pytest.fixture(scope="module")
def bert() -> Bundle:
    return Bundle(made("bert").bundle)


@pytest.fixture(scope="module")
def ranges(bert: Bundle) -> Ranges:
    return collect(bert, SOURCES, CollectOptions(draws=2, threads=1))


def run(path: Path, states: Any, segment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    memory, logits = open_session(path, 1).run(None, {MEMORY: states, "segment": segment})
    return memory, logits


@pytest.mark.parametrize("kind", [UINT8_INT8, INT8, FP8], ids=["uint8", "int8", "fp8"])
def test_a_switched_graph_is_the_fp32_step_the_deployed_one_and_all_between(
    kind: Kind, bert: Bundle, ranges: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmt_trt.calibration.tables.LEAST_BYTES", 1 << 10)
    model, found = read_step(bert)
    looked_up = tables(model) if kind.tables else ()
    assert bool(looked_up) == kind.tables
    units = (*units_of(model, found), *table_units(looked_up), *memory_units(bert.spec))
    (tmp_path / "switched").mkdir()
    graph = switched(bert, ranges, kind, units, tmp_path / "switched", threads=1)
    states = np.repeat(bert.initial()[0][None], 2, axis=0)
    segment = np.stack([made("bert").document(S, 1), np.full(S, -1)])  # a row that has ended
    everything = keepable(bert, kind)
    first = next(unit for unit in units if not unit.way)
    for on, keep in (
        ((), None),
        ([unit for unit in units if not unit.way], ()),
        ([first], everything - set(first.keep)),
    ):
        (memory,), logits = graph.step((states,), segment, [unit in on for unit in units])
        path = bert.graph_path(step_entry(bert))
        if keep is not None:
            path = tmp_path / f"{len(on)}.onnx"
            static_graph(bert, ranges, path, kind, keep)
        wanted = run(path, states, segment)
        assert relative_error(memory, wanted[0]) < 1e-6
        assert relative_error(logits[:1], wanted[1][:1]) < 1e-6
        assert np.array_equal(memory[1], states[1])


def test_a_unit_drifts_as_the_deployed_graph_does_in_which_it_alone_is_quantized(
    bert: Bundle, ranges: Ranges, tmp_path: Path
) -> None:
    found = sensitivity(bert, ranges, UINT8_INT8, SOURCES, THROUGH, "inputs", threads=1)
    assert [one.unit.name for one in found][-2:] == ["memory read", "memory written"]
    one = next(one for one in found if one.unit.name.endswith("query+key+value"))
    assert len(one.unit.nodes) == 3
    static_graph(bert, ranges, tmp_path / "one.onnx", UINT8_INT8, keepable(bert, UINT8_INT8) - set(one.unit.nodes))
    alone = drift_of(bert, tmp_path / "one.onnx", SOURCES, MixOptions(through=THROUGH, threads=1), lambda *_: None)
    assert 1e-5 < alone.drift < 0.1
    assert one.drifted.drift == pytest.approx(alone.drift, rel=1e-3)
    assert [at.segment for at in alone.along] == [1, 2, 4]
    assert alone.end.segment == 5


def test_a_measurement_that_was_stopped_goes_on_to_the_same_figures(
    bert: Bundle, ranges: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmt_trt.calibration.beside.SAVE_SECONDS", 0.0)
    partial, seen = tmp_path / "partial.npz", []

    def measure(stop: int, through: Through = THROUGH) -> Any:
        def progress(done: int, total: int) -> None:
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        return sensitivity(
            bert, ranges, UINT8_INT8, SOURCES, through, "layers", threads=1, progress=progress, partial=partial
        )

    with pytest.raises(KeyboardInterrupt):
        measure(3)
    again = measure(9)
    assert seen == [1, 2, 3, 4, 5]
    assert again == sensitivity(bert, ranges, UINT8_INT8, SOURCES, THROUGH, "layers", threads=1)
    with pytest.raises(FormatError, match="is kept work of a measurement of drift with another model, other ranges"):
        measure(9, Through(4, 2))


def test_the_ways_of_the_memory_are_quantized_in_the_range_of_the_state(bert: Bundle, ranges: Ranges) -> None:
    found = {
        one.unit.name: one.drifted for one in sensitivity(bert, ranges, INT8, SOURCES, THROUGH, "layers", threads=1)
    }
    step = ranges.states[MEMORY].threshold / 127
    session = open_session(bert.graph_path(step_entry(bert)), 1)

    def stepped(states: tuple[np.ndarray, ...], segment: np.ndarray) -> Any:
        memory, logits = session.run(None, {MEMORY: states[0], "segment": segment})
        return (memory,), logits

    def coded(memory: np.ndarray) -> np.ndarray:
        return (np.clip(np.rint(memory / np.float32(step)), -128, 127) * np.float32(step)).astype(np.float32)

    def written(states: tuple[np.ndarray, ...], segment: np.ndarray) -> Any:
        (memory,), logits = stepped(states, segment)
        return (coded(memory),), logits

    def read(states: tuple[np.ndarray, ...], segment: np.ndarray) -> Any:
        return stepped((coded(states[0]),), segment)

    wanted = beside(bert, stepped, [read, written], SOURCES[:1], Through(1, 1))
    first = {
        one.unit.name: one.drifted
        for one in sensitivity(bert, ranges, INT8, SOURCES[:1], Through(1, 1), "layers", threads=1)
    }
    for name, one in zip(("memory read", "memory written"), wanted, strict=True):
        assert first[name].drift == pytest.approx(one.drift, rel=1e-3)
        assert found[name].drift > 1e-4


def test_errors_and_answers_are_counted_at_octaves_and_where_each_document_ends(bert: Bundle) -> None:
    def exact(states: tuple[np.ndarray, ...], segment: np.ndarray) -> Any:
        return (np.ones_like(states[0]),), np.tile([0.0, 1.0, 0.0], (len(segment), 1))

    counts = []

    def other(states: tuple[np.ndarray, ...], segment: np.ndarray) -> Any:
        counts.append(len(counts) + 1)
        logits = np.tile([0.0, 1.0, 0.0], (len(segment), 1))
        logits[1] = [2.0, 1.0, 0.0]  # the second document is answered wrong throughout
        return (np.ones_like(states[0]) * (1 + counts[-1] / 100),), logits

    (found,) = beside(bert, exact, [other], documents("bert", 5 * S, 3 * S, 9 * S), Through(6, 3))
    assert [(at.segment, at.documents) for at in found.along] == [(1, 3), (2, 3), (4, 2)]
    assert [at.memory for at in found.along] == pytest.approx([0.01, 0.02, 0.04])
    assert (found.end.segment, found.end.memory) == (6, pytest.approx(0.05))
    assert found.drift == pytest.approx(0.05)
    assert found.changed == pytest.approx(3 / 14)
    assert found.ends == 1


def test_longer_documents_take_no_more_memory(bert: Bundle, tmp_path: Path) -> None:
    def step(states: tuple[np.ndarray, ...], segment: np.ndarray) -> Any:
        return states, np.zeros((len(segment), 5))

    peaks = []
    for length in (60_000, 120_000):
        np.save(tmp_path / f"{length}.npy", np.random.default_rng(0).integers(4, 96, length).astype(np.int32))
        book = Source("book", lambda length=length: np.load(tmp_path / f"{length}.npy", mmap_mode="r"))
        tracemalloc.start()
        try:
            beside(bert, step, [step], [book], Through(1 << 20, 1))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 50_000  # as int64 the tokens that are more take 480 KB


def reached(drift: float) -> Reached:
    return Reached(Drifted((At(1, 1, drift, drift),), At(1, 1, drift, drift), 0.0, 0))


@pytest.mark.parametrize("enough", [0, 1, 2, 3, 5, 8, 12])
def test_the_search_finds_the_fewest_that_hold_by_few_measurements(enough: int) -> None:
    units = [Unit(f"u{place}", (f"n{place}",)) for place in range(13)]
    ordered: list[int] = []

    def order() -> list[Unit]:
        ordered.append(1)
        return units

    def measure(kept: Any) -> Reached:
        assert list(kept) == units[: len(kept)]
        return reached(0.5 / (1 + len(kept)))

    kept, found, tried = search(order, measure, Budget(0.5 / (1 + enough)))
    assert [unit.name for unit in kept] == [f"u{place}" for place in range(enough)]
    assert found.drifted is not None
    assert found.drifted.drift == pytest.approx(0.5 / (1 + enough))
    assert len(ordered) == (enough > 0)
    assert len(tried) <= 8


def test_a_budget_that_no_mix_meets_says_how_near_they_came_and_what_was_kept(
    bert: Bundle, ranges: Ranges, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [Unit(name, (name,)) for name in "abc"]
    with pytest.raises(
        VerificationError,
        match=r"no mix meets --max-drift 0.01: the nearest, with 2 of 3 units kept in float32 \(a, b\), has drift 1.0e-01\. "
        r"With all of them kept nothing would be quantized, so that nothing was added",
    ) as caught:
        search(lambda: units, lambda kept: reached(0.3 - 0.1 * len(kept)), Budget(0.01))
    assert [one["kept"] for one in caught.value.report["tried"]] == [0, 1, 2]
    monkeypatch.setattr(searching, "answered", lambda *_: (Answered(4, 7, 10),))
    questions: Any = object()
    with pytest.raises(VerificationError, match="the fp32 graph itself has 7 of 10 right at 4 segments"):
        choose_mix(bert, ranges, UINT8_INT8, SOURCES, MixOptions(Budget(None, 0.8), THROUGH, questions=questions))


def test_a_mix_holds_its_budget_as_it_is_deployed_and_one_kept_less_does_not(bert: Bundle, ranges: Ranges) -> None:
    options = MixOptions(through=THROUGH, grouping="inputs", threads=1)
    plain = choose_mix(bert, ranges, UINT8_INT8, SOURCES, replace(options, budget=Budget(1.0)))
    assert (plain.mix.kept, plain.mix.units, plain.found) == ((), (), ())
    whole = plain.mix.reached["drift"]["worst"]
    chosen = choose_mix(bert, ranges, UINT8_INT8, SOURCES, replace(options, budget=Budget(whole / 1.5))).mix
    assert 0 < len(chosen.kept) < len(chosen.units) - 2
    assert chosen.reached["drift"]["worst"] <= whole / 1.5
    worst = {one["kept"]: one["drift"]["worst"] for one in chosen.tried}
    assert worst[len(chosen.kept) - 1] > whole / 1.5
    order = [unit["unit"] for unit in chosen.units if unit["keep"]]
    assert list(chosen.kept) == order[: len(chosen.kept)]
    smooth = choose_mix(bert, ranges, UINT8_INT8, SOURCES, replace(options, budget=Budget(1.0), smooth=0.5)).mix
    assert smooth.smooth == 0.5
    assert smooth.reached["drift"]["worst"] != whole


def test_rescaling_follows_the_paper_and_goes_by_all_products_that_share_a_tensor(bert: Bundle, ranges: Ranges) -> None:
    assert scales(np.array([4.0, 0.0, 9.0]), np.array([0.25, 1.0, 0.0]), 0.5) == pytest.approx([4.0, 1.0, 1.0])
    model, found = read_step(bert)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shared = [product for product in found if product.activation == found[0].activation]
    name, rows = found[0].activation, np.max([np.abs(weights[one.weight]).max(axis=1) for one in shared], axis=0)
    assert len(shared) == 3
    largest = np.array(ranges.channels[name])
    largest[0] *= 20  # an outlier, for which rescaling is made
    given = replace(
        ranges,
        tensors={**ranges.tensors, name: replace(ranges.tensors[name], threshold=0.5 * largest[0])},
        channels={**ranges.channels, name: tuple(largest)},
    )
    changed, rescale = smoothed(bert, given, 0.6)
    assert rescale[name] == pytest.approx(largest**0.6 / rows**0.4, rel=1e-5)
    # Half of the largest magnitude was the range; so it is of the rescaled tensor.
    assert changed.tensors[name].threshold == pytest.approx(0.5 * (largest / rescale[name]).max(), rel=1e-5)
    assert {k: v for k, v in changed.tensors.items() if k not in rescale} == {
        k: v for k, v in given.tensors.items() if k not in rescale
    }
    nodes = {product.node for product in shared}
    assert name not in smoothed(bert, given, 0.6, nodes)[1]
    assert name in smoothed(bert, given, 0.6, nodes - {shared[0].node})[1]


def test_the_noise_of_rounding_is_estimated_as_it_is_measured() -> None:
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((2000, 64)), random.standard_normal((64, 32))
    largest, threshold = np.abs(x).max(axis=0), float(np.abs(x).max())
    columns = np.abs(weight).max(axis=0) / 127
    rounded = np.rint(x * 127.5 / threshold) * threshold / 127.5 @ (np.rint(weight / columns) * columns)
    measured = ((rounded - x @ weight) ** 2).sum(axis=1).mean()
    assert 0.5 < noise(threshold, largest, [weight]) / measured < 1.5
    assert noise(threshold, largest, [weight, weight]) == pytest.approx(2 * noise(threshold, largest, [weight]))


def test_rescaling_helps_where_one_channel_reaches_far_beyond_the_others(
    bert: Bundle, ranges: Ranges, tmp_path: Path
) -> None:
    """A range a hundred times as wide as its channels are, but for one, stands for an outlier."""
    name = next(iter(ranges.tensors))
    channels = [100 * max(ranges.channels[name]), *ranges.channels[name][1:]]
    wide = replace(ranges.tensors[name], threshold=channels[0])
    outlier = replace(
        ranges, tensors={**ranges.tensors, name: wide}, channels={**ranges.channels, name: tuple(channels)}
    )
    changed, rescale = smoothed(bert, outlier, 0.5)
    static_graph(bert, outlier, tmp_path / "plain.onnx", UINT8_INT8)
    static_graph(bert, changed, tmp_path / "smooth.onnx", UINT8_INT8, rescale=rescale)
    options = MixOptions(through=THROUGH, threads=1)
    plain, smooth = (
        drift_of(bert, tmp_path / f"{one}.onnx", SOURCES, options, lambda *_: None) for one in ("plain", "smooth")
    )
    assert smooth.drift < 0.5 * plain.drift


def test_channels_are_kept_in_the_file_and_older_files_are_read_without(
    bert: Bundle, ranges: Ranges, tmp_path: Path
) -> None:
    path = tmp_path / "ranges.json"
    ranges.save(path)
    assert load_ranges(path) == ranges
    for name, tensor in ranges.tensors.items():
        assert max(ranges.channels[name]) == pytest.approx(max(-tensor.low, tensor.high), rel=1e-6)
    value = json.loads(path.read_text())
    for channels in (None, {"version": 2}):
        path.write_text(json.dumps({**value, "channels": channels}))
        old = load_ranges(path)
        assert old == replace(ranges, channels={})
        with pytest.raises(
            FormatError, match="the ranges hold no largest magnitudes of channels, which rescaling goes by"
        ):
            smoothed(bert, old, 0.5)
    value["channels"]["values"][next(iter(ranges.tensors))] = "AACAvw=="  # -1
    path.write_text(json.dumps(value))
    with pytest.raises(FormatError, match="has channels that are no magnitudes"):
        load_ranges(path)


def test_first_segments_alone_are_looked_at_where_that_is_asked_for(bert: Bundle, tmp_path: Path) -> None:
    first = collect(bert, SOURCES, CollectOptions(threads=1, first_only=True))
    assert [document["drawn"] for document in first.documents] == [(0,), (0,)]
    memory = first.states[MEMORY]
    initial = bert.initial()[0]
    assert memory.early == pytest.approx((initial.min(), initial.max()))
    assert (memory.middle, memory.late) == (None, None)
    assert [start for start, _, _ in memory.along] == [0]
    first.save(tmp_path / "ranges.json")
    assert load_ranges(tmp_path / "ranges.json") == first


def test_only_products_read_what_was_quantized(bert: Bundle, ranges: Ranges, tmp_path: Path) -> None:
    """The tensor before a feed-forward product is also added to the residual stream, which stays float32."""
    static_graph(bert, ranges, tmp_path / "int8.onnx", UINT8_INT8)
    nodes = onnx.load(tmp_path / "int8.onnx").graph.node
    coded = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    assert {node.op_type for node in nodes if coded & set(node.input)} == {"MatMul"}
    assert any(node.op_type == "QuantizeLinear" and _added(nodes, node.input[0]) for node in nodes)


def _added(nodes: Any, name: str) -> bool:
    return any(node.op_type == "Add" and name in node.input for node in nodes)
