"""A look inside TensorRT engines, on a stand-in: no engine was ever loaded where this was written."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from engine_records import CLASSIFIER, Facts, bundle_of, on_machine, record_of, tensorrt_machine, write_engine
from models import S, made
from tensorrt_inspector import INSPECTED, inspected_host
from tensorrt_library import ICudaEngine, IExecutionContext, Runtime
from tensorrt_stand_in import engine_bundle, engine_file

from rmt_trt.commands import info
from rmt_trt.contract import StepSpec
from rmt_trt.errors import EngineError
from rmt_trt.export.tensorrt.builder import configure
from rmt_trt.export.tensorrt.options import BuildOptions
from rmt_trt.runtime.inspection import chosen, opened, profiler_class
from rmt_trt.runtime.layer_information import Port, read_information
from rmt_trt.runtime.source import open_source

# As TensorRT documents it: up to 10, from 11 on, and of an engine that was built for names alone.
GEMM = "gemm_mma_fp16_128x64"
OLD: dict[str, Any] = {
    "Layers": [
        {
            "Name": "node_MatMul_1 + node_Add_2", "LayerType": "CaskGemmMatrixMultiply",
            "Inputs": [
                {"Name": "memory", "Dimensions": [8, 4, 32], "Format/Datatype": "Row major linear FP16 format"},
                {"Name": "mask", "Location": "Device", "Dimensions": [], "Format/Datatype": "N/A due to dynamic shapes"},
            ],
            "Outputs": [{"Name": "new_memory", "Dimensions": [8, 4, 32], "Format/Datatype": "Half"}],
            "ParameterType": "MatrixMultiply", "Bias": {"Type": "Half", "Count": 32}, "TacticName": GEMM,
            "TacticValue": "0x11bde0e1d9f2f35d", "StreamId": 0,
            "Metadata": "[ONNX Layer: node_MatMul_1]\x1f[ONNX Layer: node_Add_2 | model.layer.0]",
        },
        {
            "Name": "Reformatting CopyNode for Input Tensor 0", "LayerType": "Reformat", "Inputs": [], "Outputs": [],
            "TacticValue": "0x0000000000000000",
        },
    ],
    "Bindings": ["memory", "segment", "new_memory"],
}  # fmt: skip
NEW: dict[str, Any] = {
    "Layers": [
        {
            "Name": "__myl_MulSumTran_myl0_1", "LayerType": "kgen",
            "Inputs": [{"Name": "segment", "Dimensions": [8, 20], "Format": "Row major linear", "Datatype": "Int64"}],
            "Outputs": [{"Name": "__mye1", "Dimensions": [8, 20, 32], "DataType": "Half"}],
            "TacticName": "__myl_MulSumTran_0x3a", "StreamId": 0,
            "Metadata": "[ONNX Layer: node_Mul_7][ONNX Layer: node_Sum_8][ONNX Layer: node_Mul_7]",
        },
    ],
    "I/O Tensors": [{"Name": "segment", "IOMode": "Input", "DataType": "Int64", "Dimensions": [-1, -1]}],
    "Engine Metadata": {"Multi-Device": "Disabled"},
}  # fmt: skip
NAMES = {"Layers": ["node_MatMul_1 + node_Add_2", "{ForeignNode[a...b]}"], "Bindings": ["memory"]}
STEP = ("softmax", "gemm", "gemm")


def times(number: int) -> list[tuple[str, float]]:
    """Of warm-up 1000 ms a layer; then gemm takes twice 3, 1, 2, 5, 4 ms, and softmax 2."""
    first = 1000.0 if number <= 10 else (3.0, 1.0, 2.0, 5.0, 4.0)[(number - 11) % 5]
    return [(name, first if name == "gemm" else 2.0) for name in STEP]


def shown(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What rmt-info prints: of a failure its one line, without the command's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rmt-info", *map(str, arguments)])
        patch.setenv("COLUMNS", "240")
        with pytest.raises(SystemExit) as ended:
            info.main()
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    if code == 0:
        return printed.out
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("rmt-info: ")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return engine_file(tmp_path, made("bert").bundle)


@pytest.mark.parametrize("kind", sorted(INSPECTED))
def test_every_name_of_the_stand_in_is_one_of_the_real_library(kind: str) -> None:
    real = getattr(tensorrt_rtx, kind)
    assert [member for member in INSPECTED[kind] if not hasattr(real, member)] == []


def test_times_are_reported_to_a_profiler_of_the_real_library() -> None:
    profiler = profiler_class(tensorrt_rtx)()
    assert isinstance(profiler, tensorrt_rtx.IProfiler)
    profiler.report_layer_time("gemm", 1)
    assert profiler.reported == [("gemm", 1.0)]


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


def test_a_profiler_that_hears_nothing_is_an_error_and_the_file_of_before_stays(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "t.json"
    target.write_text("of before")
    with inspected_host(tmp_path, times=lambda number: [], information=NEW):
        reason = shown(capsys, engine, "--layer-times", target, code=1)
    assert "TensorRT-RTX 1.7.1.116 timed no layers: it reported nothing in 50 steps" in reason
    assert target.read_text() == "of before"


def test_an_inspector_that_gives_no_json_is_one_line(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with inspected_host(tmp_path, information="Layer 0:\n gemm"):
        reason = shown(capsys, engine, "--layers", code=1)
    assert f"the engine inspector says of {engine} what is no JSON" in reason


def test_layers_are_timed_by_name_where_the_inspector_tells_nothing(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with inspected_host(tmp_path, times=times, information="Layer 0:\x1b gemm"):
        found = json.loads(shown(capsys, engine, "--layer-times", tmp_path / "t.json", "--json"))
    assert [layer["name"] for layer in found["layer_times"]["layers"]] == ["gemm", "softmax"]
    assert found["inspection"] is None
    assert "what the layers are made of is not known: the engine inspector says of" in caplog.text
    assert "\x1b" not in caplog.text


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


# What builds keep.


def test_builds_keep_what_the_inspector_tells() -> None:
    class Silent(tensorrt_rtx.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            pass

    config = tensorrt_rtx.Builder(Silent()).create_builder_config()
    assert config.profiling_verbosity == tensorrt_rtx.ProfilingVerbosity.LAYER_NAMES_ONLY
    configure(tensorrt_rtx, config, BuildOptions())
    assert config.profiling_verbosity == tensorrt_rtx.ProfilingVerbosity.DETAILED
