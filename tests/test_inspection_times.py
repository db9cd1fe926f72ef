"""The times of a TensorRT engine's layers, by rmt-info --layer-times, on a stand-in."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import tensorrt_rtx
from inspection_texts import NEW, shown, times
from models import S, made
from tensorrt_inspector import inspected_host
from tensorrt_library import ICudaEngine, IExecutionContext, Runtime
from tensorrt_stand_in import engine_file

from rmt_trt.contract import StepSpec
from rmt_trt.runtime.inspection import chosen, opened, profiler_class
from rmt_trt.runtime.source import open_source


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return engine_file(tmp_path, made("bert").bundle)


def test_times_are_reported_to_a_profiler_of_the_real_library() -> None:
    profiler = profiler_class(tensorrt_rtx)()
    assert isinstance(profiler, tensorrt_rtx.IProfiler)
    profiler.report_layer_time("gemm", 1)
    assert profiler.reported == [("gemm", 1.0)]


# rmt-info --layer-times.


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_layers_are_timed_in_plain_steps_of_full_random_segments(
    flavour: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = engine_file(tmp_path, made("gpt2").bundle, flavour), tmp_path / "times.json"
    spec: StepSpec = made("gpt2").spec
    told = {"Layers": [{"Name": "gemm", "LayerType": "kgen", "Metadata": "[ONNX Layer: n1]"}]}
    with inspected_host(tmp_path, times=times, information=told) as world:
        text = shown(capsys, path, "--layer-times", target, "--runs", "5", "--batch", "3")
        gc.collect()
        assert world.captured == world.launched == 0
        segments = world.flaws["segments"][2:]  # without the runs from A to B and back that prepare a context
        assert [one for kind in (IExecutionContext, ICudaEngine, Runtime) for one in world.live(kind)] == []
    assert len(segments) >= 15
    assert {segment.shape for segment in segments} == {(3, S)}
    assert all(segment.min() >= 0 and segment.max() < spec.vocab_size for segment in segments)
    assert not any(np.isin(segment, spec.dropped_ids).any() for segment in segments)
    assert len({segment.tobytes() for segment in segments}) == len(segments)
    found = json.loads(target.read_text())
    assert (found["format"], found["format_version"]) == ("rmt-trt-layer-times", 1)
    assert (found["batch"], found["runs"], found["warm_up"], found["step_ms"]) == (3, 5, 10, 8.0)
    assert found["engine"]["sha256"] == open_source(path).record.sha256  # type: ignore[union-attr]
    assert found["gpu"]["name"] == "NVIDIA Test"
    assert found["library"].split()[-1] == found["engine"]["version"]
    assert found["rmt_trt"]
    assert found["layers"] == [
        {"name": "gemm", "type": "kgen", "nodes": ["n1"], "median_ms": 6.0, "least_ms": 2.0, "most_ms": 10.0, "share": 0.75},
        {"name": "softmax", "type": "", "nodes": [], "median_ms": 2.0, "least_ms": 2.0, "most_ms": 2.0, "share": 0.25},
    ]  # fmt: skip
    rows = [line.split() for line in text.splitlines() if "gemm" in line or "softmax" in line]
    assert [row[1] for row in rows] == ["gemm", "softmax"]
    assert "75.0%" in text and "8.000 ms in all layers" in text  # noqa: PT018
    assert f"written to {target}" in text
    assert "layers of" not in text, "layers were not asked for"


def test_layers_and_times_together_as_json(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with inspected_host(tmp_path, times=times, information=NEW):
        arguments = (engine, "--layers", "--layer-times", tmp_path / "t.json", "--runs", "1", "--json")
        found = json.loads(shown(capsys, *arguments))
    written = json.loads((tmp_path / "t.json").read_text())
    assert found["layer_times"] == {name: written[name] for name in found["layer_times"]}
    assert found["inspection"]["batch"] == found["layer_times"]["batch"] == 8
    assert found["layer_times"]["runs"] == 1


def test_a_layer_that_is_missing_in_a_step_took_no_time_in_it(engine: Path, tmp_path: Path) -> None:
    with (
        inspected_host(tmp_path, times=lambda number: [("a", 1.0)] + [("b", 4.0)] * (number == 3)),
        opened(chosen(open_source(engine), None, None, None, 0), open_source(engine), 0) as inside,
    ):
        found = inside.layer_times(3, warm_up=0)
    assert [(layer.name, layer.median, layer.least, layer.most) for layer in found.layers] == [
        ("a", 1.0, 1.0, 1.0), ("b", 0.0, 0.0, 4.0),
    ]  # fmt: skip


def test_a_small_runtime_times_layers_and_cannot_look_inside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = engine_file(tmp_path, made("bert").bundle, "tensorrt", version_compatible=True)
    with inspected_host(tmp_path, ("tensorrt_lean",), times=times):
        reason = shown(capsys, path, "--layers", code=1)
        text = shown(capsys, path, "--layer-times", tmp_path / "t.json")
    assert "TensorRT's lean runtime 11.4.0.106 runs engines, and cannot look into them" in reason
    assert "pip install 'tensorrt==11.4.0.106'" in reason
    assert "softmax" in text


# What goes wrong.


def test_a_profiler_that_hears_nothing_is_an_error_and_the_file_of_before_stays(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "t.json"
    target.write_text("of before")
    with inspected_host(tmp_path, times=lambda number: [], information=NEW):
        reason = shown(capsys, engine, "--layer-times", target, code=1)
    assert "TensorRT-RTX 1.7.1.116 timed no layers: it reported nothing in 50 steps" in reason
    assert target.read_text() == "of before"


def test_layers_are_timed_by_name_where_the_inspector_tells_nothing(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with inspected_host(tmp_path, times=times, information="Layer 0:\x1b gemm"):
        found = json.loads(shown(capsys, engine, "--layer-times", tmp_path / "t.json", "--json"))
    assert [layer["name"] for layer in found["layer_times"]["layers"]] == ["gemm", "softmax"]
    assert found["inspection"] is None
    assert "what the layers are made of is not known: the engine inspector says of" in caplog.text
    assert "\x1b" not in caplog.text
