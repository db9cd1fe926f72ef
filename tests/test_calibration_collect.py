"""Calibration along the recurrence: which segments are looked at, what the ranges are, and which data gives none."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import options, sources
from models import S, made
from onnxruntime.quantization import calibrate as library
from torch import nn

from rmt_trt import StateSpec, StepSpec
from rmt_trt.calibration import CollectOptions, Source, collect, recurrent_feeds
from rmt_trt.calibration import statistics as gathering
from rmt_trt.calibration.documents import PARTS, drawn
from rmt_trt.calibration.statistics import Statistics
from rmt_trt.errors import ContractError, FormatError, TokenError
from rmt_trt.export import ExportOptions, export_step_bundle

collecting = sys.modules["rmt_trt.calibration.collect"]
WIDTH, LENGTH, VOCAB = 8, 12, 50
COUNTING = StepSpec("custom", (StateSpec(shape=(1, WIDTH)),), LENGTH, VOCAB, "classifier", 3)


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
