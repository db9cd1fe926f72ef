"""rmt-bench: the options and models that it refuses, and those that it takes as they are."""

from __future__ import annotations

import pytest
import torch
from models import made
from typer.testing import CliRunner

from rmt_trt.benchmarks.plan import Plan
from rmt_trt.benchmarks.presets import PRESETS, prepare
from rmt_trt.commands.bench import app
from rmt_trt.errors import ContractError, EngineError, FormatError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tpu"}, "--engine is 'tpu'; expected one of cpu, cuda"),
        ({"dtype": "fp8"}, "--dtype is 'fp8'; expected one of fp32, fp16, bf16"),
        ({"peers": ("jax",)}, "--peers names 'jax'; expected some of published, lean, published-eager"),
        ({"engine": "cpu", "peers": ("lean-compile",)}, "'lean-compile', which needs a GPU"),
        ({"compile_mode": "fast"}, "--compile-mode is 'fast'; expected one of default, max-autotune"),
        ({"engine": "cpu", "peers": ("full",)}, "'full', which needs a GPU"),
        ({"batches": (0,)}, "--batch is '0'; expected whole numbers from 1 on"),
        ({"tokens": ()}, "--tokens is ''"),
        ({"repeat": 0}, "--repeat is 0; expected a number above 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ContractError, match=message):
        Plan(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.pt", "--engine", "cpu", "--batch", "1,two"], "--batch is '1,two'; expected whole numbers with commas"),
        (["x.pt", "--engine", "cpu", "--many-segments", "5"], "expected two whole numbers, such as 10,1000"),
        (["x.pt", "--engine", "cpu", "--many", "--many-segments", "5,2"], "the smaller first"),
        (["--engine", "cpu"], "give either a bundle or checkpoint to measure, or --preset"),
        (["x.pt", "--engine", "cpu", "--preset", "example"], "give either"),
        (["--engine", "cpu", "--preset", "bert-huge"], "--preset is 'bert-huge'; expected one of bert-base"),
        (["--preset", "bert-large"], "--preset is 'bert-large'; expected one of bert-base"),
        (["--preset", "example", "--engine", "cpu", "--drift-dtypes", "evil"], "--drift-dtypes names 'evil'"),
        (["x.pt", "--engine", "cpu", "--drift", "--segments", "1"], "--segments is 1"),
    ],
)
def test_bad_options_give_one_clear_error(arguments, message, tmp_path):
    where = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(app, [*arguments, *where])
    assert isinstance(done.exception, ContractError), done.exception
    assert message in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--out", "--suite"])
def test_a_file_where_a_folder_is_wanted_stays_as_it_is(flag, tmp_path):
    place = tmp_path / "here"
    place.write_text("mine")
    arguments = ["--preset", "example", "--engine", "cpu"] if flag == "--out" else []
    done = CliRunner().invoke(app, [*arguments, flag, str(place), "--work", str(tmp_path / "work")])
    assert isinstance(done.exception, ContractError)
    assert f"{flag} is {place}, a file; expected a folder" in str(done.exception)
    assert place.read_text() == "mine"


def test_a_machine_without_the_gpu_is_told_so_before_anything_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["--preset", "bert-base", "--work", str(tmp_path / "work")])
    assert isinstance(done.exception, EngineError)
    assert "sees 0 here. Measure on the CPU with --engine cpu" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_the_engines_graphs_says_how_to_add_them(tmp_path):
    bundle = made("bert").bundle
    with pytest.raises(FormatError, match=f"Add them with: rmt-export {bundle} --engine cuda --dtype fp16"):
        prepare(bundle, None, tmp_path, "cuda", ("fp16",), lambda text: None)


def test_a_checkpoint_is_exported_once_and_its_bundle_reused(tmp_path):
    said: list[str] = []
    first = prepare(made("bert").checkpoint, None, tmp_path, "cpu", ("fp32",), said.append)
    again = prepare(made("bert").checkpoint, None, tmp_path, "cpu", ("fp32",), said.append)
    assert first.bundle == again.bundle == tmp_path / "bert.rmt"
    assert said[-1] == f"{tmp_path / 'bert.rmt'} is reused"


def test_every_preset_can_be_asked_for_by_the_command():
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert all(name in shown for name in (*PRESETS, "example"))
