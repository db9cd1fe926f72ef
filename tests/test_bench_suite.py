"""rmt-bench: several runs as one, recall among them, and what is written of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarked import took
from models import example_bundle, made
from typer.testing import CliRunner

from rmt_trt.benchmarks import recall, suite
from rmt_trt.benchmarks.command_line import shown
from rmt_trt.benchmarks.presets import EXAMPLE
from rmt_trt.benchmarks.rows import LEFT_OUT, Results, Row, read_results
from rmt_trt.benchmarks.suite import Part, SuiteOptions, command_of, run_suite
from rmt_trt.commands.bench import app
from rmt_trt.errors import ContractError, FormatError

# What is written.


def test_rows_come_back_from_their_file(tmp_path):
    results = Results(tmp_path, {"command": "rmt-bench x"})
    rows = [
        Row("step", "rmt-trt", 4, 1000, 10, took(2.0), {"error": 1e-3}),
        Row("full", "full attention", 1, 4096, failed="out of device memory"),
        Row("drift", "fp16", values={"table": [{"segments": 1, "memory": 1e-3}]}),
    ]
    results.add(*rows)
    assert read_results(tmp_path) == ({"command": "rmt-bench x"}, rows)
    assert read_results(tmp_path / "none") == ({}, [])
    (tmp_path / "results.json").write_text('{"rows": [{"king": 1}]}')
    with pytest.raises(FormatError, match=r"results\.json is no results file of rmt-bench"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["--preset", "example", "-o", "/tmp/x", "--work=/root/w"], "--preset example -o bench --work=bench-work"),
        (["m.rmt", "--out", "here", "--tokens", "1,2"], "m.rmt --out here --tokens 1,2"),
        (["/data/m.rmt", "--suite", "/s"], "m.rmt --suite suite"),
        ([str(Path.cwd() / "models/m.pt")], "models/m.pt"),
    ],
)
def test_a_command_is_written_without_the_machines_paths(arguments, written):
    assert shown(arguments) == f"rmt-bench {written}"


# Recall.


def test_fresh_questions_have_the_segments_that_were_asked_for_and_are_the_same_again():
    bundle_spec = made("bert").spec.with_(segment_length=128, alignment="right")
    for segments in (1, 3):
        questions = recall.fresh(bundle_spec, segments, 40)
        assert questions == recall.fresh(bundle_spec, segments, 40)
        assert {-(-question.length // 128) for question in questions} == {segments}
        assert sum(question.length % 128 == 0 for question in questions) >= 20
        assert len({question.document.seed for question in questions}) == 40


def test_recall_writes_one_table_of_the_same_questions_for_each_dtype(tmp_path):
    arguments = [str(EXAMPLE), "--engine", "cpu", "--dtype", "fp32,fp16", "--segments", "1,3", "--count", "24"]
    where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--slots", "10"]
    done = CliRunner().invoke(recall.app, [*arguments, *where])
    assert done.exception is None, done.output
    _, rows = read_results(tmp_path / "out")
    right = [(row.name, row.segments, row.values["right"], row.values["count"]) for row in rows if not row.failed]
    assert [(name, segments, count) for name, segments, _, count in right] == [("fp32", 1, 24), ("fp32", 3, 24)]
    assert all(number >= 23 for _, _, number, _ in right)
    assert [row.name for row in rows if row.failed] == ["fp16"]  # the CPU engine has no such graph
    text = (tmp_path / "out/results.md").read_text(encoding="utf-8")
    assert "| segments | fp32 | fp32, s |" in text


def test_a_file_with_too_few_questions_is_named(root, tmp_path):
    questions = root / "examples/memorize/questions.jsonl"
    arguments = [str(example_bundle()), str(questions), "--segments", "16", "--count", "129", "--work", str(tmp_path)]
    done = CliRunner().invoke(recall.app, arguments)
    assert isinstance(done.exception, ContractError)
    assert f"{questions} has 128 questions of 16 segments, not 129" in str(done.exception)


# A suite.


def results_of(name: str, step: float) -> dict[str, Any]:
    rows = [
        Row("step", "rmt-trt", 1, 1000, 10, took(10 * step)),
        Row("step", "lean PyTorch: CUDA graph", 1, 1000, 10, took(20 * step)),
        Row("step", "lean PyTorch: eager", 1, 1000, 10, failed=LEFT_OUT),
        Row("drift", "fp16", values={"table": [{"segments": 1, "memory": 1e-3}, {"segments": 8, "memory": 2e-3}]}),
    ]
    return {"model": {"name": name, "dtype": "fp16"}, "rows": [row.to_json() for row in rows]}


def scripted(monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> list[Part]:
    """Parts that run scripts in their place; a script is given its folder."""

    def command(part: Part, folder: Path, *_: object) -> list[str]:
        return [sys.executable, "-c", scripts[part.name], str(folder / part.name)]

    monkeypatch.setattr(suite, "command_of", command)
    return [Part(name, suite.BENCH, (), 1) for name in scripts]


def writing(name: str, then: str = "") -> str:
    text = json.dumps(results_of(name, 1e-3))
    write = "p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'results.json').write_text(" + repr(text) + ")"
    return f"import os, pathlib, sys; {write}; {then}"


def test_a_part_that_crashes_costs_itself_alone_and_keeps_what_it_has(tmp_path, monkeypatch):
    parts = scripted(
        monkeypatch, {"one": writing("one", "os.abort()"), "two": "raise SystemExit(3)", "three": writing("three")}
    )
    section = run_suite(tmp_path, tmp_path, SuiteOptions(), lambda text: None, parts)
    one = ("1", "1.000", "100,000", "", "2.00", "", "", "fp16 2.0e-03", "0", "1")
    assert section.rows == [("one, fp16", *one), ("three, fp16", *one)]
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "- one: ended by signal 6 after" in text
    assert "- two: failed with status 3 after" in text
    assert "- three: done after" in text


def test_an_interrupted_suite_keeps_what_it_has_and_interrupts_its_part(tmp_path, monkeypatch):
    parts = scripted(monkeypatch, {"one": writing("one"), "two": "import time; time.sleep(600)"})
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):
        def __init__(self, command: list[str]) -> None:
            super().__init__(command)
            started.append(self)

        def wait(self, timeout: float | None = None) -> int:
            if len(started) == 2 and timeout is None:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(suite.subprocess, "Popen", Interrupted)
    monkeypatch.setattr(suite, "SECONDS_TO_END", 2)
    with pytest.raises(KeyboardInterrupt):
        run_suite(tmp_path, tmp_path, SuiteOptions(), lambda text: None, parts)
    assert started[1].poll() not in (None, 0)
    assert "| one, fp16 | 1 |" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_the_seconds_of_a_suite_are_dealt_out_by_shares_and_what_is_saved_goes_on(tmp_path, monkeypatch):
    given: list[float] = []

    def command(part: Part, folder: Path, work: Path, options: SuiteOptions, seconds: float) -> list[str]:
        given.append(seconds)
        return [sys.executable, "-c", "pass"]

    monkeypatch.setattr(suite, "command_of", command)
    parts = [Part("a", suite.BENCH, (), 3), Part("b", suite.BENCH, (), 1), Part("c", suite.BENCH, (), 1)]
    run_suite(tmp_path, tmp_path, SuiteOptions(budget=10_000.0), lambda text: None, parts)
    first, second, third = given
    assert 5_500 < first <= 6_000
    assert 4_500 < second <= 5_000
    assert 9_000 < third <= 10_000


def test_every_part_of_the_suite_is_a_command_that_its_module_takes(tmp_path):
    apps: dict[str, Callable[..., Any]] = {suite.BENCH: app, suite.RECALL: recall.app}
    for part in suite.PARTS:
        command = command_of(part, tmp_path, tmp_path / "work", SuiteOptions(100.0, True, 0, "default"), 42.4)
        assert command[1:3] == ["-m", part.module]
        assert command[command.index("--budget") + 1] == "42"
        done = CliRunner().invoke(apps[part.module], [*command[3:], "--help"])
        assert done.exit_code == 0, done.output
    assert [part.name for part in suite.PARTS] == ["bert-base", "gpt2-small", "llama-1b", "example", "recall"]


def test_a_suite_takes_no_model_of_its_own(tmp_path):
    done = CliRunner().invoke(app, ["--suite", str(tmp_path / "all"), "--preset", "example"])
    assert isinstance(done.exception, ContractError)
    assert "give no model and no --preset" in str(done.exception)
