"""Calibration along the recurrence: which segments are looked at, what the ranges are, and the INT8 graph they give."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import S, example_bundle, made
from onnx import TensorProto, helper
from onnxruntime.quantization import calibrate as library
from torch import nn

from rmt_trt import RMTRuntime, StateSpec, StepSpec
from rmt_trt.bundle import Bundle
from rmt_trt.calibration import (
    UINT8_INT8,
    CollectOptions,
    Ranges,
    Source,
    add_static,
    collect,
    compare,
    load_ranges,
    recurrent_feeds,
    static_graph,
)
from rmt_trt.calibration import statistics as gathering
from rmt_trt.calibration.documents import PARTS, drawn
from rmt_trt.calibration.products import products
from rmt_trt.calibration.statistics import Statistics
from rmt_trt.commands import calibrate as command
from rmt_trt.errors import ContractError, FormatError, TokenError, VerificationError
from rmt_trt.export import EngineOptions, ExportOptions, export_step_bundle
from rmt_trt.export.verify import relative_error

collecting = sys.modules["rmt_trt.calibration.collect"]
WIDTH, LENGTH, VOCAB = 8, 12, 50
COUNTING = StepSpec("custom", (StateSpec(shape=(1, WIDTH)),), LENGTH, VOCAB, "classifier", 3)


def options(method: str = "minmax", draws: int = 2, seed: int = 0) -> CollectOptions:
    return CollectOptions(method, draws, seed, threads=1)


def sources(name: str, *lengths: int) -> list[Source]:
    """Documents of a model of the catalogue."""
    documents = [made(name).document(length, seed) for seed, length in enumerate(lengths)]
    return [Source(f"document {number}", lambda ids=ids: ids) for number, ids in enumerate(documents)]


@pytest.fixture(scope="module")
def gpt2() -> Ranges:
    return collect(made("gpt2").bundle, sources("gpt2", 12 * S + 3, 5 * S), options())


@pytest.fixture(scope="module")
def example() -> Ranges:
    """Ranges of the trained example, over one of its own documents."""
    from rmt_trt.training.tasks import open_task

    document = open_task("memorize").document(20 * 128 - 5, 7)
    return collect(example_bundle(), [Source("a question", document.pieces)], options(draws=4))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the example's bundle, to be added to."""
    return Path(shutil.copytree(example_bundle(), tmp_path / "memorize.rmt"))


def test_segments_are_drawn_from_each_third_and_the_same_for_the_same_seed() -> None:
    chosen = drawn(1000, 5, seed=3, number=0)
    assert {0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 999} <= set(chosen)
    others = set(chosen) - {0, 999} - {1 << power for power in range(10)}
    assert all(1 <= len([k for k in others if 3 * k // 1000 == part]) <= 5 for part in range(3))
    assert chosen == drawn(1000, 5, seed=3, number=0) == tuple(sorted(chosen))
    assert len({drawn(1000, 5, seed, number) for seed in (3, 4) for number in (0, 1)}) == 4
    assert drawn(7, 5, seed=0, number=0) == tuple(range(7))


def test_ranges_are_those_of_the_memory_that_the_segments_were_drawn_at() -> None:
    """Form E cuts the first segment short: parts and octaves are counted in its own segments."""
    this = made("bert")
    found = collect(this.bundle, sources("bert", 13 * S + 3), options())
    with this.open() as runtime:
        pieces = [piece.memory for piece in runtime.stream(this.document(13 * S + 3), memory=True)]
        before = [runtime.initial[0], *pieces[:-1]]
    assert found.documents[0]["segments"] == len(before) == 14
    chosen = found.documents[0]["drawn"]
    assert len(chosen) < 14
    for number, part in enumerate(PARTS):
        looked = [before[k] for k in chosen if 3 * k // 14 == number]
        assert getattr(found.states["memory"], part) == pytest.approx((np.min(looked), np.max(looked)), rel=1e-4)
    for start, low, high in found.states["memory"].along:
        looked = [before[k] for k in chosen if k == start or start < k < 2 * start]
        assert (low, high) == pytest.approx((np.min(looked), np.max(looked)), rel=1e-4)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_thresholds_are_those_of_the_library_calibrators(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gathering.BINS, "entropy", 256)
    this = made("bert")
    found = collect(this.bundle, sources("bert", 9 * S), options(method))
    # Its own calibrator by least and largest value makes a graph of this step in which two nodes have one name.
    theirs = library.create_calibrator(
        str(this.bundle / "step.onnx"), ["MatMul", "Gemm"], str(tmp_path / "augmented.onnx"),
        library.CalibrationMethod.Entropy if method == "entropy" else library.CalibrationMethod.Percentile,
        extra_options={"symmetric": True, **({"num_bins": 256} if method == "entropy" else {})},
    )  # fmt: skip
    theirs.augment_graph()
    theirs.create_inference_session()
    chosen = found.documents[0]["drawn"]
    with this.open() as runtime:
        for feed in recurrent_feeds(runtime, [this.document(9 * S)]):
            if feed.segment in chosen:
                theirs.collect_data(OneFeed(feed.inputs))
    bounds, held = theirs.compute_data(), theirs.collector.histogram_dict
    for name, tensor in found.tensors.items():
        assert (tensor.low, tensor.high) == pytest.approx(held[name][2:4], rel=1e-4), name
        if method != "minmax":
            # Where a value stands right at a bin's edge, its last digit moves it into the next.
            assert tensor.threshold == pytest.approx(np.abs(bounds[name].range_value).max(), rel=2e-2), name
    whole = [tensor.threshold == max(-tensor.low, tensor.high) for tensor in found.tensors.values()]
    assert all(whole) == (method == "minmax")


class OneFeed(library.CalibrationDataReader):
    """A data reader of one feed."""

    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self._left = [feed]

    def get_next(self) -> Any:
        return self._left.pop() if self._left else None


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize("stop", [3, 11])
def test_a_run_that_was_stopped_goes_on_to_the_same_ranges(
    method: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0.0)
    monkeypatch.setitem(gathering.BINS, "entropy", 256)
    work, calls = (made("bert").bundle, sources("bert", 7 * S + 3, 6 * S)), []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == stop:
            raise KeyboardInterrupt

    partial = tmp_path / "partial.npz"
    with pytest.raises(KeyboardInterrupt):
        collect(*work, options(method), partial, interrupt)
    seen: list[tuple[int, int]] = []
    again = collect(*work, options(method), partial, lambda done, total: seen.append((done, total)))
    assert len(seen) == 14 - stop
    assert seen[-1] == (13 * S + 3, 13 * S + 3)
    assert not partial.exists()
    assert again == collect(*work, options(method))


def test_kept_work_of_another_calibration_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0.0)
    partial, this = tmp_path / "partial.npz", made("bert").bundle

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(this, sources("bert", 7 * S), options(), partial, interrupt)
    for other in (options(seed=1), options("percentile"), options(draws=3)):
        with pytest.raises(FormatError, match="with another model, other documents or options"):
            collect(this, sources("bert", 7 * S), other, partial)
    with pytest.raises(FormatError, match="with another model, other documents or options"):
        collect(this, sources("bert", 6 * S), options(), partial)
    partial.write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"partial.npz is no kept work of a calibration .* Remove it to begin anew"):
        collect(this, sources("bert", 7 * S), options(), partial)


class Counting(nn.Module):
    """A step whose memory counts segments, and whose product sees what `hidden` makes of text and count."""

    def __init__(self, hidden: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.inner, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.memory = nn.Parameter(torch.zeros(1, WIDTH))
        self.hidden = hidden

    def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        valid = (segment >= 0)[:, :, None]
        text = (self.embed(segment.clamp(min=0)) * valid).sum(1, True)
        value = {
            "nan": lambda: text * torch.sqrt(5.5 - memory),
            "constant": lambda: torch.clamp(text * 0, 2, 2),
            "sound": lambda: text + torch.tanh(memory),
        }[self.hidden]()
        inner = torch.tanh(self.inner(value))
        return torch.where(valid[:, :1], memory + 1, memory), self.head(inner[:, 0])


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of Counting."""
    folder = tmp_path_factory.mktemp("counting")
    found = {name: folder / f"{name}.rmt" for name in ("nan", "constant", "sound")}
    for name, path in found.items():
        export_step_bundle(Counting(name), COUNTING, path, options=ExportOptions(segments=2))
    return found


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", r"tensor '\w+' is nan in segment 6 of a book: the fp32 step itself fails there"),
        ("constant", r"tensor '\w+' is constant, 2 in every segment that was looked at"),
    ],
)
def test_a_tensor_without_a_range_is_named(counting: dict[str, Path], name: str, message: str) -> None:
    taken = collect(counting["sound"], [Source("a book", lambda: ids(8 * LENGTH))], options(draws=8))
    with pytest.raises(ContractError, match=message) as caught:
        collect(counting[name], [Source("a book", lambda: ids(8 * LENGTH))], options(draws=8))
    assert str(caught.value).split("'")[1] not in ("memory", "segment")
    assert taken.states["memory"].high == 7


def test_a_hundred_thousand_tokens_take_no_more_memory_than_forty_thousand(
    counting: dict[str, Path], tmp_path: Path
) -> None:
    peaks = []

    def from_here_on(done: int, total: int) -> None:
        if done == LENGTH:  # the graph has been loaded
            tracemalloc.reset_peak()

    for length in (40_000, 100_000):
        path = tmp_path / f"{length}.npy"
        np.save(path, ids(length))
        book = Source(str(path), lambda path=path: np.load(path, mmap_mode="r"))
        tracemalloc.start()
        try:
            collect(counting["sound"], [book], options("percentile"), progress=from_here_on)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    # As int64 the tokens that are more take 480 KB.
    assert peaks[1] - peaks[0] < 50_000
    assert peaks[0] < 4_000_000


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_a_range_that_grows_a_million_times_keeps_its_histogram_small(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "MOST_BINS", 512)
    monkeypatch.setitem(gathering.BINS, method, 256)
    random, statistics = np.random.default_rng(0), Statistics(["tensor"], method)
    values = [(10.0**power * random.standard_normal(5000)).astype(np.float32) for power in (-6, -3, 0)]
    for number, value in enumerate(values):
        statistics.add({"tensor": value}, number, number, "a book")
    counts = statistics.arrays()["histogram.0.0"]
    assert counts.sum() == 15_000
    assert len(counts) <= 2 * gathering.MOST_BINS
    largest = np.abs(values[-1]).max()
    assert 0.3 * largest < statistics.thresholds()[0] <= largest


BAD_DOCUMENTS = {
    "none": ([], ContractError, "no documents to calibrate with"),
    "empty": ([[]], TokenError, "book 0"),
    "dropped ids only": ([[0, 2, 3] * 40], TokenError, "book 0 holds no tokens that the model reads|no tokens"),
    "short": ([list(range(4, 44))], TokenError, "book 0 is too short: 40 tokens make 2 segments of 20"),
    "large id": ([[5] * 200, [5] * 70 + [96] + [5] * 70], TokenError, "book 1: token 70 is 96; the vocabulary has ids 0 to 95"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_documents_that_give_no_ranges_are_refused(name: str) -> None:
    documents, error, message = BAD_DOCUMENTS[name]
    books = [Source(f"book {k}", lambda ids=ids: np.array(ids, np.int64)) for k, ids in enumerate(documents)]
    with pytest.raises(error, match=message):
        collect(made("bert").bundle, books, options())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "kl"}, "method is 'kl'; expected one of minmax, entropy, percentile"),
        ({"draws": 0}, "draws is 0; expected a whole number from 1"),
        ({"seed": -1}, "seed is -1; expected"),
    ],
)
def test_options_that_say_nothing_sensible_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        CollectOptions(**given)


def test_ranges_can_be_read_back_and_compared(gpt2: Ranges, tmp_path: Path) -> None:
    gpt2.save(tmp_path / "ranges.json")
    again = load_ranges(tmp_path / "ranges.json")
    assert again == gpt2
    assert set(compare(gpt2, again).values()) == {1.0}
    name = next(iter(gpt2.tensors))
    wider = replace(gpt2.tensors[name], threshold=3 * gpt2.tensors[name].threshold)
    ratios = compare(gpt2, replace(gpt2, tensors={**gpt2.tensors, name: wider}))
    assert ratios.pop(name) == pytest.approx(3)
    assert set(ratios.values()) == {1.0}
    with pytest.raises(FormatError, match="ranges of two models are compared"):
        compare(gpt2, replace(gpt2, fingerprint="0" * 64))
    with pytest.raises(FormatError, match=f"only one of the two ranges has the tensor '{name}'"):
        compare(gpt2, replace(gpt2, tensors={k: v for k, v in gpt2.tensors.items() if k != name}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "another file": (lambda value: {"format": "x"}, "holds no ranges"),
    "newer": (lambda value: value | {"format_version": 2}, "has format version 2; this rmt-trt reads version 1"),
    "cut": (lambda value: {k: v for k, v in value.items() if k != "tensors"}, "is damaged or was altered"),
    "no tensors": (lambda value: value | {"tensors": {}}, "lacks a known method, a fingerprint or tensors"),
    "nan": (lambda value: value["tensors"].popitem()[1].update(threshold="nan") or value | {"tensors": {"x": 1}}, "is damaged"),
    "crossed": (
        lambda value: value | {"tensors": {"x": {**next(iter(value["tensors"].values())), "late": [2, 1]}}},
        "tensor 'x' has the bounds 2.0 to 1.0",
    ),
    "endless": (
        lambda value: value | {"tensors": {"x": {**next(iter(value["tensors"].values())), "threshold": 1e999}}},
        "tensor 'x' has the threshold inf",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_ranges_are_refused(name: str, gpt2: Ranges, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    gpt2.save(path)
    alter, message = DAMAGE[name]
    path.write_text(json.dumps(alter(json.loads(path.read_text()))))
    with pytest.raises(FormatError, match=message):
        load_ranges(path)


def test_products_on_the_way_of_the_memory_stay_in_float32() -> None:
    """Reading: memory @ W. Writing: x @ W -> new_memory. Neither: x @ W, x @ W + b; no weight: x @ x."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).tobytes(), raw=True)
    nodes = [
        helper.make_node("Transpose", ["memory"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["turned", "w"], ["x"], "reads"),
        helper.make_node("MatMul", ["x", "w"], ["y"], "plain"),
        helper.make_node("Gemm", ["y", "w", "b"], ["z"], "biased", transB=1),
        helper.make_node("Gemm", ["z", "w", "b"], ["u"], "scaled", alpha=0.5),
        helper.make_node("MatMul", ["u", "u"], ["v"], "both"),
        helper.make_node("MatMul", ["v", "w"], ["written"], "writes"),
        helper.make_node("Reshape", ["written", "shape"], ["moved"], "reshape"),
        helper.make_node("Where", ["c", "moved", "memory"], ["new_memory"], "freeze"),
    ]
    graph = helper.make_graph(nodes, "step", [], [], [weight])
    found = products(helper.make_model(graph), StepSpec("custom", (StateSpec(shape=(4,)),), 4, 4, "classifier", 2))
    assert [product.node for product in found] == ["plain", "biased"]


def test_the_graph_has_symmetric_weights_by_channel_and_no_quantized_bias(gpt2: Ranges, tmp_path: Path) -> None:
    this = made("gpt2")
    entry = static_graph(this.bundle, gpt2, tmp_path / "int8.onnx", UINT8_INT8)
    assert (entry.file, entry.engine, entry.dtype, entry.role, entry.data) == ("int8.onnx", "cpu", "int8", "step", ())
    model = onnx.load(tmp_path / "int8.onnx")
    onnx.checker.check_model(model)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in values]
    assert len(weights) == len(products(onnx.load(this.bundle / "step.onnx"), this.spec)) > 4
    for node in weights:
        weight, scale, zero = (values[name] for name in node.input)
        assert weight.dtype == np.int8
        assert scale.shape == weight.shape[1:]
        assert not zero.any()
        assert (np.abs(weight.astype(int)).max(axis=0) == 127).all()
    inputs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for node in inputs:
        assert values[node.input[2]] == 128
        assert values[node.input[1]] == pytest.approx(gpt2.tensors[node.input[0]].threshold / 127.5, rel=1e-5)
    read = {name for node in model.graph.node if node.op_type.endswith("eLinear") for name in node.input}
    assert not read & {"memory", "new_memory"}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_step_in_int8_is_near_the_fp32_step_and_not_the_same(name: str, tmp_path: Path) -> None:
    this, document = made(name), made(name).document(S, 5)
    ranges = collect(this.bundle, sources(name, 6 * S, 6 * S), options())
    static_graph(this.bundle, ranges, tmp_path / "int8.onnx", UINT8_INT8)
    with this.open() as exact, RMTRuntime(tmp_path / "int8.onnx", engine="cpu", threads=1) as rough:
        wanted, found = exact.run(document), rough.run(document)
    for pair in ((found.memory, wanted.memory), (found.logits, wanted.logits)):
        assert 1e-4 < relative_error(*pair) < 0.1


def test_the_example_in_int8_gives_the_answers_of_fp32(example: Ranges, bundle: Path) -> None:
    added = add_static(bundle, example, options=EngineOptions(segments=24))
    assert added.report is not None
    assert added.report.passed
    assert (added.report.needed, added.report.tolerance) == (0.99, None)
    assert 1e-3 < added.report.worst < 0.2
    record = Bundle(bundle).manifest.verification["engines"]["cpu"]["int8"]
    assert record["verification"]["agreement"] == added.report.agreement >= 0.99
    sizes = {name: entry.size for name, entry in Bundle(bundle).manifest.files.items()}
    assert sizes["graphs/cpu-int8-step-all.onnx"] < 0.4 * sizes["step.onnx"]
    with RMTRuntime(bundle, engine="cpu", dtype="int8") as runtime, RMTRuntime(bundle, engine="cpu") as exact:
        assert (runtime.dtype, exact.dtype) == ("int8", "fp32")
        assert relative_error(runtime.run([5] * 300).memory, exact.run([5] * 300).memory) > 1e-4
    again = add_static(bundle, example, options=EngineOptions(segments=2))
    assert [graph for graph in Bundle(bundle).manifest.graphs if graph.dtype == "int8"] == list(again.entries)


def test_a_graph_whose_answers_differ_is_not_added(example: Ranges, bundle: Path) -> None:
    narrow = {name: replace(tensor, threshold=tensor.threshold / 50) for name, tensor in example.tensors.items()}
    bad, before = replace(example, tensors=narrow), (bundle / "manifest.json").read_bytes()
    message = r"engine 'cpu' \(int8\) gives \d+\.\d+% of the PyTorch recurrence's answers, fewer than 99%"
    with pytest.raises(VerificationError, match=message):
        add_static(bundle, bad)
    assert (bundle / "manifest.json").read_bytes() == before
    with pytest.raises(VerificationError, match=r"more than 1.0e-03"):
        add_static(bundle, example, options=EngineOptions(tolerance=1e-3))
    kept = add_static(bundle, bad, options=EngineOptions(accept_drift=True))
    assert kept.to_json()["verification"]["accepted_drift"]


def test_ranges_of_another_model_or_export_are_refused(gpt2: Ranges, example: Ranges, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the ranges were taken from a model with fingerprint"):
        static_graph(example_bundle(), gpt2, tmp_path / "x.onnx", UINT8_INT8)
    first, *others = example.tensors
    with pytest.raises(
        FormatError, match=f"no range of the tensor '{first}': the ranges were taken from another export"
    ):
        static_graph(
            example_bundle(),
            replace(example, tensors={name: example.tensors[name] for name in others}),
            tmp_path / "x.onnx",
            UINT8_INT8,
        )


def test_a_bundle_without_an_int8_graph_says_how_to_add_one() -> None:
    from rmt_trt.errors import EngineError

    with pytest.raises(EngineError, match=r"the bundle holds no int8 graph for it\. Add one with rmt-calibrate"):
        RMTRuntime(example_bundle(), engine="cpu", dtype="int8")
    with pytest.raises(EngineError, match=r"it runs fp32, int8, .*int4-weights graphs, not fp16"):
        RMTRuntime(example_bundle(), engine="cpu", dtype="fp16")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """rmt-calibrate in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["rmt-calibrate", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_the_command_writes_ranges_and_a_plot_and_adds_the_graph(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--task", "memorize,detect", "--documents", "2", "--segments", "6", "--draws", "1", "--check", "4"]
    assert run(monkeypatch, str(bundle), *given, "--threads", "1", "-o", "made") == 0
    err = capsys.readouterr().err
    assert "made/ranges.json, made/ranges.png: 18 tensors over " in err
    assert "agreement of the answers 100.0%, needed 99.0%" in err
    assert (tmp_path / "made/ranges.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["ranges.json", "ranges.png"]
    ranges = load_ranges(tmp_path / "made/ranges.json")
    assert [document["segments"] for document in ranges.documents] == [6, 6]
    assert ranges.data["task"]["task"] == "memorize,detect"
    first = Bundle(bundle).manifest.files["graphs/cpu-int8-step-all.onnx"].sha256
    assert run(monkeypatch, str(bundle), "--ranges", "made/ranges.json", "--check", "2") == 0
    assert Bundle(bundle).manifest.files["graphs/cpu-int8-step-all.onnx"].sha256 == first


def test_the_command_reads_ids_and_text_and_goes_on_after_an_interrupt(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0.0)
    np.save("ids.npy", np.arange(2 * 700).reshape(2, 700) % 333)
    Path("book.txt").write_text("Mary moved back to the kitchen. The lantern of the spider was light. " * 60)
    given = [str(bundle), "--data", "ids.npy", "--data", "book.txt", "--segments", "5", "--draws", "1", "--check", "2"]
    real, calls = collecting.Statistics.add, []

    def add(self: Statistics, *rest: Any) -> None:
        calls.append(rest)
        if len(calls) == 8:
            raise KeyboardInterrupt
        real(self, *rest)

    monkeypatch.setattr(collecting.Statistics, "add", add)
    assert run(monkeypatch, *given) == 130
    assert "interrupted. Go on with --resume" in capsys.readouterr().err
    before = len(calls)
    assert run(monkeypatch, *given, "--resume") == 0
    ranges = load_ranges("calibration/ranges.json")
    assert [document["name"] for document in ranges.documents] == ["ids.npy, row 0", "ids.npy, row 1", "book.txt"]
    assert {document["segments"] for document in ranges.documents} == {5}
    assert len(calls) - before == ranges.segments - 7


USAGE = {
    "nothing": ([], "nothing to calibrate with was given; expected one of --data FILE, --task NAMES and --ranges FILE"),
    "two": (["--task", "detect", "--ranges", "r.json"], "--task and --ranges were given; expected one of"),
    "dtype": (
        ["--task", "detect", "--dtype", "fp16"],
        "no 'fp16' graph is made for engine 'cpu'; for 'cpu' there are int8, fp8",
    ),
    "text": (["--data", "a.npy", "--text", "b.txt"], "--text b.txt hides the facts of a task"),
    "part": (["--task", "detect", "--part", "0:1"], "--part 0:1 is a part of a text"),
    "documents": (["--task", "detect", "--documents", "0"], "--documents is 0; expected a number from 1 to 10,000"),
    "method": (["--task", "detect", "--method", "kl"], "method is 'kl'"),
    "no file": (["--data", "none.npy"], "none.npy cannot be read"),
    "short": (["--task", "detect", "--segments", "2"], "is too short"),
    "kind": (["--task", "recall"], "task is 'recall'"),
}


@pytest.mark.parametrize("name", USAGE)
def test_the_command_says_in_one_line_what_it_cannot_do(
    name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given, message = USAGE[name]
    before = (bundle / "manifest.json").read_bytes()
    assert run(monkeypatch, str(bundle), *given) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("rmt-calibrate: ")
    assert message in err
    assert "\n" not in err
    assert (bundle / "manifest.json").read_bytes() == before
