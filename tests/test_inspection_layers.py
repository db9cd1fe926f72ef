"""The layers of TensorRT engines, as the inspector tells them and rmt-info --layers shows them, on a stand-in."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx
from inspection_texts import GEMM, NAMES, NEW, OLD, shown
from models import S, made
from tensorrt_inspector import INSPECTED, inspected_host
from tensorrt_library import ICudaEngine, IExecutionContext, Runtime
from tensorrt_stand_in import engine_bundle, engine_file

from rmt_trt.errors import EngineError
from rmt_trt.export.tensorrt.builder import configure
from rmt_trt.export.tensorrt.options import BuildOptions
from rmt_trt.runtime.layer_information import Port, read_information


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return engine_file(tmp_path, made("bert").bundle)


@pytest.mark.parametrize("kind", sorted(INSPECTED))
def test_every_name_of_the_stand_in_is_one_of_the_real_library(kind: str) -> None:
    real = getattr(tensorrt_rtx, kind)
    assert [member for member in INSPECTED[kind] if not hasattr(real, member)] == []


# What the inspector says.


def test_layers_are_read_as_tensorrt_10_tells_them() -> None:
    first, second = read_information(json.dumps(OLD), "x").layers
    assert (first.name, first.kind, first.kernel) == ("node_MatMul_1 + node_Add_2", "CaskGemmMatrixMultiply", GEMM)
    assert first.nodes == ("node_MatMul_1", "node_Add_2")
    assert first.inputs[0] == Port("memory", "Row major linear FP16 format", "8x4x32")
    assert first.outputs == (Port("new_memory", "Half", "8x4x32"),)
    assert first.told["Bias"] == {"Type": "Half", "Count": 32}
    assert (second.kind, second.nodes, second.kernel) == ("Reformat", (), "")


def test_layers_are_read_as_tensorrt_11_tells_them() -> None:
    found = read_information(json.dumps(NEW), "x")
    assert found.detailed
    assert found.more == {name: NEW[name] for name in ("I/O Tensors", "Engine Metadata")}
    (layer,) = found.layers
    assert layer.nodes == ("node_Mul_7", "node_Sum_8")
    assert layer.inputs == (Port("segment", "Int64, Row major linear", "8x20"),)
    assert layer.outputs == (Port("__mye1", "Half", "8x20x32"),)


def test_layers_by_name_alone_are_read() -> None:
    found = read_information(json.dumps(NAMES), "x")
    assert [layer.name for layer in found.layers] == NAMES["Layers"]
    assert not found.detailed


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []), (" \n", []), ("{}", []), ('{"Layers": null, "More": 1}', []), ('{"Layers": {"Name": "a"}}', []),
        ('{"Layers": ["a\x1b[31m\x1f\nb", 7, null, ["c"]]}', ["a\x1b[31m\x1f\nb", "7", "None", "['c']"]),
        ('{"Layers": [{}, {"Name": 3, "Inputs": 4, "Outputs": [5, {"Dimensions": "x"}], "Metadata": {}}]}',
         ["without a name", "3"]),
        ('{"Layers": [{"name": "small", "LAYERTYPE": null, "TacticValue": 0, "Inputs": [null]}]}', ["small"]),
    ],
)  # fmt: skip
def test_whatever_json_comes_is_read(text: str, names: list[str]) -> None:
    found = read_information(text, "x")
    assert [layer.name for layer in found.layers] == names
    assert all(layer.kernel == "" for layer in found.layers)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Layer 0: gemm", "says of x what is no JSON .*: 'Layer 0: gemm'"), ("[" * 100_000, "what is no JSON"),
        ('["a"]', r"""says of x '\["a"\]'; expected an object"""),
    ],
)  # fmt: skip
def test_what_is_no_json_is_an_error_that_says_so(text: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        read_information(text, "x")


# rmt-info --layers.


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_layers_and_tensors_are_shown(flavour: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = engine_file(tmp_path, made("bert").bundle, flavour, batch=8)
    with inspected_host(tmp_path, information=OLD) as world:
        text = shown(capsys, path, "--layers")
        gc.collect()
        assert world.enqueued == world.launched == 0, "a look runs nothing"
        assert [one for kind in (IExecutionContext, ICudaEngine, Runtime) for one in world.live(kind)] == []
    lines = " ".join(text.split())
    for part in (
        "2 layers of 2 nodes of the ONNX graph; 1 hold more than one", "CaskGemmMatrixMultiply", GEMM,
        "memory 8x4x32 (Row major linear FP16 format)", "new_memory 8x4x32 (Half)", "-1x4x32", "8x4x32",
        "Row major linear format (segment)", "INT64", "DEVICE", "full segments of 8 documents",
        "3.0 MiB of weights, 0.1 MiB for intermediate values",
    ):  # fmt: skip
        assert part in lines, part
    assert "node_Add_2" in text
    assert "rmt-build" not in text


def test_json_has_all_that_the_inspector_says(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with inspected_host(tmp_path, information=NEW):
        found = json.loads(shown(capsys, engine, "--layers", "--json", "--batch", "3"))
    inside = found["inspection"]
    assert (found["engine"]["path"], found["gpu"]["compute_capability"]) == (str(engine), 89)
    assert (inside["batch"], inside["verbosity"], inside["detailed"]) == (3, "DETAILED", True)
    assert inside["layers"][0]["told"] == NEW["Layers"][0]
    assert inside["more"]["I/O Tensors"] == NEW["I/O Tensors"]
    tensors = {tensor["name"]: tensor for tensor in inside["tensors"]}
    assert list(tensors) == ["memory", "segment", "new_memory", "logits"]
    assert tensors["segment"] == {
        "name": "segment", "mode": "INPUT", "dtype": "INT64", "shape": [-1, -1], "stepped": [3, S],
        "format": "Row major linear format (segment)", "layout": "LINEAR", "location": "DEVICE",
    }  # fmt: skip
    assert found["layer_times"] is None


def test_an_engine_of_names_alone_says_so_and_how_to_build_it_again(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with inspected_host(tmp_path, information=NAMES, profiling_verbosity="LAYER_NAMES_ONLY"):
        text = shown(capsys, engine, "--layers")
    assert "{ForeignNode[a...b]}" in text
    assert "It keeps its layers' names alone (profiling verbosity LAYER_NAMES_ONLY): what was fused" in text
    assert "rmt-build NAME.rmt --engine tensorrt-rtx --dtype fp32 --max-batch 8 --compute-capability 89" in text


@pytest.mark.parametrize("information", ["", {"Layers": []}])
def test_an_engine_that_keeps_nothing_of_its_layers_says_so(
    information: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = engine_bundle(tmp_path, "bert", "tensorrt")
    with inspected_host(tmp_path, information=information, profiling_verbosity="NONE"):
        text = shown(capsys, bundle, "--layers")
    assert "It keeps nothing of its layers (profiling verbosity NONE)" in text
    assert f"rmt-build {bundle} --engine tensorrt --dtype fp32 --max-batch 8\n" in text


def test_names_of_a_strangers_engine_do_not_steer_the_terminal_and_long_ones_are_cut(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x07[red]"
    tensor = {"Name": evil, "Dimensions": [evil], "Format": evil}
    layer = {"Name": evil, "LayerType": evil, "TacticName": evil, "Metadata": evil, "Inputs": [tensor] * 5}
    long = {"Name": "x" * 5000, "Metadata": "".join(f"[ONNX Layer: n{number}]" for number in range(9))}
    with inspected_host(tmp_path, information={"Layers": [layer, long]}, times=lambda number: [(evil, 1.0)]):
        for option in ([], ["--layer-times", str(tmp_path / "t.json")]):
            text = shown(capsys, engine, "--layers", *option)
            assert not [char for char in text if not char.isprintable() and char != "\n"]
            assert "?[2J?[red]" in text
    assert "x" * 69 + "..." in text
    assert "x" * 70 not in text
    assert "n3" in text and "n4" not in text and "and 5 more" in text and "and 2 more" in text  # noqa: PT018


# What builds keep.


def test_builds_keep_what_the_inspector_tells() -> None:
    class Silent(tensorrt_rtx.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            pass

    config = tensorrt_rtx.Builder(Silent()).create_builder_config()
    assert config.profiling_verbosity == tensorrt_rtx.ProfilingVerbosity.LAYER_NAMES_ONLY
    configure(tensorrt_rtx, config, BuildOptions())
    assert config.profiling_verbosity == tensorrt_rtx.ProfilingVerbosity.DETAILED
