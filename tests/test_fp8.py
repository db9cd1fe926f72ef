"""FP8 as a dtype of the CUDA engine: what the operators round, which product gets which threshold, what the graphs hold, how
their twins follow the recurrence, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gpu import require_gpu
from hardware import require_native
from models import S, example_bundle, made, make_model
from onnx import TensorProto, helper
from quantized import ranges_of
from stand_in import host_gpu

from rmt_trt import EngineError, RMTRuntime
from rmt_trt.bundle import Bundle
from rmt_trt.calibration import CollectOptions, Source, add_static, collect
from rmt_trt.calibration.native import Mapped, mapped
from rmt_trt.calibration.step_graph import read_step
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.export import EngineOptions, ExportOptions, export_model, fused
from rmt_trt.export.fused.layers import Backbone, backbone_of
from rmt_trt.export.verify import random_document, relative_error
from rmt_trt.model.checkpoint import LoadedModel
from rmt_trt.model.step import model_spec
from rmt_trt.runtime import machine, native
from rmt_trt.runtime.products import products_refusal

LARGEST = 448.0
CHECK = EngineOptions(segments=8, accept_drift=True)
FLOAT, FLOAT8 = TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native()


@pytest.fixture
def backbone() -> Backbone:
    return backbone_of(made("bert").model)


def copied(name: str, path: Path) -> Bundle:
    shutil.copytree(made(name).bundle, path)
    return Bundle(path)


def mapping(keep: frozenset[str] = frozenset(), backbone: Backbone | None = None) -> Mapped:
    chosen = backbone_of(made("bert").model) if backbone is None else backbone
    return mapped(Bundle(made("bert").bundle), ranges_of("bert"), chosen, keep)


def nodes(name: str = "bert") -> list[str]:
    return [product.node for product in read_step(Bundle(made(name).bundle))[1]]


# The operators on the CPU, which the twins are checked with


def computed(op: str, inputs: dict[str, Any], outputs: dict[str, int], **attributes: Any) -> dict[str, np.ndarray]:
    """A node of ours alone. E4M3 goes in and out as bytes, by casts of ONNX Runtime's own."""
    values, made_nodes = [], []
    for name, value in inputs.items():
        kind = FLOAT if value.dtype == np.float32 else FLOAT8
        values.append(helper.make_tensor(name, kind, value.shape, value.tobytes(), raw=True))
    made_nodes.append(helper.make_node(op, list(inputs), list(outputs), domain=native.DOMAIN, **attributes))
    infos = []
    for name, kind in outputs.items():
        shown = name if kind == FLOAT else f"{name}_wide"
        if kind != FLOAT:
            made_nodes.append(helper.make_node("Cast", [name], [shown], to=FLOAT))
        infos.append(helper.make_tensor_value_info(shown, FLOAT, None))
    graph = helper.make_graph(made_nodes, "g", [], infos, values)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(native.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    native.register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(outputs, session.run(None, {}), strict=True))


def in_fp8(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def as_bytes(value: torch.Tensor) -> np.ndarray:
    return value.view(torch.uint8).numpy()


def test_rounding_is_that_of_torch_over_the_whole_range() -> None:
    whole = torch.cat(
        [torch.linspace(-500, 500, 4001), torch.logspace(-12, 9, 2001, base=2), torch.tensor([0.0, -0.0])]
    )
    found = computed("Quantize", {"x": whole.numpy()}, {"y": FLOAT8}, inverse=0.75)["y"]
    assert np.array_equal(found, in_fp8(whole * 0.75).float().numpy())
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[~every.isnan()]
    assert np.array_equal(computed("Quantize", {"x": every.numpy()}, {"y": FLOAT8})["y"], every.numpy())


def test_products_multiply_what_was_rounded_and_round_their_results() -> None:
    torch.manual_seed(0)
    x, weight, bias = in_fp8(torch.randn(11, 48) * 30), in_fp8(torch.randn(32, 48) * 90), torch.randn(32)
    exact = x.float() @ weight.float().T / 500 + bias
    inputs = {"x": as_bytes(x), "w": as_bytes(weight), "b": bias.numpy()}
    plain = computed("Linear", inputs, {"y": FLOAT}, transposed=1, scale=1 / 500)["y"]
    np.testing.assert_allclose(plain, exact.numpy(), rtol=1e-5, atol=1e-4)
    more = inputs | {"inverse": np.array([20], np.float32)}
    low = computed("LinearQuantize", more, {"y": FLOAT8}, transposed=1, scale=1 / 500, activation="gelu")["y"]
    wanted = in_fp8(torch.nn.functional.gelu(exact, approximate="tanh") * 20).float().numpy()
    assert np.mean(low == wanted) > 0.98  # sums in another order fall on the other side of a few borders
    np.testing.assert_allclose(low, wanted, rtol=0.13, atol=2**-9)


def test_norms_give_their_result_and_the_same_rounded() -> None:
    torch.manual_seed(0)
    x, skip, gamma, beta = (torch.randn(*shape) for shape in ((5, 40), (5, 40), (40,), (40,)))
    inputs = {"x": x.numpy(), "s": skip.numpy(), "g": gamma.numpy(), "b": beta.numpy()}
    found = computed("SkipLayerNormQuantize", inputs, {"y": FLOAT, "q": FLOAT8}, epsilon=1e-3, inverse=50.0)
    exact = torch.nn.functional.layer_norm(x + skip, (40,), gamma, beta, 1e-3)
    np.testing.assert_allclose(found["y"], exact.numpy(), rtol=1e-5, atol=1e-5)
    assert np.array_equal(found["q"], in_fp8(torch.from_numpy(found["y"]) * 50).float().numpy())


def test_gated_activations_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 32) * 4
    exact = torch.nn.functional.silu(x[..., :16]) * x[..., 16:]
    plain = computed("SiluMul", {"x": x.numpy()}, {"y": FLOAT})["y"]
    np.testing.assert_allclose(plain, exact.numpy(), rtol=1e-5, atol=1e-6)
    low = computed("SiluMulQuantize", {"x": x.numpy()}, {"y": FLOAT8}, inverse=9.0)["y"]
    assert np.array_equal(low, in_fp8(torch.from_numpy(plain) * 9).float().numpy())


@pytest.mark.parametrize("repeat", [0, 1])
def test_rotary_positions_turn_queries_and_keys_by_their_place(repeat: int) -> None:
    torch.manual_seed(0)
    heads, groups, size, length = 4, 2, 16, 5
    rows = torch.randn(3, length, heads + 2 * groups, size)
    angles = torch.arange(length)[:, None] / 10 ** torch.linspace(0, 2, size // 2)
    halves = torch.complex(rows[..., : size // 2], rows[..., size // 2 :]) * torch.exp(1j * angles)[:, None]
    turned = torch.cat([halves.real, halves.imag], dim=-1)
    inputs = {"x": rows.flatten(2), "c": angles.cos(), "s": angles.sin()}
    found = computed(
        "Rotary", {name: value.numpy() for name, value in inputs.items()}, {"q": FLOAT, "k": FLOAT, "v": FLOAT},
        heads=heads, kv_heads=groups, repeat=repeat,
    )  # fmt: skip
    wanted = {"q": turned[:, :, :heads], "k": turned[:, :, heads:-groups], "v": rows[:, :, -groups:]}
    for name, value in wanted.items():
        value = value.repeat_interleave(2, 2) if repeat and name != "q" else value
        np.testing.assert_allclose(found[name], value.flatten(2).numpy(), rtol=1e-5, atol=1e-5)


# Which product gets which threshold


def test_thresholds_are_what_the_models_own_layers_read() -> None:
    model: Any = made("bert").model
    seen: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, arguments: Any) -> None:
            seen[name] = max(seen.get(name, 0.0), float(arguments[0].abs().max()))

        return hook

    handles = []
    for number, layer in enumerate(model.backbone.bert.encoder.layer):
        for name, module in (
            ("qkv", layer.attention.self.key), ("out", layer.attention.output.dense),
            ("up", layer.intermediate.dense), ("down", layer.output.dense),
        ):  # fmt: skip
            handles.append(module.register_forward_pre_hook(watch(f"layer{number}.{name}")))
    found = mapping().thresholds
    with torch.no_grad():
        memory = model.memory[None]
        for start in range(0, 4 * S, S):
            memory = model(memory, torch.from_numpy(made("bert").document(5 * S, 1)[None, start : start + S]))[0]
    for handle in handles:
        handle.remove()
    assert found.keys() == seen.keys()
    for name, largest in seen.items():  # the ranges are of these segments and of others like them
        assert 0.5 * found[name] < largest < 1.3 * found[name], name
    assert len(set(found.values())) == len(found)


def test_layers_in_another_order_are_noticed(backbone: Backbone) -> None:
    with pytest.raises(FormatError, match=r"other weights where layer0.qkv was expected"):
        mapping(backbone=replace(backbone, layers=backbone.layers[::-1]))
    first, *rest = backbone.layers
    turned = replace(first, query=first.key, key=first.query)
    with pytest.raises(FormatError, match=r"other weights where layer0.qkv was expected"):
        mapping(backbone=replace(backbone, layers=(turned, *rest)))
    with pytest.raises(FormatError, match=r"other weights where layer2.qkv was expected"):
        mapping(backbone=replace(backbone, layers=(*backbone.layers, first)))


def test_a_weight_that_differs_in_its_last_bit_is_noticed(backbone: Backbone) -> None:
    first, *rest = backbone.layers
    weight = first.down.weight.detach().clone()
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    changed = replace(first, down=replace(first.down, weight=weight))
    with pytest.raises(FormatError, match=r"other weights where layer0.down"):
        mapping(backbone=replace(backbone, layers=(changed, *rest)))


def test_products_that_are_kept_have_no_threshold() -> None:
    names = nodes()
    plain, found = mapping(), mapping(frozenset({names[1], names[10]}))
    assert set(plain.thresholds) - set(found.thresholds) == {"layer0.qkv", "layer1.up"}
    assert set(found.kept) - set(plain.kept) == {*names[:3], names[10]}
    assert set(plain.kept) == set(names[12:])  # the head's
    with pytest.raises(ContractError, match="'down' is no product of this step"):
        mapping(frozenset({"down"}))
    with pytest.raises(ContractError, match=r"no product of .* is left for FP8"):
        mapping(frozenset(names[:12]))


# The graphs


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    require_native()
    path = tmp_path_factory.mktemp("fp8") / "bert.rmt"
    copied("bert", path)
    add_static(path, ranges_of("bert"), "cuda", "fp8", {nodes()[3]}, options=CHECK, record={"mix": {"kept": ["a"]}})
    return Bundle(path)


def test_every_role_and_head_is_listed_and_needs_our_operators(bundle: Bundle) -> None:
    entries = [graph for graph in bundle.manifest.graphs if (graph.engine, graph.dtype) == ("cuda", "fp8")]
    assert {(graph.role, graph.head, graph.min_batch) for graph in entries} == {
        (role, head, batch) for role, batch in (("full", 1), ("full", 8), ("step", 1)) for head in ("none", "all")
    }
    assert {graph.needs for graph in entries} == {("native",)}
    assert {graph.data for graph in entries} == {("graphs/cuda-fp8.data",)}
    with pytest.raises(EngineError, match="bundle holds no fp8 graph"):
        RMTRuntime(bundle.path, engine="cpu", dtype="fp8")


def test_products_hold_rounded_weights_and_the_scales_of_the_ranges(bundle: Bundle) -> None:
    entry = bundle.graph("cuda", "fp8", "none", "full", needs=("native",))
    assert entry is not None
    graph = onnx.load(str(bundle.graph_path(entry))).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    low = [
        node for node in graph.node if node.op_type.startswith("Linear") and weights[node.input[1]].data_type == FLOAT8
    ]
    assert len(low) == 11
    assert sum(node.op_type == "LinearQuantize" for node in low) == 2
    kept = [node for node in graph.node if node.op_type == "Linear" and node not in low]
    assert [node.input[1] for node in kept] == ["layer0.out.weight"]
    assert weights["layer0.out.weight"].data_type == TensorProto.FLOAT16
    node = next(node for node in low if "layer1.up" in node.input[1])
    matrix = made("bert").model.backbone.bert.encoder.layer[1].intermediate.dense.weight.detach()
    step = float(matrix.abs().max()) / LARGEST
    stored = np.frombuffer(weights[node.input[1]].raw_data, np.uint8).reshape(matrix.shape)
    assert np.array_equal(stored, as_bytes(in_fp8(matrix / step)))
    scale = next(item.f for item in node.attribute if item.name == "scale")
    assert scale == pytest.approx(step * mapping().thresholds["layer1.up"] / LARGEST, rel=1e-6)


def test_twins_follow_the_recurrence_and_are_rounded_indeed(bundle: Bundle) -> None:
    record = bundle.manifest.verification["engines"]["cuda"]["fp8"]
    assert record["plain"] is None
    assert record["fused"]["FP8 product"] == 11
    assert record["verified_on"] == "cpu"
    assert record["unverified"]
    found = record["verification"]
    assert found["segments"] == 8
    assert 1e-3 < found["worst"] < 0.3
    assert found["agreement"] >= 0.8
    kept = record["quantization"]
    assert kept["kept"] == [nodes()[3], *nodes()[12:]]
    assert kept["mix"] == {"kept": ["a"]}
    assert not {"emulated", "untried"} & set(kept)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"half": False}, "is to stay float32"),
        ({"rescale": True}, "channels are rescaled"),
        ({}, "these are parallel"),
    ],
)
def test_what_cannot_be_fused_is_rounded_and_says_why(
    options: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied("bert", tmp_path / "m.rmt").path
    if not options:
        parallel = replace(backbone_of(made("bert").model), parallel=True)
        monkeypatch.setattr(fused, "backbone_of", lambda model: parallel)
    if options.get("rescale"):
        first = read_step(Bundle(path))[1][0].activation
        options = {"rescale": {first: np.ones(32, np.float32)}}
    add_static(path, ranges_of("bert"), "cuda", "fp8", options=EngineOptions(segments=0), **options)
    (entry,) = [graph for graph in Bundle(path).manifest.graphs if graph.engine == "cuda"]
    assert entry.needs == ()
    assert (entry.role, entry.head) == ("step", "all")
    record = Bundle(path).manifest.verification["engines"]["cuda"]["fp8"]["quantization"]
    assert record["emulated"].startswith("rounded, and multiplied in float")
    assert reason in record["emulated"]
    assert "never run on a GPU" in record["untried"]


@pytest.mark.parametrize(("name", "products"), [("gpt2", 12), ("llama", 8)])
def test_decoders_multiply_in_fp8_too(name: str, products: int, tmp_path: Path) -> None:
    path = copied(name, tmp_path / "m.rmt").path
    made_of = add_static(path, ranges_of(name), "cuda", "fp8", options=replace(CHECK, segments=3))
    assert made_of.plain is None
    assert made_of.fused["FP8 product"] == products
    assert made_of.report is not None
    worst = made_of.report.to_json()["worst"]
    assert 1e-3 < worst < 0.4
    assert {graph.head for graph in made_of.entries} == {"none", "last", "all", "loglik"}


def test_query_key_and_value_packed_head_by_head_are_recognised(tmp_path: Path) -> None:
    """As a GPT-NeoX has them, here of layers that follow one another."""
    model = make_model("gpt_neox", backbone={"use_parallel_residual": False})
    path = tmp_path / "m.rmt"
    export_model(LoadedModel(model, model_spec(model), None), path, ExportOptions(segments=3))
    document = random_document(model_spec(model), 3 * S, 0)
    ranges = collect(path, [Source("one", lambda: document)], CollectOptions(draws=1, threads=1))
    made_of = add_static(path, ranges, "cuda", "fp8", options=replace(CHECK, segments=3))
    assert (made_of.plain, made_of.fused["FP8 product"]) == (None, 8)
    assert made_of.report is not None
    assert made_of.report.to_json()["worst"] < 0.4


def test_a_gate_of_another_activation_is_multiplied_in_fp8_apart(tmp_path: Path) -> None:
    model = make_model("llama", backbone={"hidden_act": "gelu"})
    thresholds = {f"layer{number}.{name}": 1.0 for number in range(2) for name in ("qkv", "out", "up", "down")}
    made = fused.fused_graphs(model, model_spec(model), "fp8", tmp_path, native=fused.Native(thresholds=thresholds))
    for entry in made.entries:
        if entry.head == "none":
            graph = onnx.load(tmp_path / entry.file, load_external_data=False).graph
            used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
            assert [node.op_type for node in graph.node if not used & set(node.output)] == []
            operators = [node.op_type for node in graph.node]
            assert (operators.count("Linear"), operators.count("MatMul")) == (2 * 5, 0)


@pytest.mark.gpu
def test_a_gpu_that_has_fp8_runs_the_graphs_as_their_twins_say(tmp_path: Path) -> None:
    require_gpu()
    path = tmp_path / "memorize.rmt"
    shutil.copytree(example_bundle(), path)
    spec = Bundle(path).spec
    ids = random_document(spec, 6 * spec.segment_length, 1)
    found = collect(path, [Source("random", lambda: ids)], CollectOptions())
    made_of = add_static(path, found, "cuda", "fp8", options=replace(CHECK, segments=16))
    assert made_of.verified_on is None
    assert made_of.report is not None
    assert made_of.report.agreement >= 0.9
    assert 1e-3 < made_of.report.to_json()["worst"] < 0.3
    with RMTRuntime(path, engine="cuda", dtype="fp8") as runtime:
        tokens = [random_document(spec, length, 2) for length in (3 * spec.segment_length, 5, spec.segment_length + 1)]
        together = runtime.run(tokens)
        for row, document in enumerate(tokens):
            alone = runtime.run(document)
            assert relative_error(together.memory[row], alone.memory) < 0.2


# What is refused


def test_ranges_of_another_model_are_refused(tmp_path: Path) -> None:
    path = copied("bert", tmp_path / "m.rmt").path
    with pytest.raises(FormatError, match="from a model with fingerprint 000000000000"):
        add_static(path, replace(ranges_of("bert"), fingerprint="0" * 64), "cuda", "fp8", options=CHECK)
    lacking = replace(ranges_of("bert"), tensors=dict(list(ranges_of("bert").tensors.items())[1:]))
    with pytest.raises(FormatError, match="there is no range of the tensor"):
        add_static(path, lacking, "cuda", "fp8", options=CHECK)
    assert not any(graph.engine == "cuda" for graph in Bundle(path).manifest.graphs)


def test_without_the_library_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied("bert", tmp_path / "m.rmt").path
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(EngineError, match=r"made of rmt-trt's own operators, and .* C compiler"):
        add_static(path, ranges_of("bert"), "cuda", "fp8", options=CHECK)
    assert not any(graph.engine == "cuda" for graph in Bundle(path).manifest.graphs)


def test_a_gpu_without_fp8_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "capability", lambda device: 80)
    with (
        host_gpu(),
        pytest.raises(EngineError, match=r"fp8 products take compute capability 8.9 or higher, .* has 8.0"),
    ):
        RMTRuntime(bundle.path, engine="cuda", dtype="fp8")
    assert products_refusal("fp8", 75)
    assert products_refusal("int8", 60)
    assert not any(products_refusal("fp8", value) for value in (89, 90, 100, 120, 999))
    assert not any(products_refusal(dtype, 75) for dtype in ("fp16", "fp32", None))
