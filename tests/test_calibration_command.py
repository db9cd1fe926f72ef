"""The command rmt-calibrate: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import example_bundle

from rmt_trt.bundle import Bundle
from rmt_trt.calibration import load_ranges
from rmt_trt.calibration.statistics import Statistics
from rmt_trt.commands import calibrate as command

collecting = sys.modules["rmt_trt.calibration.collect"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the example's bundle, to be added to."""
    return Path(shutil.copytree(example_bundle(), tmp_path / "memorize.rmt"))


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
