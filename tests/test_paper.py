"""The whole way of the paper's experiments with a small model: train, export, ask, look inside, count, compare."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rmt_trt.benchmarks import ablations
from rmt_trt.commands import analyze, eval, export, flops, train

SMALL = "--layers 1 --width 32 --heads 2 --segment-length 16 --num-memory 2 --batch 32 --eval-rows 32 --eval-every 20"


def run(command, *arguments):
    result = CliRunner().invoke(command.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A trained small model, as a bundle."""
    folder = tmp_path_factory.mktemp("paper")
    run(train, folder / "run", *SMALL.split(), "--stages", "1,2", "--steps", "120", "--lr", "3e-3", "--device", "cpu")
    run(export, folder / "run" / "model.pt", "-o", folder / "small.rmt", "--segments", "4")
    return folder / "small.rmt"


def test_a_trained_model_is_asked_through_its_bundle(bundle, tmp_path):
    asked = ["--task", "memorize,detect", "--segments", "1,2", "--samples", "20", "--engine", "cpu"]
    run(eval, bundle, *asked, "-o", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["task"], row["segments"], row["count"]) for row in rows] == [
        (task, segments, 20) for segments in (1, 2) for task in ("memorize", "detect")
    ]
    assert rows[0]["right"] >= 15  # it was trained: chance is 3 of 20
    assert (tmp_path / "accuracy_by_segments.png").stat().st_size > 5000


def test_its_memory_is_looked_into(bundle, tmp_path):
    run(analyze, bundle, "--task", "detect", "--segments", "4", "-o", tmp_path)
    assert any(path.suffix == ".png" for path in tmp_path.iterdir())


def test_its_operations_are_counted(tmp_path):
    text = run(flops, "--model", "opt-125m", "--tokens", "2097152")
    assert "294.8" in text


def test_variants_leave_out_one_thing_each():
    names = [one.name for one in ablations.variants([1, 10])]
    assert names == [
        "M = 1", "M = 10", "M = 10, no curriculum, mixed lengths", "M = 10, no curriculum, 7 segments only",
        "M = 0, curriculum",
    ]  # fmt: skip


def test_variants_of_it_are_compared(tmp_path, monkeypatch):
    every = ablations.variants
    monkeypatch.setattr(ablations, "variants", lambda sizes: [every(sizes)[0], every(sizes)[-1]])
    flags = SMALL.replace("--num-memory 2 ", "").replace("--eval-every 20", "--eval-every 2 --threshold 0 --patience 1")
    short = ["--memory", "1", "--segments", "1,2", "--count", "10", "--device", "cpu", "--jobs", "2", "--extra", flags]
    run(ablations, tmp_path, *short, "--steps", "12")
    value = json.loads((tmp_path / "ablations.json").read_text())
    assert [one["variant"] for one in value["runs"]] == ["M = 1", "M = 0, curriculum"]
    assert [(one["passed"], one["stages"], one["steps"]) for one in value["runs"]] == [(6, 6, 12)] * 2
    assert all(set(one["right"]) == {"1", "2"} for one in value["runs"])
    assert (tmp_path / "ablations.png").stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.csv")}
    run(ablations, tmp_path, *short, "--steps", "12")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.csv")} == before
    other = CliRunner().invoke(ablations.app, [str(tmp_path), *short, "--steps", "13"])
    assert "holds a run with other flags than" in str(other.exception)
