"""Verification of real engines: along the recurrence, on one's own documents, several dtypes at once, and the command."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import onnx
import pytest
from models import VOCAB, S, example_bundle, made
from shared import once

from rmt_trt import RMTRuntime, StateSpec, StepSpec
from rmt_trt.bundle import Bundle, GraphEntry, add_file
from rmt_trt.commands import verify as command
from rmt_trt.contract import QUANTIZED
from rmt_trt.errors import ContractError, TokenError
from rmt_trt.export.drift_plot import draw
from rmt_trt.export.verify import (
    AGREEMENT,
    TOLERANCES,
    Reference,
    limits,
    model_reference,
    own_documents,
    random_documents,
    verify,
    verify_all,
)

GRAPH = "graphs/cpu-int8-step-all.onnx"


def add_rounded(path: Path) -> None:
    """Puts a graph with weights of 5 bits into a bundle, as what the CPU engine takes for int8."""
    model = onnx.load(path / "step.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            values = onnx.numpy_helper.to_array(tensor)
            unit = np.abs(values).max() / 15
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.round(values / unit) * unit, tensor.name))
    rounded = path.parent / "rounded.onnx"
    onnx.save(model, rounded)
    add_file(path, GRAPH, rounded, GraphEntry(GRAPH, "step", "cpu", "int8", "all", 20))
    rounded.unlink()


@pytest.fixture(scope="module")
def two() -> Path:
    """GPT-2 in fp32 and in what is called int8; nobody may change it."""

    def make(path: Path) -> None:
        shutil.copytree(made("gpt2").bundle, path)
        add_rounded(path)

    return once("gpt2-rounded.rmt", make)


@dataclass
class Spoilt:
    """The recurrence, with its memory off by `rate` of itself for each segment, and other answers from `turned` on."""

    reference: Reference
    rate: float = 0.0
    turned: int = 1 << 30
    documents: int = 0

    def __call__(self, tokens: np.ndarray) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        self.documents += 1
        for number, (states, logits) in enumerate(self.reference(tokens), 1):
            off = 1 + (self.rate * number if len(tokens) > 5 * S else 0)
            turned = number >= self.turned and len(tokens) > 5 * S
            yield tuple(off * state for state in states), -logits if turned else logits


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_right_graph_saturates_far_below_its_tolerance(name: str) -> None:
    this = made(name)
    with this.open() as runtime:
        report = verify(runtime, model_reference(this.model), segments=64)
    assert report.passed
    assert report.agreement == 1
    assert [row.agreed for row in report.rows] == [1.0] * 64
    assert all(1 - 1e-9 < row.cosine <= 1 for row in report.rows)
    assert report.document == "random ids, seed 0"
    for of in ("memory", "logits"):
        trend = report.trend(of)
        assert trend.kind == "saturates"
        assert trend.first == 8
        assert 1e-8 < (trend.level or 0) < 1e-5


def test_an_engine_that_drifts_away_is_seen_to_grow_before_it_breaches() -> None:
    this = made("bert")
    with this.open() as runtime:
        report = verify(runtime, Spoilt(model_reference(this.model), rate=1e-6), segments=64)
    assert report.passed
    trend = report.trend("memory")
    assert trend.kind == "grows"
    assert trend.rate == pytest.approx(1, abs=0.1)
    assert trend.crossing == pytest.approx(100, rel=0.1)  # 1e-6 for each segment reaches 1e-4 there
    assert report.trend("logits").kind == "saturates"


def test_other_answers_are_counted_from_the_segment_on_where_they_begin() -> None:
    this = made("gpt2")
    with this.open() as runtime:
        report = verify(runtime, Spoilt(model_reference(this.model), turned=7), segments=8, tolerance=10.0)
    assert [row.agreement for row in report.rows] == [1.0] * 6 + [0.0] * 2
    tokens = [row.tokens for row in report.rows]
    assert report.rows[-1].agreed == pytest.approx(tokens[5] / tokens[7])
    assert report.agreement > report.rows[-1].agreed  # the batch agrees


def test_one_pass_of_the_reference_serves_several_engines_and_each_gets_its_own_report(two: Path) -> None:
    this = made("gpt2")
    reference = Spoilt(model_reference(this.model))
    documents = random_documents(this.spec, 6, 3)
    calls: list[tuple[int, int]] = []
    with RMTRuntime(two, engine="cpu", threads=1) as exact, RMTRuntime(two, "cpu", "int8", threads=1) as rounded:
        together = verify_all([exact, rounded], reference, documents, progress=lambda *call: calls.append(call))
        assert reference.documents == 1 + 2 * len(documents.batch)
        alone = [verify(one, model_reference(this.model), 6, seed=3) for one in (exact, rounded)]
    assert [report.to_json() for report in together] == [report.to_json() for report in alone]
    assert [(one.dtype, one.tolerance, one.needed) for one in together] == [("fp32", 1e-4, None), ("int8", None, 0.99)]
    assert together[0].worst < 1e-5 < 1e-4 < together[1].worst
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len({total for _, total in calls}) == 1


def test_engines_of_different_models_are_not_compared_with_one_reference() -> None:
    with made("bert").open() as one, made("gpt2").open() as other:
        documents = random_documents(one.spec, 2, 0)
        for runtimes in ([one, other], []):
            with pytest.raises(ContractError, match="no runtimes, or runtimes of different models"):
                verify_all(runtimes, model_reference(made("bert").model), documents)


def test_every_dtype_is_held_to_an_error_or_to_its_answers() -> None:
    assert set(AGREEMENT) >= set(QUANTIZED)
    for dtype in (*QUANTIZED, "a dtype to come"):
        assert limits(dtype) == (None, 0.99)
        assert limits(dtype, 0.5) == (0.5, None)
    for dtype, tolerance in TOLERANCES.items():
        assert limits(dtype) == (tolerance, None)


def counting(alignment: str = "left", dropped: tuple[int, ...] = ()) -> StepSpec:
    return StepSpec("custom", (StateSpec(shape=(1, 4)),), 10, 50, "classifier", 2, alignment, dropped)  # type: ignore[arg-type]


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
def test_a_document_of_ones_own_is_cut_to_so_many_segments_and_the_batch_is_part_of_it(alignment: str) -> None:
    spec, ids = counting(alignment, (7,)), np.arange(1000) % 50
    kept = ids[ids != 7]
    found = own_documents(spec, ids, 9, "book")
    assert len(found.document) == 83
    assert np.array_equal(found.document, kept[:83])
    assert (found.segments, found.name) == (9, "book, 83 tokens")
    assert [len(one) for one in found.batch] == [1, 9, 11, 20]
    starts = [0, 10, 20, 30]
    assert all(
        np.array_equal(one, kept[start : start + len(one)]) for one, start in zip(found.batch, starts, strict=True)
    )
    whole = own_documents(spec, iter(ids.tolist()), None, "book")
    assert np.array_equal(whole.document, kept)
    assert whole.segments == 98
    short = own_documents(spec, ids[:12], None, "book")
    assert [len(one) for one in short.batch] == [1, 9, 11, 11]


@pytest.mark.parametrize(
    ("tokens", "segments", "message"),
    [
        (range(8), None, r"book has 7 tokens that the model reads, 1 segment of 10; expected at least 2 segments"),
        ([], None, r"book has 0 tokens that the model reads, 0 segments of 10"),
        ([7] * 100, None, r"book has 0 tokens that the model reads"),
        (range(40), 64, r"book has 39 tokens that the model reads, 4 segments, fewer than --segments 64; leave"),
        ([1] * 30 + [50], None, r"book: token 30 is 50; .*vocabulary"),
        (np.ones(655_361, np.int8), None, r"book has more than 65,536 segments; say how many .*--segments"),
    ],
)
def test_documents_that_cannot_be_gone_through(tokens: Any, segments: int | None, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        own_documents(counting(dropped=(7,)), tokens, segments, "book")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rmt-verify", *map(str, arguments)])
    try:
        command.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command_compares_dtypes_on_ones_own_ids_and_writes_report_and_plot(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = made("gpt2").document(40 * S, 5)
    np.save(tmp_path / "ids.npy", ids)
    out, plot = tmp_path / "r.json", tmp_path / "p.png"
    out.write_text("an older report")
    files = ("--data", tmp_path / "ids.npy", "-o", out, "--plot", plot)
    assert run(monkeypatch, two, "--dtype", "fp32,int8", "--segments", 5, *files) == 1
    said = capsys.readouterr().err
    assert said.index("engine cpu (fp32)") < said.index("engine cpu (int8)") < said.index("rmt-verify: ")
    last = said[said.index("rmt-verify: ") :]
    assert last.startswith("rmt-verify: engine 'cpu' (int8) gives ")
    assert "fp32" not in last
    exact, rounded = json.loads(out.read_text())["reports"]
    assert (exact["dtype"], exact["passed"], rounded["dtype"], rounded["passed"]) == ("fp32", True, "int8", False)
    assert exact["document"] == rounded["document"] == f"{tmp_path / 'ids.npy'}, {4 * S + S // 3} tokens"
    assert [row["tokens"] for row in exact["rows"]] == [S, 2 * S, 3 * S, 4 * S, 4 * S + S // 3]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert run(monkeypatch, two, "--dtype", "fp32", "--data", tmp_path / "ids.npy", "-o", out) == 0
    assert json.loads(out.read_text())["segments"] == 40  # all of it
    assert run(monkeypatch, two, "--dtype", "fp32,int8", "--segments", 2, "--tolerance", "1e-9") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rmt-verify: engine 'cpu' (fp32) drifts")
    assert "; engine 'cpu' (int8) drifts" in last


def test_the_command_reads_text_with_the_models_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("mary moved to the garden . the quiet miller found a rope . " * 15)
    assert run(monkeypatch, example_bundle(), "--data", tmp_path / "book.txt", "-o", tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["passed"], report["segments"]) == (True, 2)
    assert report["document"].endswith("book.txt, 195 tokens")


def test_the_verdict_of_one_dtype_is_recorded(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(two, tmp_path / "own.rmt")
    assert run(monkeypatch, bundle, "--dtype", "int8", "--segments", 2, "--tolerance", 10, "--record") == 0
    verdict = Bundle(bundle).manifest.verification["engines"]["cpu"]["int8"]["verification"]
    assert (verdict["passed"], verdict["tolerance"], verdict["segments"]) == (True, 10.0, 2)
    assert 1e-3 < verdict["worst"] < 10


WRONG: dict[str, tuple[str, str]] = {
    "plot in no folder": ("none.rmt --plot no/p.png", "cannot write no/p.png: no is no folder that can be written"),
    "plot of another kind": ("none.rmt --plot p.svg", "--plot is p.svg; expected the name of a picture that ends in .png"),
    "plot into a folder": ("none.rmt --plot folder.png", "folder.png is no regular file; it is not replaced"),
    "one file for both": ("none.rmt -o p.png --plot ./p.png", "--out and --plot are both p.png; expected two files"),
    "a dtype twice": ("none.rmt --dtype fp32,int8,fp32", "--dtype fp32,int8,fp32 names fp32 twice; expected each dtype once"),
    "an unknown dtype": ("none.rmt --dtype fp32,fp12", "--dtype is 'fp32,fp12'; expected one of fp32, fp16, "),
    "no dtype": ("none.rmt --dtype fp32,", "--dtype is 'fp32,'; expected one of"),
    "several to record": ("none.rmt --dtype fp32,int8 --record", "--record writes the verdict of one dtype, and --dtype names 2"),
    "a dtype that is not there": ("two.rmt --dtype fp32,int8-dynamic", "the bundle holds no int8-dynamic graph"),
    "no data": ("two.rmt --data none.npy", "none.npy cannot be read: No such file or directory"),
    "data of rows": ("two.rmt --data rows.npy", "rows.npy holds an array of shape (2, 50); expected the ids of one document"),
    "data out of range": ("two.rmt --data high.npy", f"high.npy: token 49 is {VOCAB}; "),
    "data too short": ("two.rmt --data short.npy", f"short.npy has {S} tokens that the model reads, 1 segment of {S}; expected"),
    "data shorter than asked": ("two.rmt --data long.npy --segments 9", "long.npy has 50 tokens that the model reads, 3 segments, fewer"),
    "text without a tokenizer": ("two.rmt --data book.txt", "holds no tokenizer"),
    "data that is no text": ("two.rmt --data folder.png/raw.txt", "raw.txt is not UTF-8 text"),
    "one segment": ("two.rmt --data long.npy --segments 1", "segments is 1; expected at least 2"),
    "a tolerance of nothing": ("two.rmt --tolerance nan", "tolerance is nan; expected a number above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_command_says_in_one_line_what_it_cannot_do(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("folder.png/raw.txt").write_bytes(b"\xff\xfe\x00")
    Path("two.rmt").symlink_to(two)
    Path("book.txt").write_text("a text")
    long = np.ones(50, np.int64)
    for file, ids in {
        "long": long,
        "short": long[:S],
        "rows": np.stack([long] * 2),
        "high": np.arange(50) + VOCAB - 49,
    }.items():
        np.save(f"{file}.npy", ids)
    before = sorted(tmp_path.rglob("*"))
    arguments, message = WRONG[name]
    assert run(monkeypatch, *arguments.split()) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_a_plot_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(monkeypatch, "none.rmt", "--plot", tmp_path / "p.png") == 1
    assert "--plot needs the Python package 'matplotlib'" in capsys.readouterr().err


def test_the_plot_shows_every_dtype_on_logarithmic_axes_with_its_trend(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    with made("gpt2").open() as runtime:
        exact = verify(runtime, model_reference(made("gpt2").model), 4)
    other = replace(exact, dtype="int8", tolerance=None, needed=0.99, document="$a$", rows=(
        replace(exact.rows[0], memory=0.0, logits=float("nan")), *exact.rows[1:]))  # fmt: skip
    draw(tmp_path / "p.png", [exact, other])
    errors, answers = kept[0].axes
    assert (errors.get_xscale(), errors.get_yscale(), answers.get_xscale()) == ("log", "log", "log")
    told = [text.get_text() for text in errors.get_legend().get_texts()]
    assert len(told) == 5
    assert "fp32: tolerance" in told
    assert f"cpu int8, memory {other.trend('memory').words}" in told
    medians = {line.get_label(): line.get_ydata() for line in errors.get_lines()}
    assert list(medians[f"cpu fp32, memory {exact.trend('memory').words}"]) == [one.memory for one in exact.octaves]
    assert 1e-4 in [line.get_ydata()[0] for line in errors.get_lines()]
    assert [text.get_text() for text in answers.get_legend().get_texts()] == [
        "cpu fp32, so far", "cpu int8, so far", "int8: needed",
    ]  # fmt: skip
    monkeypatch.undo()
    plt.close(kept[0])
