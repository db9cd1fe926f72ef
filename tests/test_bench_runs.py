"""rmt-bench: what runs report and how they fail. No figure that it measures is judged here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from benchmarked import lean_graph, prepared
from models import made

from rmt_trt.benchmarks import compare, peers, plan
from rmt_trt.benchmarks.bench import Extra, run_benchmark
from rmt_trt.benchmarks.lean import LeanStep
from rmt_trt.benchmarks.many import ManyOptions, lengths
from rmt_trt.benchmarks.plan import Plan
from rmt_trt.benchmarks.ratios import ratios
from rmt_trt.benchmarks.report import sections
from rmt_trt.benchmarks.rows import Results, Row

NO_PEERS = Plan(
    engine="cpu", dtype="fp32", batches=(1, 2), tokens=(30, 90), peers=(), repeat=1, steps=4, threads=1, quick=True
)
PUBLISHED_EAGER, LEAN_EAGER = "PyTorch, model as published: eager", "lean PyTorch: eager"


def plan_with(*names: str) -> Plan:
    return Plan(**{**vars(NO_PEERS), "peers": names})


def run(name: str, options: Plan, out: Path, **extra: object) -> Results:
    return run_benchmark(prepared(name), options, Extra(**extra), out / "out", out / "work", lambda text: None)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_run_reports_ours_and_each_peer_at_each_size(name, tmp_path):
    (tmp_path / "work").mkdir()
    shutil.copy(lean_graph(name), tmp_path / "work")
    found = run(name, Plan(**{**vars(plan_with("published", "lean", "ort")), "quick": False}), tmp_path)
    steps = {(row.name, row.batch) for row in found.of("step")}
    both = ("rmt-trt", PUBLISHED_EAGER, LEAN_EAGER, "ONNX Runtime: opset 20", "ONNX Runtime: opset 23")
    assert steps == {(peer, b) for peer in both for b in (1, 2)} | {("ONNX Runtime: step.onnx in fp32", 1)}
    assert [row.tokens for row in found.of("length")] == [30, 90]
    assert [row.name for row in found.of("latency")] == ["one segment more", "1,000 tokens more"]
    assert all(not row.failed for row in found.rows), [row.failed for row in found.rows]
    assert all(row.values["error"] < 1e-4 for row in found.of("step"))

    written = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert [row["kind"] for row in written["rows"]] == [row.kind for row in found.rows]
    assert written["model"]["segment_length"] == made(name).spec.segment_length
    assert written["machine"]["versions"]["torch"] == torch.__version__
    text = (tmp_path / "out/results.md").read_text(encoding="utf-8")
    assert f"times as fast as {LEAN_EAGER} | 2 |" in text
    for group in ("PyTorch, model as published", "lean PyTorch", "ONNX Runtime"):
        assert f"times as fast as {group}, best variant | 2 |" in text
    assert "![time_by_length.svg](time_by_length.svg)" in text
    assert (tmp_path / "out/throughput_by_batch.svg").stat().st_size > 1000


def test_a_peer_that_fails_becomes_a_row_with_its_reason_and_the_run_goes_on(tmp_path, monkeypatch):
    def broken(*_: object) -> object:
        raise OSError("no compiler here\nlong advice")

    monkeypatch.setitem(peers.TORCH_PEERS, "graph", {"broken": broken})
    monkeypatch.setattr(plan, "CPU_PEERS", ("lean-graph", "lean-eager"))
    found = run("bert", plan_with("lean-graph", "lean-eager"), tmp_path)
    failed = [(row.name, row.batch, row.failed) for row in found.of("step") if row.failed]
    assert failed == [("lean PyTorch: broken", batch, "OSError: no compiler here") for batch in (1, 2)]
    assert found.of("step", LEAN_EAGER)[0].timing is not None
    assert "no compiler here" in (tmp_path / "out/results.md").read_text(encoding="utf-8")


def test_a_peer_whose_memory_is_wrong_is_no_peer(tmp_path, monkeypatch):
    def forgetful(step: LeanStep, memory: torch.Tensor, segments: torch.Tensor, mode: str) -> peers.Loop:
        return lambda count: step(memory, segments[count - 1])

    monkeypatch.setitem(peers.TORCH_PEERS, "eager", {"forgetful": forgetful})
    found = run("bert", plan_with("lean-eager"), tmp_path)
    wrong = found.of("step", "lean PyTorch: forgetful")
    assert [row.timing for row in wrong] == [None, None]
    assert all("is off by" in row.failed for row in wrong)


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setitem(peers.TORCH_PEERS, "eager", {"eager": interrupted})
    with pytest.raises(KeyboardInterrupt):
        run("bert", plan_with("lean-eager"), tmp_path)
    written = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert {"load", "step", "length", "latency"} <= {row["kind"] for row in written["rows"]}
    assert (tmp_path / "out/results.md").is_file()


def test_results_are_on_disk_after_each_measurement(tmp_path):
    results = Results(tmp_path, {"command": "x"})
    for count in (1, 2):
        results.add(Row("limit", "copy", values={"bytes_per_second": float("nan")}))
        written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        assert (len(written["rows"]), written["rows"][0]["values"]) == (count, {"bytes_per_second": None})


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_many_drift_and_growth_are_reported(name, tmp_path):
    extra = {
        "compare": False, "many": ManyOptions(6, 1, 4, 2), "drift": 8, "drift_dtypes": ("fp32", "bf16"), "growth": 900,
    }  # fmt: skip
    found = run(name, NO_PEERS, tmp_path, **extra)
    assert [row.name for row in found.of("many")] == ["full batches", "list", "iterator"]
    segments = int(lengths(extra["many"]).sum())
    for row in found.of("many")[1:]:
        assert (row.values["documents"], row.values["segments"]) == (6, segments)
        assert 0 <= row.values["idle_share"] < 1
    exact, refused = found.of("drift")
    assert [(e["segments"], e["memory"]) for e in exact.values["table"]] == [(1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0)]
    assert refused.failed.startswith("EngineError")
    (growth,) = found.of("growth")
    assert [entry["tokens"] for entry in growth.values["table"]] == [40, 45, 900]
    titles = [section.title for section in sections(found.head, found.rows)]
    assert titles == [
        "Latency",
        "Many documents",
        "Drift of the memory from fp32",
        "Growth",
        "What failed or was left out",
    ]


def test_ours_is_held_to_the_same_tolerance(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.Segments, "error", lambda self, memory, batch: 0.5)
    found = run("bert", NO_PEERS, tmp_path)
    assert all("is off by 5.0e-01" in row.failed for row in found.of("step", "rmt-trt"))
    assert ratios(found.rows) == []
