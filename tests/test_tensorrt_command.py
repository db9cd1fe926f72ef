"""rmt-build, and rmt-export with engines: from a checkpoint or a bundle to engines in it, in one go."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_records import record_of
from models import S, made, make_model
from steps import left_in
from tensorrt_builds import contents, copy_of

from rmt_trt import RMTRuntime
from rmt_trt.bundle import Bundle
from rmt_trt.commands import build, engine_options, export, info
from rmt_trt.engine_check import read_record
from rmt_trt.export.tensorrt import BuiltEngine, progress
from rmt_trt.model.checkpoint import save_model

RTX = ("--engine", "tensorrt-rtx", "--compute-capability", "8.9,120")
QUICK = ("--optimization-level", 0, "--max-batch", 2)
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command's entry point: its exit status, and what it wrote on standard error."""

    def started(main: Callable[[], None], *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        return int(code), capsys.readouterr().err

    return started


def test_a_checkpoint_becomes_a_bundle_with_engines_that_is_checked_and_described(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gpt2", backbone={"n_layer": 1})
    save_model(tmp_path / "model.pt", model)
    code, said = run(export.main, tmp_path / "model.pt", *RTX, "--head", "none,all", "--segments", 2, *QUICK)
    assert code == 0, said
    path = tmp_path / "model.rmt"
    stems = [f"tensorrt-rtx-fp16-{head}-sm89-sm120-b2" for head in ("all", "none")]
    assert left_in(path / "engines") == [f"{stem}{suffix}" for stem in stems for suffix in (".engine", ".json")]
    for stem in stems:
        record = read_record(Bundle(path).file(f"engines/{stem}.json"), Bundle(path).spec)
        assert f"engines/{record.file}: {record.size / 1e6:.1f} MB" in said
    for line in (
        "model.rmt: verified", "fp16, with logits, compute capability 8.9, 12.0, Linux", "fp16, without logits",
        "batch 1 to 2, text 1 to 20", "attention: made of several kernels, of products and softmax in its graph (opset 20)",
        "checked on the CPU: largest error", "2 engines added in", "compiled, and not run",
    ):  # fmt: skip
        assert line in said

    monkeypatch.setattr(sys, "argv", ["rmt-info", str(path), "--json"])
    with pytest.raises(SystemExit, match="0"):
        info.main()
    assert not json.loads(capsys.readouterr().out)["engines"]["tensorrt-rtx"]["runs"]
    with RMTRuntime(path, threads=1) as runtime:
        assert runtime.engine == "cpu"
        assert runtime.run(np.arange(S)).segments == 1


def test_both_commands_take_the_same_options_of_a_build_and_build_the_same(run: Run, tmp_path: Path) -> None:
    first, second = (copy_of(made("bert").bundle, tmp_path / name) for name in ("a", "b"))
    chosen = (*RTX, "--dtype", "fp32", "--workspace", 512, *QUICK)
    for main, path in ((build.main, first), (export.main, second)):
        code, said = run(main, path, *chosen)
        assert code == 0, said
    name = "engines/tensorrt-rtx-fp32-all-sm89-sm120-b2"
    one, other = (json.loads((path / f"{name}.json").read_text()) for path in (first, second))
    for record in (one, other):
        del record["seconds"], record["sha256"], record["size"]
    assert one == other


def test_an_interrupted_command_exits_with_130(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy_of(made("bert").bundle, tmp_path)
    before, step = contents(path), progress.Phases.step

    def stopped(*args: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(progress.Phases, "step", stopped)
    code, said = run(build.main, path, *RTX, "--dtype", "fp32", *QUICK)
    assert code == 130
    assert "Traceback" not in said
    assert contents(path) == before
    assert left_in(path.parent) == [path.name]


WRONG: dict[str, tuple[str, str]] = {
    "unknown dtype": ("build model.rmt --dtype fp32,fp17", "--dtype is 'fp32,fp17'; expected one of fp32, fp16"),
    "unknown dtype of an export": ("model.pt --engine tensorrt --dtype fp17", "--dtype is 'fp17'; expected one of fp32"),
    "unknown engine": ("build model.rmt --engine cuda", "engine is 'cuda'; engines are built for tensorrt, tensorrt-rtx"),
    "no graph of the dtype": ("model.pt -o new.rmt --engine tensorrt-rtx --dtype fp16,int8", "a new bundle lists no int8 graph"),
    "no such GPU's name": ("build model.rmt --compute-capability sm89", "--compute-capability is 'sm89'"),
    "GPU that is not built for": ("model.pt -o new.rmt --engine tensorrt-rtx --compute-capability 90", "does not build for compute capability 9.0"),
    "no documents": ("build model.rmt --max-batch 0 --compute-capability 89", "max_batch is 0"),
    "unknown head": ("build model.rmt --head last", "--head is 'last'; expected all or none, or both with a comma"),
    "unknown hardware": (
        "build model.rmt --engine tensorrt --hardware-compatible ampere+",
        "--hardware-compatible is 'ampere+'; expected one of none, same_compute_capability, ampere_plus",
    ),
    "hardware of the other flavour": (
        "build model.rmt --compute-capability 89 --hardware-compatible ampere_plus", "TensorRT-RTX takes no --hardware-compatible: its kernels",
    ),
    "timing cache that cannot be": ("build model.rmt --engine tensorrt --timing-cache no/such/file", "needs the Python package 'tensorrt'"),
    "options of a build without one": (
        "model.pt --compute-capability 89 --strip-weights --max-batch 2",
        "--compute-capability, --max-batch, --strip-weights go with --engine tensorrt or tensorrt-rtx; nothing is compiled for 'cpu'",
    ),
    "one of them": ("model.rmt --engine cuda --head all", "--head goes with --engine tensorrt or tensorrt-rtx; nothing is compiled for 'cuda'"),
    "plain": ("model.pt --engine tensorrt-rtx --plain", "--plain goes with --engine cuda; nothing is fused in the graphs that TensorRT"),
    "verification of a bundle that has it": (
        "model.rmt --engine tensorrt-rtx --compute-capability 89 --tolerance 0.1", "--tolerance goes with a checkpoint, and model.rmt is a bundle",
    ),
    "other weights": ("build model.rmt --compute-capability 89 --model model.pt", "model.pt holds other weights than model.rmt"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags_are_one_line_before_anything_is_made(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made("bert").bundle, "model.rmt")
    shutil.copy(made("gpt2").checkpoint, "model.pt")
    before = contents(Path())
    arguments, message = WRONG[name]
    main = build.main if arguments.startswith("build") else export.main
    code, said = run(main, *arguments.removeprefix("build ").split())
    assert (code, said.count("\n")) == (1, 1), said
    assert message in said
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("whole", "apart", "joined", "said"),
    [
        ((), (), 12, "kept whole, in 12 kernels that the builder made of products and softmax in its graph (opset 20)"),
        ((), (), 0, "made of several kernels, of products and softmax in its graph (opset 20): the library has no single one"),
        ((), (), None, "attention: products and softmax in its graph (opset 20), which the builder joins where it can"),
        (("a", "b", "c"), (), 3, "kept whole, one kernel for each of 3 nodes (a, b, ...)"),
        (("a",), ("\x1b[2J",), 1, "kept whole, one kernel for each of a; made of several kernels where the library has no single one: ?[2J"),
    ],
)  # fmt: skip
def test_attention_is_said_to_be_whole_or_not(
    whole: tuple[str, ...], apart: tuple[str, ...], joined: int | None, said: str
) -> None:
    record = dataclasses.replace(record_of(), decomposable=apart)
    lines = engine_options.engine_lines(BuiltEngine("engines/a.engine", record, 20, None, whole, joined))
    assert said in lines[2]


def test_every_option_of_a_build_has_its_flag() -> None:
    """What is told to be given is what a reader can type."""
    flags = engine_options.EngineFlags("89", 1, "all", 1, Path("c"), 0, True, True, "none", 1).given()
    for command in (build.build, export.export):
        names = {f"--{name.replace('_', '-')}" for name in command.__annotations__}
        assert set(flags) <= names
    assert engine_options.EngineFlags().given() == []
