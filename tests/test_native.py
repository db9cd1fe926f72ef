"""rmt-trt's own operators on the CPU provider, graphs that have them, and who runs these and who the graphs beside them.

What they do on a GPU is in test_native_gpu.py.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gpu import open_cuda
from hardware import require_native
from models import S, made
from native_nodes import FLOAT8, low, normal, run
from onnx import TensorProto
from stand_in import host_gpu

from rmt_trt import ContractError, EngineError, RMTRuntime
from rmt_trt.bundle import Bundle, add_files
from rmt_trt.commands import info
from rmt_trt.commands import verify as verify_command
from rmt_trt.export import EngineOptions, add_engine_graphs, engine_graphs
from rmt_trt.export.fused import FusedGraphs, fused_graphs
from rmt_trt.export.graph_check import check_graphs
from rmt_trt.export.native_check import by_nodes, check_native, with_tanh_gelu
from rmt_trt.export.verify import model_reference, random_document, relative_error
from rmt_trt.model.step import model_spec
from rmt_trt.runtime import native
from rmt_trt.runtime.engines.cuda import CudaEngine


@pytest.fixture(autouse=True)
def _built() -> None:
    require_native()


def gelu(values: np.ndarray) -> np.ndarray:
    return torch.nn.functional.gelu(torch.from_numpy(values), approximate="tanh").numpy()


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", [(4, 8), (1, 1), (2, 3, 5), (2, 1, 7, 13)])
def test_a_product_has_its_bias_and_tanh_gelu(shape: tuple[int, ...], activation: str, transposed: int) -> None:
    x, weight, bias = normal(*shape), normal(shape[-1], 11, seed=1), normal(11, seed=2)
    given = weight.T if transposed else weight
    (found,) = run("Linear", x, given, bias, activation=activation, transposed=transposed)
    wanted = x @ weight + bias
    np.testing.assert_allclose(found, gelu(wanted) if activation == "gelu" else wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_product_of_e4m3_is_that_of_the_values_that_it_stands_for(activation: str) -> None:
    x, weight, bias = low(normal(6, 32) * 50), low(normal(9, 32, seed=1) * 50), normal(9, seed=2)
    scale = 1 / 2000
    exact = x.astype(np.float32) @ weight.astype(np.float32).T * np.float32(scale) + bias
    wanted = gelu(exact) if activation == "gelu" else exact
    (found,) = run("Linear", x, weight, bias, activation=activation, transposed=1, scale=scale)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    inverse = np.array([30], np.float32)
    (rounded,) = run(
        "LinearQuantize", x, weight, bias, inverse, outputs=(FLOAT8,), activation=activation, transposed=1, scale=scale
    )
    near = np.abs(rounded - low(wanted * 30).astype(np.float32)) <= np.maximum(np.abs(rounded) / 8, 2**-9)
    assert near.all()  # a value beside a half may fall to either side
    assert (rounded == low(wanted * 30).astype(np.float32)).mean() > 0.95


def test_rounding_to_e4m3_is_exact_for_every_number_of_sixteen_bits() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    bfloats = (halves.astype(np.uint32) << 16).view(np.float32)
    for values in (halves.view(np.float16).astype(np.float32), bfloats):
        (found,) = run("Quantize", values[None], outputs=(FLOAT8,))
        wanted = low(values).astype(np.float32)
        np.testing.assert_array_equal(found[0], wanted)  # NaN is NaN
        numbers = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(found[0])[numbers], np.signbit(wanted)[numbers])
        assert np.abs(found[0][numbers]).max() == 448
    (halved,) = run("Quantize", np.array([[3.0, -3.0, 1e9]]), outputs=(FLOAT8,), inverse=0.5)
    np.testing.assert_array_equal(halved, [[1.5, -1.5, 448.0]])


def test_a_norm_gives_its_result_and_the_same_in_e4m3() -> None:
    x, skip, gamma, beta = normal(2, 3, 24), normal(2, 3, 24, seed=1), normal(24, seed=2), normal(24, seed=3)
    found, rounded = run(
        "SkipLayerNormQuantize", x, skip, gamma, beta, outputs=(TensorProto.FLOAT, FLOAT8), epsilon=1e-3, inverse=20.0
    )
    wanted = torch.nn.functional.layer_norm(
        torch.from_numpy(x + skip), (24,), torch.from_numpy(gamma), torch.from_numpy(beta), 1e-3
    )
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rounded, low(found * np.float32(20)).astype(np.float32))


# Graphs


def written(model: Any, folder: Path, **options: Any) -> FusedGraphs:
    return fused_graphs(model, model_spec(model), "fp32", folder, grouped=True, beside=True, **options)


@pytest.mark.parametrize("nodes", [False, True], ids=["operators", "nodes"])
@pytest.mark.parametrize("name", models.ENCODERS)
def test_graphs_with_native_products_follow_the_recurrence(name: str, nodes: bool, tmp_path: Path) -> None:
    model = models.make_model(name)
    graphs = written(model, tmp_path, by_nodes=nodes)
    uses = {(entry.role, entry.head, entry.min_batch) for entry in graphs.native}
    assert uses == {
        (role, head, least) for role, least in (("full", 1), ("full", 8), ("step", 1)) for head in ("none", "all")
    }
    assert {entry.needs for entry in graphs.native} == {() if nodes else ("native",)}
    operators = {node.op_type for entry in graphs.native for node in onnx.load(tmp_path / entry.file).graph.node}
    assert ("Linear" in operators) is not nodes
    initial = [model.memory.detach().numpy()]
    check = check_graphs(
        graphs.native, tmp_path, model_spec(model), initial, model_reference(with_tanh_gelu(model)), 20, 1e-4
    )
    assert 0 < check.largest <= 1e-5


def test_the_tanh_form_of_gelu_is_another_function() -> None:
    document = made("bert").document(3 * S)
    exact, tanh = (
        [state[0] for state, _ in model_reference(model)(document)]
        for model in (made("bert").model, with_tanh_gelu(made("bert").model))
    )
    assert all(1e-6 < relative_error(b, a) < 1e-2 for a, b in zip(exact, tanh, strict=True))


def test_of_another_activation_only_large_batches_gain(tmp_path: Path) -> None:
    model = models.make_model("bert", backbone={"hidden_act": "relu"})
    graphs = written(model, tmp_path)
    assert {(entry.role, entry.min_batch) for entry in graphs.native} == {("full", 8)}
    initial = [model.memory.detach().numpy()]
    check = check_graphs(graphs.native, tmp_path, model_spec(model), initial, model_reference(model), 5, 1e-4)
    assert check.largest <= 1e-5


WHOLE = {"head_dim": 16}  # heads that the operator for rotary positions takes
DECODERS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("gpt2", {}, {"Linear"}),
    ("gpt_neox", {"use_parallel_residual": False}, {"Linear"}),
    ("llama", {}, {"SiluMul"}),
    ("llama", WHOLE, {"SiluMul", "Rotary"}),
    ("llama", {**WHOLE, "num_key_value_heads": 4}, {"SiluMul", "Rotary"}),
    ("llama", {**WHOLE, "num_key_value_heads": 1}, {"SiluMul", "Rotary"}),
    ("llama", {"mlp_bias": True, "attention_bias": True}, {"Linear", "SiluMul"}),
    ("llama", {**WHOLE, "hidden_act": "gelu"}, {"Rotary"}),
    ("qwen2", WHOLE, {"Linear", "SiluMul", "Rotary"}),
    ("qwen2", {**WHOLE, "model_type": "qwen3"}, {"SiluMul"}),
]


@pytest.mark.parametrize("nodes", [False, True], ids=["operators", "nodes"])
@pytest.mark.parametrize(("name", "backbone", "operators"), DECODERS)
def test_decoders_with_our_operators_follow_the_recurrence(
    name: str, backbone: dict[str, Any], operators: set[str], nodes: bool, tmp_path: Path
) -> None:
    model = models.make_model(name, backbone=backbone)
    graphs = written(model, tmp_path, by_nodes=nodes)
    uses = {(entry.role, entry.min_batch) for entry in graphs.native}
    assert uses == {("full", 1), ("step", 1), *([("full", 16)] if name == "gpt2" else [])}
    parts = [node for entry in graphs.native for node in onnx.load(tmp_path / entry.file).graph.node]
    assert {node.op_type for node in parts if node.domain == native.DOMAIN} == (set() if nodes else operators)
    initial, said = [model.memory.detach().numpy()], []
    check = check_native(
        graphs.native, tmp_path, model, model_spec(model), initial, 20, lambda *done: said.append(done)
    )
    assert (0 < check.largest <= 1e-5, len(said) > 0) == (True, True)


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("gpt_neox", {}), ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "relu", "attention_bias": False}),
     ("llama", {"intermediate_size": 68})],
    ids=["parallel layers", "nothing to take in", "odd sizes"],
)  # fmt: skip
def test_decoders_that_would_gain_nothing_have_none(name: str, backbone: dict[str, Any], tmp_path: Path) -> None:
    assert written(models.make_model(name, backbone=backbone), tmp_path).native == ()


def test_gate_and_up_are_in_the_file_once_and_taken_apart_when_a_session_is_made(tmp_path: Path) -> None:
    """By the graphs beside those with our operators: these take the two as they lie there."""
    model = models.make_model("llama", backbone=WHOLE)
    alone = fused_graphs(model, model_spec(model), "fp32", tmp_path, grouped=True)
    size = (tmp_path / "cuda-fp32.data").stat().st_size
    beside = written(model, tmp_path)
    assert (len(alone.native), len(beside.native)) == (0, 8)
    assert (tmp_path / "cuda-fp32.data").stat().st_size <= size
    splits = []
    for entry in (beside.entries[0], beside.native[0]):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        native.register(options)
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(tmp_path / entry.file, options, providers=["CPUExecutionProvider"])
        for path in (tmp_path / entry.file, tmp_path / "optimized.onnx"):
            parts = onnx.load(path, load_external_data=False).graph.node
            splits.append(sum(node.op_type == "Split" and node.input[0].endswith("gate_up.weight") for node in parts))
    assert splits == [2, 0, 0, 0]


def matrices(path: Path) -> set[tuple[str, ...]]:
    """Where the matrices of a graph lie."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {
        tuple(f"{item.key}={item.value}" for item in tensor.external_data)
        for tensor in tensors
        if len(tensor.dims) > 1 and tensor.external_data
    }


def test_an_export_writes_them_beside_the_others_with_the_same_weights(tmp_path: Path) -> None:
    path = Path(shutil.copytree(made("bert").bundle, tmp_path / "model.rmt"))
    options = EngineOptions(check_segments=3, segments=2)
    added = add_engine_graphs(path, "cuda", "fp16", options=options)
    own = [entry for entry in added.entries if entry.needs]
    others = [entry for entry in added.entries if not entry.needs]
    assert len(own) == len(others) == 6
    lies = [set().union(*(matrices(path / entry.file) for entry in entries)) for entries in (own, others)]
    assert lies[0]
    assert lies[0] <= lies[1]
    assert max(Bundle(path).manifest.files[entry.file].size for entry in own) < 40_000
    record = Bundle(path).manifest.verification["engines"]["cuda"]["fp16"]
    assert added.native is not None
    assert record["native"] == added.native.to_json()
    assert (record["native"]["check"]["by"], record["native"]["check"]["dtype"]) == ("operators", "fp32")
    assert record["native"]["fused"]["product+bias"] == 2 * 6
    without = add_engine_graphs(path, "cuda", "fp16", options=replace(options, native=False, check_segments=0))
    assert without.native is None
    assert not any(entry.needs for entry in Bundle(path).manifest.graphs)
    assert not [name for name in Bundle(path).manifest.files if "native" in name]


def test_twins_of_large_models_and_without_the_library_are_written_with_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("bert").model
    spec = model_spec(model)
    assert not by_nodes(model, spec)
    assert by_nodes(model, replace(spec, segment_length=1 << 20))
    monkeypatch.setattr(native, "library", lambda: None)
    assert by_nodes(model, spec)


def test_on_its_engine_an_export_verifies_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = Path(shutil.copytree(made("bert").bundle, tmp_path / "model.rmt")), []

    def verified(stage: Path, engine: str, *rest: Any) -> Any:
        seen.append({graph.needs for graph in Bundle(stage).manifest.graphs if graph.engine == engine})
        return made("bert").report

    monkeypatch.setattr(engine_graphs, "refusal", lambda *arguments: None)
    monkeypatch.setattr(engine_graphs, "_verified", verified)
    options = EngineOptions(check_segments=0)
    own = add_engine_graphs(path, "cuda", "fp16", options=options).native
    assert own is not None
    assert (seen, own.report is None, own.unverified) == ([{()}, {(), ("native",)}], False, None)
    monkeypatch.setattr(native, "library", lambda: None)
    own = add_engine_graphs(path, "cuda", "fp16", options=options).native
    assert own is not None
    assert (seen[2:], own.report, own.unverified) == ([{()}], None, native.INSTALL)


# The engine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT with graphs for CUDA in fp32, which the stand-in runs, with our own operators and without; nobody may change it."""
    folder = tmp_path_factory.mktemp("native")
    path = Path(shutil.copytree(made("bert").bundle, folder / "bert.rmt"))
    graphs = written(made("bert").model, folder)
    entries = [replace(entry, data=("graphs/cuda-fp32.data",), file=f"graphs/{entry.file}")
               for entry in (*graphs.entries, *graphs.native)]  # fmt: skip
    names = {name for entry in entries for name in (entry.file, *entry.data)}
    add_files(path, {name: folder / Path(name).name for name in names}, entries)
    return path


def opened(runtime: RMTRuntime) -> list[str]:
    """Files of the graphs that sessions were made of."""
    engine = runtime._engine
    assert isinstance(engine, CudaEngine)
    return sorted(Path(engine._graphs[key].file).name for key, _ in engine._sessions)


def test_the_engine_takes_native_products_where_they_are(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found, said, files = {}, {}, {}
    for switch in ("", "0"):
        monkeypatch.setenv(native.SWITCH, switch)
        caplog.clear()
        with host_gpu(), caplog.at_level(logging.INFO, "rmt_trt"), open_cuda(bundle, "fp32") as runtime:
            batch = [random_document(runtime.spec, 5 * S, seed) for seed in range(9)]
            found[switch] = [*runtime.run(batch), runtime.run(random_document(runtime.spec, 19 * S + 3, 9))]
            files[switch] = opened(runtime)
        said[switch] = [
            record.getMessage() for record in caplog.records if record.getMessage().startswith("engine 'cuda':")
        ]
    assert len(files[""]) == len(files["0"])
    assert all("native" in name for name in files[""])
    assert not any("native" in name for name in files["0"])
    assert [f"native products, from {native.library()}" in line for line in said[""]] == [True]
    assert said["0"] == [
        "engine 'cuda': ONNX Runtime's products; the bundle's native ones are not used: RMT_NATIVE=0 leaves them out"
    ]
    for own, other in zip(found[""], found["0"], strict=True):
        assert 0 < relative_error(own.memory, other.memory) < 1e-2  # exact GELU there
    with RMTRuntime(bundle, engine="cpu", threads=1) as cpu:
        assert relative_error(found["0"][-1].memory, cpu.run(random_document(cpu.spec, 19 * S + 3, 9)).memory) < 1e-4


def test_without_the_library_the_others_run_or_an_error_says_what_to_install(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Path(shutil.copytree(bundle, tmp_path / "alone.rmt"))
    add_files(alone, {}, drop=lambda graph: graph.engine == "cuda" and not graph.needs)
    with host_gpu(), open_cuda(alone, "fp32") as runtime:
        assert all("native" in name for name in opened(runtime))
    monkeypatch.setattr(native, "library", lambda: None)
    with host_gpu():
        with open_cuda(bundle, "fp32") as runtime:
            assert not any("native" in name for name in opened(runtime))
        for dtype in ("fp32", None):
            with pytest.raises(
                EngineError, match=r"its graphs for CUDA in fp32 need rmt-trt's own operators.*Install one \(gcc\)"
            ):
                RMTRuntime(alone, engine="cuda", dtype=dtype)
    with pytest.raises(EngineError, match=r"these graphs use rmt-trt's own operators.*pip install"):
        native.register(onnxruntime.SessionOptions())


def test_a_switch_that_is_neither_on_nor_off_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "no")
    with host_gpu(), pytest.raises(ContractError, match="RMT_NATIVE is 'no'; expected 0"):
        open_cuda(bundle, "fp32")


def test_rmt_info_says_whether_they_are_used(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for switch in ("1", "0"):
        monkeypatch.setenv(native.SWITCH, switch)
        info.info(bundle, as_json=True)
        said[switch] = json.loads(capsys.readouterr().out)["native"]
    assert said["1"] == {"library": native.library(), "not_used": None}
    assert said["0"]["not_used"] == "RMT_NATIVE=0 leaves them out"


def test_a_verdict_is_recorded_beside_the_graphs_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copytree(made("bert").bundle, tmp_path / "model.rmt"))
    add_engine_graphs(path, "cuda", "fp16", options=EngineOptions(check_segments=0, segments=0))
    report = replace(made("bert").report, engine="cuda", dtype="fp16")

    def proven() -> list[bool]:
        record = Bundle(path).manifest.verification["engines"]["cuda"]["fp16"]
        return [record["verification"] is not None, record["native"]["verification"] is not None]

    assert proven() == [False, False]
    verify_command._record(path, report)
    assert proven() == [False, True]
    monkeypatch.setenv(native.SWITCH, "0")
    verify_command._record(path, report)
    assert proven() == [True, True]
