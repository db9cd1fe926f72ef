"""A look inside TensorRT engines that cannot be had, and which engine of a bundle is meant, on a stand-in."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from engine_records import CLASSIFIER, Facts, bundle_of, on_machine, record_of, tensorrt_machine, write_engine
from inspection_texts import NEW, shown, times
from models import made
from tensorrt_inspector import inspected_host
from tensorrt_library import ICudaEngine, IExecutionContext, Runtime
from tensorrt_stand_in import engine_file

from rmt_trt.errors import EngineError
from rmt_trt.runtime.inspection import chosen
from rmt_trt.runtime.source import open_source


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return engine_file(tmp_path, made("bert").bundle)


# What goes wrong.


@pytest.mark.parametrize(
    ("call", "option", "said"),
    [
        ("create_engine_inspector", "--layers", "made no engine inspector"),
        ("execution_context", "--layers", "inspects no context"),
        ("get_engine_information", "--layers", "says nothing of its layers"),
        ("set_input_shape", "--layers", "takes no 'memory' of shape (8, 4, 32)"),
        ("create_execution_context", "--layers", "made no execution context"),
        ("deserialize_cuda_engine", "--layers", "cannot load"),
        ("report_to_profiler", "--layer-times=t.json", "timed no layers of a step"),
        ("execute_async_v3", "--layer-times=t.json", "did not enqueue a step"),
    ],
)
def test_what_the_library_refuses_is_one_line_with_its_own_words(
    call: str, option: str, said: str, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with inspected_host(tmp_path, times=times, information=NEW) as world:
        world.fail(call)
        reason = shown(capsys, engine, option, code=1)
        gc.collect()
        assert [one for kind in (IExecutionContext, ICudaEngine, Runtime) for one in world.live(kind)] == []
    assert said in reason
    assert "TensorRT-RTX 1.7.1.116" in reason
    assert "stand-in: " in reason
    assert not (tmp_path / "t.json").exists()


def test_an_inspector_that_gives_no_json_is_one_line(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with inspected_host(tmp_path, information="Layer 0:\n gemm"):
        reason = shown(capsys, engine, "--layers", code=1)
    assert f"the engine inspector says of {engine} what is no JSON" in reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--engine tensorrt", "--engine is about the inside of an engine. Give --layers or --layer-times too"),
        ("--batch 2", "--batch is about the inside"),
        ("--layers --batch 9", "a batch of 9 documents; engine 'tensorrt-rtx-fp32-all-sm89-b8.engine' takes 1 to 8"),
        ("--layers --batch 0", "a batch of 0 documents"),
        ("--layers --dtype fp9", "--dtype is 'fp9'; expected one of fp32, fp16"),
        ("--layers --head last", "--head is 'last'; expected one of all, none"),
        (
            "--layers --engine cuda",
            "'cuda' is another engine; those that can be looked into are tensorrt, tensorrt-rtx",
        ),
        ("--layers --engine trt", "'trt' is no engine"),
        ("--layers --engine tensorrt", "has engine 'tensorrt-rtx', and 'tensorrt' was asked for. Leave it out"),
        ("--layers --dtype fp16", "has dtype 'fp32', and 'fp16' was asked for"),
        ("--layers --runs 3", "--runs is about --layer-times FILE.json. Give that too"),
        ("--layer-times t.json --runs 0", "--runs is 0; expected 1 to 100000"),
        ("--layer-times nowhere/t.json", "nowhere is no folder that can be written"),
        ("--layer-times .", "is no regular file"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: str, reason: str, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with inspected_host(tmp_path, information=NEW):
        assert reason in shown(capsys, engine, *options.split(), code=1)


def test_an_altered_engine_is_not_loaded(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(engine.read_bytes())
    data[-1] ^= 1
    engine.write_bytes(data)
    with inspected_host(tmp_path, information=NEW) as world:
        assert "SHA-256 differs" in shown(capsys, engine, "--layers", code=1)
        assert world.calls["deserialize_cuda_engine"] == 0


@pytest.mark.parametrize("option", ["--layers", "--layer-times"])
@pytest.mark.parametrize("alone", [True, False])
def test_without_a_gpu_the_refusal_is_the_one_of_every_command(
    option: str, alone: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(CLASSIFIER)
    path = write_engine(tmp_path, record) if alone else bundle_of(tmp_path, record, spec=CLASSIFIER)
    options = [option] if option == "--layers" else [option, tmp_path / "t.json"]
    with on_machine(Facts(gpu="the driver is on holiday")):
        reason = shown(capsys, path, *options, code=1)
    assert "the driver is on holiday. It needs a GPU of compute capability 8.9, and tensorrt_rtx 1.7.1.116" in reason
    assert not (tmp_path / "t.json").exists()


# Which engine of a bundle.


def test_the_engine_of_a_bundle_is_chosen_as_a_run_does_or_as_asked_for(tmp_path: Path) -> None:
    records = [
        record_of(CLASSIFIER, "tensorrt", dtype, head, capabilities=(89,))
        for dtype in ("fp16", "fp32")
        for head in ("all", "none")
    ]
    elsewhere = record_of(CLASSIFIER, capabilities=(120,))
    source = open_source(bundle_of(tmp_path, *records[:3], elsewhere, spec=CLASSIFIER))
    with on_machine(tensorrt_machine()):

        def name(*wanted: Any) -> str:
            return chosen(source, *wanted, 0).path.stem

        assert name(None, None, None) == "tensorrt-fp16-all-sm89-b8"
        assert name("tensorrt", "fp32", None) == "tensorrt-fp32-all-sm89-b8"
        assert name(None, None, "none") == "tensorrt-fp16-none-sm89-b8"
        with pytest.raises(EngineError, match=r"has no engine file with head 'none' beside tensorrt-fp32-all-sm89-b8"):
            name(None, "fp32", "none")
        with pytest.raises(
            EngineError, match=r"engine 'tensorrt-rtx' cannot run .* compute capability 12\.0; GPU 0 has 8\.9"
        ):
            name("tensorrt-rtx", None, None)
        with pytest.raises(
            EngineError, match=r"engine 'tensorrt' cannot run .* compute in .*; engine 'tensorrt-rtx' cannot"
        ):
            name(None, "int8", None)


def test_an_engine_without_logits_can_be_looked_into_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = engine_file(tmp_path, made("gpt2").bundle, head="none")
    with inspected_host(tmp_path, information=NEW):
        found = json.loads(shown(capsys, path, "--layers", "--json"))
    assert [tensor["name"] for tensor in found["inspection"]["tensors"]] == ["memory", "segment", "new_memory"]


def test_what_holds_no_engine_says_what_to_build(capsys: pytest.CaptureFixture[str]) -> None:
    with on_machine(Facts(gpu="no GPU")):
        for path in (made("bert").bundle, made("bert").bundle / "step.onnx"):
            assert "To build one, for GPUs of 8.9 and 12.0: rmt-build" in shown(capsys, path, "--layers", code=1)
