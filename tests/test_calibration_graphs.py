"""Ranges as a file, and the INT8 graph that they give."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from calibrated import options, sources
from models import S, example_bundle, made
from onnx import TensorProto, helper

from rmt_trt import RMTRuntime, StateSpec, StepSpec
from rmt_trt.bundle import Bundle
from rmt_trt.calibration import UINT8_INT8, Ranges, Source, add_static, collect, compare, load_ranges, static_graph
from rmt_trt.calibration.products import products
from rmt_trt.errors import FormatError, VerificationError
from rmt_trt.export import EngineOptions
from rmt_trt.export.verify import relative_error


@pytest.fixture(scope="module")
def gpt2() -> Ranges:
    return collect(made("gpt2").bundle, sources("gpt2", 12 * S + 3, 5 * S), options())


@pytest.fixture(scope="module")
def example() -> Ranges:
    """Ranges of the trained example, over one of its own documents."""
    from rmt_trt.training.tasks import open_task

    document = open_task("memorize").document(20 * 128 - 5, 7)
    return collect(example_bundle(), [Source("a question", document.pieces)], options(draws=4))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the example's bundle, to be added to."""
    return Path(shutil.copytree(example_bundle(), tmp_path / "memorize.rmt"))


def test_ranges_can_be_read_back_and_compared(gpt2: Ranges, tmp_path: Path) -> None:
    gpt2.save(tmp_path / "ranges.json")
    again = load_ranges(tmp_path / "ranges.json")
    assert again == gpt2
    assert set(compare(gpt2, again).values()) == {1.0}
    name = next(iter(gpt2.tensors))
    wider = replace(gpt2.tensors[name], threshold=3 * gpt2.tensors[name].threshold)
    ratios = compare(gpt2, replace(gpt2, tensors={**gpt2.tensors, name: wider}))
    assert ratios.pop(name) == pytest.approx(3)
    assert set(ratios.values()) == {1.0}
    with pytest.raises(FormatError, match="ranges of two models are compared"):
        compare(gpt2, replace(gpt2, fingerprint="0" * 64))
    with pytest.raises(FormatError, match=f"only one of the two ranges has the tensor '{name}'"):
        compare(gpt2, replace(gpt2, tensors={k: v for k, v in gpt2.tensors.items() if k != name}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "another file": (lambda value: {"format": "x"}, "holds no ranges"),
    "newer": (lambda value: value | {"format_version": 2}, "has format version 2; this rmt-trt reads version 1"),
    "cut": (lambda value: {k: v for k, v in value.items() if k != "tensors"}, "is damaged or was altered"),
    "no tensors": (lambda value: value | {"tensors": {}}, "lacks a known method, a fingerprint or tensors"),
    "nan": (lambda value: value["tensors"].popitem()[1].update(threshold="nan") or value | {"tensors": {"x": 1}}, "is damaged"),
    "crossed": (
        lambda value: value | {"tensors": {"x": {**next(iter(value["tensors"].values())), "late": [2, 1]}}},
        "tensor 'x' has the bounds 2.0 to 1.0",
    ),
    "endless": (
        lambda value: value | {"tensors": {"x": {**next(iter(value["tensors"].values())), "threshold": 1e999}}},
        "tensor 'x' has the threshold inf",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_ranges_are_refused(name: str, gpt2: Ranges, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    gpt2.save(path)
    alter, message = DAMAGE[name]
    path.write_text(json.dumps(alter(json.loads(path.read_text()))))
    with pytest.raises(FormatError, match=message):
        load_ranges(path)


def test_products_on_the_way_of_the_memory_stay_in_float32() -> None:
    """Reading: memory @ W. Writing: x @ W -> new_memory. Neither: x @ W, x @ W + b; no weight: x @ x."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).tobytes(), raw=True)
    nodes = [
        helper.make_node("Transpose", ["memory"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["turned", "w"], ["x"], "reads"),
        helper.make_node("MatMul", ["x", "w"], ["y"], "plain"),
        helper.make_node("Gemm", ["y", "w", "b"], ["z"], "biased", transB=1),
        helper.make_node("Gemm", ["z", "w", "b"], ["u"], "scaled", alpha=0.5),
        helper.make_node("MatMul", ["u", "u"], ["v"], "both"),
        helper.make_node("MatMul", ["v", "w"], ["written"], "writes"),
        helper.make_node("Reshape", ["written", "shape"], ["moved"], "reshape"),
        helper.make_node("Where", ["c", "moved", "memory"], ["new_memory"], "freeze"),
    ]
    graph = helper.make_graph(nodes, "step", [], [], [weight])
    found = products(helper.make_model(graph), StepSpec("custom", (StateSpec(shape=(4,)),), 4, 4, "classifier", 2))
    assert [product.node for product in found] == ["plain", "biased"]


def test_the_graph_has_symmetric_weights_by_channel_and_no_quantized_bias(gpt2: Ranges, tmp_path: Path) -> None:
    this = made("gpt2")
    entry = static_graph(this.bundle, gpt2, tmp_path / "int8.onnx", UINT8_INT8)
    assert (entry.file, entry.engine, entry.dtype, entry.role, entry.data) == ("int8.onnx", "cpu", "int8", "step", ())
    model = onnx.load(tmp_path / "int8.onnx")
    onnx.checker.check_model(model)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in values]
    assert len(weights) == len(products(onnx.load(this.bundle / "step.onnx"), this.spec)) > 4
    for node in weights:
        weight, scale, zero = (values[name] for name in node.input)
        assert weight.dtype == np.int8
        assert scale.shape == weight.shape[1:]
        assert not zero.any()
        assert (np.abs(weight.astype(int)).max(axis=0) == 127).all()
    inputs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for node in inputs:
        assert values[node.input[2]] == 128
        assert values[node.input[1]] == pytest.approx(gpt2.tensors[node.input[0]].threshold / 127.5, rel=1e-5)
    read = {name for node in model.graph.node if node.op_type.endswith("eLinear") for name in node.input}
    assert not read & {"memory", "new_memory"}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_step_in_int8_is_near_the_fp32_step_and_not_the_same(name: str, tmp_path: Path) -> None:
    this, document = made(name), made(name).document(S, 5)
    ranges = collect(this.bundle, sources(name, 6 * S, 6 * S), options())
    static_graph(this.bundle, ranges, tmp_path / "int8.onnx", UINT8_INT8)
    with this.open() as exact, RMTRuntime(tmp_path / "int8.onnx", engine="cpu", threads=1) as rough:
        wanted, found = exact.run(document), rough.run(document)
    for pair in ((found.memory, wanted.memory), (found.logits, wanted.logits)):
        assert 1e-4 < relative_error(*pair) < 0.1


def test_the_example_in_int8_gives_the_answers_of_fp32(example: Ranges, bundle: Path) -> None:
    added = add_static(bundle, example, options=EngineOptions(segments=24))
    assert added.report is not None
    assert added.report.passed
    assert (added.report.needed, added.report.tolerance) == (0.99, None)
    assert 1e-3 < added.report.worst < 0.2
    record = Bundle(bundle).manifest.verification["engines"]["cpu"]["int8"]
    assert record["verification"]["agreement"] == added.report.agreement >= 0.99
    sizes = {name: entry.size for name, entry in Bundle(bundle).manifest.files.items()}
    assert sizes["graphs/cpu-int8-step-all.onnx"] < 0.4 * sizes["step.onnx"]
    with RMTRuntime(bundle, engine="cpu", dtype="int8") as runtime, RMTRuntime(bundle, engine="cpu") as exact:
        assert (runtime.dtype, exact.dtype) == ("int8", "fp32")
        assert relative_error(runtime.run([5] * 300).memory, exact.run([5] * 300).memory) > 1e-4
    again = add_static(bundle, example, options=EngineOptions(segments=2))
    assert [graph for graph in Bundle(bundle).manifest.graphs if graph.dtype == "int8"] == list(again.entries)


def test_a_graph_whose_answers_differ_is_not_added(example: Ranges, bundle: Path) -> None:
    narrow = {name: replace(tensor, threshold=tensor.threshold / 50) for name, tensor in example.tensors.items()}
    bad, before = replace(example, tensors=narrow), (bundle / "manifest.json").read_bytes()
    message = r"engine 'cpu' \(int8\) gives \d+\.\d+% of the PyTorch recurrence's answers, fewer than 99%"
    with pytest.raises(VerificationError, match=message):
        add_static(bundle, bad)
    assert (bundle / "manifest.json").read_bytes() == before
    with pytest.raises(VerificationError, match=r"more than 1.0e-03"):
        add_static(bundle, example, options=EngineOptions(tolerance=1e-3))
    kept = add_static(bundle, bad, options=EngineOptions(accept_drift=True))
    assert kept.to_json()["verification"]["accepted_drift"]


def test_ranges_of_another_model_or_export_are_refused(gpt2: Ranges, example: Ranges, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the ranges were taken from a model with fingerprint"):
        static_graph(example_bundle(), gpt2, tmp_path / "x.onnx", UINT8_INT8)
    first, *others = example.tensors
    with pytest.raises(
        FormatError, match=f"no range of the tensor '{first}': the ranges were taken from another export"
    ):
        static_graph(
            example_bundle(),
            replace(example, tensors={name: example.tensors[name] for name in others}),
            tmp_path / "x.onnx",
            UINT8_INT8,
        )


def test_a_bundle_without_an_int8_graph_says_how_to_add_one() -> None:
    from rmt_trt.errors import EngineError

    with pytest.raises(EngineError, match=r"the bundle holds no int8 graph for it\. Add one with rmt-calibrate"):
        RMTRuntime(example_bundle(), engine="cpu", dtype="int8")
    with pytest.raises(EngineError, match=r"it runs fp32, int8, .*int4-weights graphs, not fp16"):
        RMTRuntime(example_bundle(), engine="cpu", dtype="fp16")
