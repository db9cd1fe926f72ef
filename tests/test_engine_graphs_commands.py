"""Graphs made for an engine, by the commands: what they say, refuse and show."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from added_graphs import FEW, uses
from models import made
from spoil import alter
from tensorrt_builds import contents, gated

from rmt_trt.bundle import Bundle
from rmt_trt.commands import export, info, verify
from rmt_trt.export import add_engine_graphs


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """GPT-2's bundle alone in a folder, to add to."""
    return Path(shutil.copytree(made("gpt2").bundle, tmp_path / "work" / "model.rmt"))


def run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_commands_from_a_checkpoint_to_its_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(made("gpt2").checkpoint, tmp_path / "model.pt")
    bundle = tmp_path / "model.rmt"
    few = ("--segments", 2)
    assert run(export.main, monkeypatch, tmp_path / "model.pt", "--engine", "cuda", "--dtype", "fp16,fp32", *few) == 0
    said = capsys.readouterr().err
    assert "cuda fp16: fused: 2 attention, 2 bias+gelu, 4 skip-norm" in said
    assert "checked on the CPU provider in fp32: largest error" in said
    assert "model.rmt: 12 graphs, " in said
    (tmp_path / "model.pt").unlink()  # from here on the bundle speaks for itself
    assert run(export.main, monkeypatch, bundle, "--engine", "cuda", "--dtype", "bf16", "--plain", *few) == 0
    assert "cuda bf16: exported plainly: asked for" in capsys.readouterr().err
    assert run(info.main, monkeypatch, bundle) == 0
    shown = capsys.readouterr().out
    assert "graphs/cuda-fp16.data" in shown
    assert "cuda fp32: fused: 2 attention" in shown
    assert run(verify.main, monkeypatch, bundle, "--engine", "cpu", *few) == 0
    assert "against the PyTorch recurrence" in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["work", "work/model.rmt", "new"])
def test_a_folder_that_cannot_be_written_is_said_before_the_work(
    closed: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").mkdir()
    access, place = os.access, tmp_path / closed
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == place) and access(path, mode)
    )
    source = made("gpt2").checkpoint if closed == "new" else bundle
    target = ("-o", tmp_path / "new" / "model.rmt") if closed == "new" else ()
    assert run(export.main, monkeypatch, source, *target, "--engine", "cuda", "--dtype", "fp16") == 1
    said = capsys.readouterr().err
    assert f"{place} cannot be written, where the" in said
    assert said.count("\n") == 1  # no graph was written yet


def test_a_bundle_that_does_not_give_its_model_takes_the_checkpoint(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rmt_trt.export.recover.WEIGHTS_KEY", "rmt_trt.none")  # as an older version left it out
    command = (bundle, "--engine", "cuda", "--segments", 2)
    assert run(export.main, monkeypatch, *command) == 1
    assert (
        "an older rmt-trt wrote it. Give the checkpoint that it was exported from (--model model.pt)"
        in capsys.readouterr().err
    )
    assert run(export.main, monkeypatch, *command, "--model", made("bert").checkpoint) == 1
    assert "holds other weights than" in capsys.readouterr().err
    assert run(export.main, monkeypatch, *command, "--model", made("gpt2").checkpoint) == 0
    assert len(uses(bundle)) == 9


WRONG: dict[str, tuple[str, str]] = {
    "bundle and nothing to add": ("model.rmt", "model.rmt is a bundle already. Add graphs to it with: rmt-export model.rmt --engine cuda"),
    "bundle with flags of a checkpoint": (
        "model.rmt --engine cuda --alignment left --segment-size 9 --overwrite",
        "--segment-size, --alignment, --overwrite go with a checkpoint, and model.rmt is a bundle already",
    ),
    "bundle with another name": ("model.rmt --engine cuda -o x.rmt", "--out goes with a checkpoint, and model.rmt is a bundle"),
    "unknown engine": ("model.pt --engine trt", "--engine is 'trt'; rmt-export makes graphs for cpu, cuda"),
    "unknown dtype": ("model.pt --engine cuda --dtype fp16,int8", "--dtype is 'fp16,int8'; expected one of fp32, fp16, bf16, or several"),
    "dtype of the CPU": ("model.pt --dtype fp16", "--dtype fp16 goes with --engine cuda; the CPU engine runs step.onnx in fp32"),
    "plain on the CPU": ("model.pt --plain", "--plain goes with --engine cuda; nothing is fused in step.onnx"),
    "a verdict of the CPU": ("verify model.rmt --record", "--record is for an engine's graphs, and this is step.onnx on the CPU"),
    "model twice": ("model.pt --model model.pt", "--model goes with a bundle that exists; here model.pt is the checkpoint"),
    "a step of one's own": ("gated.rmt --engine cuda", "Pass it: rmt_trt.export.add_engine_graphs(path, dtype='fp16', model=step)"),
    "verify a step of one's own": ("verify gated.rmt --engine cpu", "its fp32 graph is what others are compared with"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags_are_one_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(bundle.parent)
    shutil.copytree(gated(), "gated.rmt")
    shutil.copy(made("gpt2").checkpoint, "model.pt")
    before = contents(Path())
    arguments, message = WRONG[name]
    main = verify.main if arguments.startswith("verify") else export.main
    assert run(main, monkeypatch, *arguments.removeprefix("verify ").split()) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert contents(Path()) == before


@pytest.mark.parametrize(
    "record",
    [
        [], "x", {"cuda": []}, {"cuda": {"fp16": 5}}, {"cuda": {"fp16": {"fused": [1], "check": 3, "verification": "yes"}}},
        {"cuda": {"fp16": {"fused": {"\x1b[2J": {"a": 1}}, "check": {"worst": "much"}, "verification": {"passed": 1}}}},
    ],
)  # fmt: skip
def test_a_strangers_record_neither_breaks_nor_steers_the_terminal(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], record: Any
) -> None:
    add_engine_graphs(bundle, "cuda", "fp16", options=replace(FEW, check_segments=0, segments=0))
    alter(bundle, lambda m: m["verification"].update(engines=record))
    assert run(info.main, monkeypatch, bundle) == 0
    assert "\x1b" not in capsys.readouterr().out
    add_engine_graphs(bundle, "cuda", "fp16", options=replace(FEW, check_segments=0, segments=0))
    assert Bundle(bundle).manifest.verification["engines"]["cuda"]["fp16"]["unverified"] == "left out"
