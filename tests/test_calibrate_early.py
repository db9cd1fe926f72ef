"""rmt-calibrate says what no run can go by before a document is stepped through, and names the option."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import example_bundle

import rmt_trt.calibration
from rmt_trt.bundle import Bundle
from rmt_trt.calibration.add import STATIC
from rmt_trt.calibration.mix import Mix
from rmt_trt.calibration.search import keepable
from rmt_trt.commands import calibrate as command
from rmt_trt.commands.calibrate_mix import fitted, wanted
from rmt_trt.errors import ContractError
from rmt_trt.training.tasks import open_task

TASK = ["--task", "detect", "--documents", "1", "--segments", "2"]
RECALL = [*TASK, "--min-recall", "0.9"]
REFUSED = {
    "drift segments": ([*TASK, "--max-drift", "0.1", "--drift-segments", "0"], "--drift-segments is 0; expected a whole"),
    "drift documents": ([*TASK, "--drift-documents", "-1"], "--drift-documents is -1; expected a whole number from 1"),
    "questions": ([*RECALL, "--recall-questions", "0"], "--recall-questions is 0; expected a whole number from 1"),
    "questions unasked": ([*TASK, "--recall-questions", "0"], "--recall-questions is 0; expected a whole number from 1"),
    "recall segments": ([*RECALL, "--recall-segments", "2,0"], "--recall-segments is 2,0; expected numbers from 1 to"),
    "check": ([*TASK, "--check", "1"], "--check is 1; expected a number from 2 to 65,536, or 0 to leave"),
    "check below": (["--dtype", "int8-dynamic", "--check", "-3"], "--check is -3; expected a number from 2 to 65,536"),
    "draws": ([*TASK, "--draws", "0"], "draws is 0; expected a whole number from 1"),
    "tolerance": ([*TASK, "--tolerance", "nan"], "tolerance is nan"),
    "method": ([*TASK, "--method", "most"], "method is 'most'; expected one of minmax, entropy, percentile"),
    "another model's mix": ([*TASK, "--mix", "other.json"], "is a mix of a model with fingerprint 'ffffffffffff'"),
    "another dtype's mix": ([*TASK, "--mix", "fp8.json"], "fp8.json is a mix found for 'fp8'"),
    "the bundle as its folder": ([*TASK, "-o", "memorize.rmt"], "memorize.rmt is a bundle, in which nothing but its own"),
    "a mix of nothing": ([*TASK, "--mix", "all.json"], "all.json keeps all 2"),
    "another alpha": ([*TASK, "--mix", "mix.json", "--smooth", "0.25"], "--smooth is 0.25, and mix.json was found with 0.5"),
}  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the example's bundle beside three mixes, in the working folder; no document is stepped through there."""

    def stepped(*_: Any, **__: Any) -> None:
        raise RuntimeError("documents were stepped through")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rmt_trt.calibration, "collect", stepped)
    path = Path(shutil.copytree(example_bundle(), tmp_path / "memorize.rmt"))
    mix = Mix(Bundle(path).spec.fingerprint, "int8", (), (), 2, 0.5)
    mix.save(Path("mix.json"))
    replace(mix, dtype="fp8").save(Path("fp8.json"))
    replace(mix, fingerprint="f" * 64).save(Path("other.json"))
    everything = keepable(Bundle(path), STATIC["cpu", "int8"])
    replace(mix, products=tuple(sorted(everything))).save(Path("all.json"))
    return path


def said(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """The line in which rmt-calibrate refuses."""
    monkeypatch.setattr(sys, "argv", ["rmt-calibrate", str(bundle), *given])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_cannot_be_is_refused_before_documents_are_stepped_through(
    name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, message = REFUSED[name]
    assert message in said(bundle, monkeypatch, capsys, *given)
    assert not Path("calibration").exists()


@pytest.mark.parametrize(
    "place", ["memorize.rmt", "memorize.rmt/graphs", ""], ids=["the bundle", "its graphs", "its folder"]
)
def test_a_bundle_that_cannot_be_added_to_is_said_before_documents_are_stepped_through(
    place: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    access, closed = os.access, bundle.parent / place
    (bundle / "graphs").mkdir(exist_ok=True)
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == closed) and access(path, mode)
    )
    assert f"{closed} cannot be written, where the graph" in said(bundle, monkeypatch, capsys, *TASK)


def test_what_can_be_goes_on_to_the_documents(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--recall-segments", "2,8", "--recall-questions", "3", "--drift-segments", "2", "--check", "2"]
    assert "documents were stepped through" in said(bundle, monkeypatch, capsys, *RECALL, *more)


def test_documents_too_short_for_their_questions_are_refused_when_the_task_is_opened(bundle: Path) -> None:
    opened = Bundle(bundle)
    opened.manifest = replace(opened.manifest, spec=replace(opened.spec, segment_length=8))
    task = open_task("detect")
    for lengths, refused in (("2,4", False), ("4,1", True)):
        want = wanted(None, 0.9, False, None, None, None, (1, 1), (lengths, 3), "detect", True, 1)
        if refused:
            with pytest.raises(ContractError, match=r"a document of 1 segments of 8 tokens .* take 11\. Ask for more"):
                fitted(want, opened, ("cpu", "int8"), task)
        else:
            asked = fitted(want, opened, ("cpu", "int8"), task).options.questions
            assert asked is not None
            assert (asked.task, asked.segments, asked.count) == (task, (2, 4), 3)
