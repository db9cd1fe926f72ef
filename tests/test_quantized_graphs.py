"""Quantized graphs: every kind runs on the CPU and follows fp32 along a recurrence; what is in them; what is refused."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from models import VOCAB, WIDTH, S, made
from onnx import TensorProto
from quantized import STATIC, WITHOUT_DATA, check_near, check_padding, ranges_of, written
from spoil import put
from steps import TWO_STATES, GatedStep

from rmt_trt import ContractError, EngineError, FormatError, RMTRuntime
from rmt_trt.bundle import Bundle
from rmt_trt.calibration import FP8, INT8, UINT8_INT8, add_static, add_without_data, static_graph
from rmt_trt.calibration import tables as table_module
from rmt_trt.calibration.half import in_half
from rmt_trt.calibration.products import products
from rmt_trt.calibration.step_graph import drop_unused
from rmt_trt.calibration.tables import quantized_rows, tables
from rmt_trt.calibration.weights import weights_graph
from rmt_trt.commands import calibrate as command
from rmt_trt.commands.report import engine_record, record_lines
from rmt_trt.contract import QUANTIZED
from rmt_trt.export import EngineOptions, ExportOptions, export_step_bundle
from rmt_trt.export.verify import relative_error

MODELS = ("bert", "gpt2", "llama")
WRONG = np.zeros(0)
KINDS = (*STATIC, *WITHOUT_DATA)


def values_of(model: Any) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def kernels(path: Path, folder: Path) -> Counter[str]:
    """How often each operator stands in what ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_graph_follows_fp32_over_many_segments_and_leaves_rows_of_padding_alone(
    name: str, kind: str, tmp_path: Path
) -> None:
    entry = written(name, kind, tmp_path / "g.onnx")
    assert (entry.file, entry.engine, entry.role, entry.head, entry.opset) == ("g.onnx", "cpu", "step", "all", 20)
    assert entry.dtype == (STATIC[kind].dtype if kind in STATIC else kind)
    onnx.checker.check_model(onnx.load(tmp_path / "g.onnx"))
    assert check_near(name, tmp_path / "g.onnx", entry.dtype) > 1e-4, "it is the fp32 graph"
    check_padding(name, tmp_path / "g.onnx")


@pytest.mark.parametrize("factor", [1 / 50, 200])
@pytest.mark.parametrize("kind", STATIC)
def test_a_wrong_range_is_noticed(kind: str, factor: float, tmp_path: Path) -> None:
    good = ranges_of("gpt2")
    wrong = {name: replace(tensor, threshold=tensor.threshold * factor) for name, tensor in good.tensors.items()}
    static_graph(made("gpt2").bundle, replace(good, tensors=wrong), tmp_path / "g.onnx", STATIC[kind])
    if factor > 1 and STATIC[kind].dtype == "fp8":  # floating point: its steps are as fine far below the largest
        check_near("gpt2", tmp_path / "g.onnx", "fp8")
        return
    with pytest.raises(AssertionError, match=r"the memory is off by|of the answers are those of fp32"):
        check_near("gpt2", tmp_path / "g.onnx", STATIC[kind].dtype)


@pytest.mark.parametrize(
    ("kind", "weight", "activation"),
    [
        ("uint8 and int8", TensorProto.INT8, (TensorProto.UINT8, 128, 127.5)),
        ("int8", TensorProto.INT8, (TensorProto.INT8, 0, 127)),
        ("fp8", TensorProto.FLOAT8E4M3FN, (TensorProto.FLOAT8E4M3FN, 0, 448)),
    ],
)
def test_scales_are_symmetric_and_the_whole_range_is_used(
    kind: str, weight: int, activation: tuple[int, int, float], tmp_path: Path
) -> None:
    written("llama", kind, tmp_path / "g.onnx")
    model, kept = onnx.load(tmp_path / "g.onnx"), ranges_of("llama")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    values = values_of(model)
    weights = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values]
    assert len(weights) == len(products(onnx.load(made("llama").bundle / "step.onnx"), made("llama").spec)) > 10
    for node in weights:
        stored, scale, zero = (values[name] for name in node.input)
        assert types[node.input[0]] == weight
        assert not zero.astype(np.float32).any()
        assert scale.shape == (() if weight == TensorProto.FLOAT8E4M3FN else stored.shape[1:])
        largest = np.abs(stored.astype(np.float32)).max(axis=0 if scale.shape else None)
        assert (largest == activation[2] if weight == TensorProto.FLOAT8E4M3FN else largest == 127).all()
    inputs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for node in inputs:
        assert types[node.input[2]] == activation[0]
        assert float(values[node.input[2]].astype(np.float32)) == activation[1]
        assert values[node.input[1]] == pytest.approx(kept.tensors[node.input[0]].threshold / activation[2], rel=1e-5)


def test_what_is_not_quantized_is_float16_but_for_norms_and_inputs(tmp_path: Path) -> None:
    written("llama", "fp8 in float16", tmp_path / "g.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "g.onnx"))
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    assert [kinds[name] for name in ("memory", "new_memory", "logits")] == [TensorProto.FLOAT] * 3
    makers = {name: node for node in graph.node for name in node.output}
    quantized = [n for n in graph.node if n.op_type == "MatMul" and makers[n.input[0]].op_type == "DequantizeLinear"]
    assert {kinds[node.output[0]] for node in quantized} == {TensorProto.FLOAT16}
    assert {kinds[node.input[0]] for node in graph.node if node.op_type == "Softmax"} == {TensorProto.FLOAT16}
    for operator in ("Pow", "ReduceMean", "Sqrt", "Cos", "Sin"):
        assert {kinds.get(node.output[0]) for node in graph.node if node.op_type == operator} == {TensorProto.FLOAT}


def test_norms_survive_activations_that_float16_cannot_square(tmp_path: Path) -> None:
    """The mean of squares of 1000 is beyond float16."""
    x = onnx.helper.make_tensor_value_info("memory", TensorProto.FLOAT, ["b", 4, 8])
    y = onnx.helper.make_tensor_value_info("new_memory", TensorProto.FLOAT, ["b", 4, 8])
    ids = onnx.helper.make_tensor_value_info("segment", TensorProto.INT64, ["b", "s"])
    make = onnx.helper.make_node
    nodes = [
        make("Pow", ["memory", "two"], ["squares"], "pow"), make("ReduceMean", ["squares", "last"], ["mean"], "mean"),
        make("Add", ["mean", "epsilon"], ["some"], "add"), make("Sqrt", ["some"], ["root"], "sqrt"),
        make("Div", ["memory", "root"], ["new_memory"], "div"),
    ]  # fmt: skip
    constants = [("two", np.float32(2)), ("epsilon", np.float32(1e-6)), ("last", np.array([2]))]
    initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants]
    graph = onnx.helper.make_graph(nodes, "step", [x, ids], [y], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    half = in_half(model, made("bert").spec.with_(states=(replace(made("bert").spec.states[0], shape=(4, 8)),)))
    session = onnxruntime.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"memory": np.full((1, 4, 8), 1000, np.float32), "segment": np.zeros((1, 3), np.int64)}
    np.testing.assert_allclose(session.run(None, feeds)[0], 1, rtol=1e-2)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of GPT-2 whose head is the transpose of its table in the graph itself, as it is where both are large."""
    path = Path(shutil.copytree(made("gpt2").bundle, tmp_path_factory.mktemp("tied") / "gpt2.rmt"))
    model = onnx.load(path / "step.onnx")
    values = values_of(model)
    (head,) = (
        n for n in model.graph.node if n.op_type == "MatMul" and values.get(n.input[1], WRONG).shape == (WIDTH, VOCAB)
    )
    (table,) = (name for name, value in values.items() if value.shape == (VOCAB, WIDTH))
    np.testing.assert_array_equal(values[head.input[1]].T, values[table])
    model.graph.node.insert(0, onnx.helper.make_node("Transpose", [table], ["turned"], "turn", perm=[1, 0]))
    head.input[1] = "turned"
    drop_unused(model.graph)
    put(path, "step.onnx", model.SerializeToString())
    return path


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_tables_become_rows_of_int8_and_a_tied_head_multiplies_by_the_same_rows(
    name: str, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tied if name == "gpt2" else made(name).bundle
    step = onnx.load(bundle / "step.onnx")
    assert tables(step) == (), "small tables are left alone"
    monkeypatch.setattr(table_module, "LEAST_BYTES", 1 << 13)
    (table,) = tables(step)
    assert bool(table.heads) == (name == "gpt2")
    static_graph(bundle, ranges_of(name), tmp_path / "g.onnx", UINT8_INT8)
    values = values_of(onnx.load(tmp_path / "g.onnx"))
    assert table.name not in values
    rows, scales = values[f"{table.name}_rows"], values[f"{table.name}_scales"]
    assert (rows.dtype, rows.shape, scales.shape) == (np.int8, values_of(step)[table.name].shape, (len(rows), 1))
    assert not any(np.array_equal(value, rows.T) for value in values.values()), "a second copy"
    assert kernels(tmp_path / "g.onnx", tmp_path)["DynamicQuantizeMatMul"] == len(table.heads)
    check_near(name, tmp_path / "g.onnx", "int8")
    check_padding(name, tmp_path / "g.onnx")
    for kept in (table.name, *table.heads):
        static_graph(bundle, ranges_of(name), tmp_path / "k.onnx", UINT8_INT8, keep={kept})
        assert table.name in values_of(onnx.load(tmp_path / "k.onnx"))
    static_graph(bundle, ranges_of(name), tmp_path / "t.onnx", INT8)
    assert table.name in values_of(onnx.load(tmp_path / "t.onnx")), "TensorRT takes int8 from Q/DQ alone"


def test_a_row_is_off_by_half_a_step_at_most_and_zeros_stay_zeros() -> None:
    table = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32) * np.logspace(-6, 3, 50)[:, None]
    table[3] = 0
    rows, scales = quantized_rows(table.astype(np.float32))
    assert (np.abs(rows * scales - table) <= 0.5001 * scales).all()
    assert (np.abs(rows).max(axis=1) == 127)[np.arange(50) != 3].all()
    assert not rows[3].any()


def test_dynamic_products_are_integer_kernels_and_those_of_attention_are_not(tmp_path: Path) -> None:
    written("gpt2", "int8-dynamic", tmp_path / "g.onnx")
    chosen = len(products(onnx.load(made("gpt2").bundle / "step.onnx"), made("gpt2").spec))
    found = kernels(tmp_path / "g.onnx", tmp_path)
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == chosen
    assert found["MatMul"] + found["FusedMatMul"] == 2 * 2, "two of attention in each layer"


@pytest.mark.parametrize(("dtype", "bits"), [("int8-weights", 8), ("int4-weights", 4)])
def test_weights_alone_are_in_blocks_of_32(
    dtype: str, bits: int, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "LEAST_BYTES", 1 << 13)
    weights_graph(tied, tmp_path / "g.onnx", dtype)
    model = onnx.load(tmp_path / "g.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    chosen = products(onnx.load(tied / "step.onnx"), made("gpt2").spec)
    assert len(nodes) == len(chosen) + 1, "the tied head has weights of its own"
    for node in nodes:
        given = {item.name: item.i for item in node.attribute}
        assert (given["bits"], given["block_size"], len(node.input)) == (bits, 32, 3), "symmetric: no zero points"
    check_near("gpt2", tmp_path / "g.onnx", dtype)


def test_what_is_kept_stays_and_what_is_rescaled_computes_the_same(tmp_path: Path) -> None:
    this, ranges = made("bert"), ranges_of("bert")
    found = products(onnx.load(this.bundle / "step.onnx"), this.spec)
    first, second = found[0], next(product for product in found if product.activation != found[0].activation)
    static_graph(this.bundle, ranges, tmp_path / "k.onnx", INT8, keep={first.node})
    kept = next(node for node in onnx.load(tmp_path / "k.onnx").graph.node if node.name == first.node)
    assert list(kept.input) == [first.activation, first.weight]
    width = len(values_of(onnx.load(this.bundle / "step.onnx"))[second.weight])
    factors = 2.0 ** np.random.default_rng(0).integers(-2, 3, width)
    tensor = ranges.tensors[second.activation]
    wide = {**ranges.tensors, second.activation: replace(tensor, threshold=tensor.threshold / factors.min())}
    rescale = {second.activation: factors.astype(np.float32)}
    static_graph(this.bundle, replace(ranges, tensors=wide), tmp_path / "r.onnx", INT8, rescale=rescale)
    check_near("bert", tmp_path / "r.onnx", "int8")
    ones = {name: np.ones_like(value) for name, value in rescale.items()}
    static_graph(this.bundle, ranges, tmp_path / "1.onnx", INT8, rescale=ones)
    static_graph(this.bundle, ranges, tmp_path / "p.onnx", INT8)
    document = this.document(3 * S)
    with RMTRuntime(tmp_path / "1.onnx", threads=1) as one, RMTRuntime(tmp_path / "p.onnx", threads=1) as plain:
        assert relative_error(one.run(document).memory, plain.run(document).memory) < 1e-5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": {"nothing"}}, "'nothing' is no product of this step that could be quantized; expected names such as"),
        ({"keep": "all"}, r"all \d+ products are to stay in float32; there is nothing left to quantize"),
        ({"rescale": {"nothing": np.ones(32)}}, "'nothing' is to be rescaled, and no quantized product reads it"),
        ({"rescale": {"first": np.ones(31)}}, r"is to be rescaled by an array of shape \(31,\); expected \(32,\)"),
        ({"rescale": {"first": np.zeros(32)}}, "finite and above 0"),
    ],
)
def test_names_and_factors_that_the_step_does_not_have_are_refused(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    found = products(onnx.load(made("gpt2").bundle / "step.onnx"), made("gpt2").spec)
    if given.get("keep") == "all":
        given = {"keep": {product.node for product in found}}
    if "first" in given.get("rescale", {}):
        given = {"rescale": {found[0].activation: given["rescale"]["first"]}}
    with pytest.raises(ContractError, match=message):
        static_graph(made("gpt2").bundle, ranges_of("gpt2"), tmp_path / "g.onnx", FP8, **given)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of a classifier's bundle, to be added to."""
    return Path(shutil.copytree(made("bert").bundle, tmp_path / "bert.rmt"))


def test_graphs_are_listed_with_how_they_were_made_and_taken_only_where_they_are_asked_for(bundle: Path) -> None:
    few = EngineOptions(segments=3)
    node = products(onnx.load(bundle / "step.onnx"), made("bert").spec)[0].node
    for dtype in ("int8", "fp8"):
        made_here = add_static(
            bundle, ranges_of("bert"), dtype=dtype, keep={node}, options=few, record={"why": "a test"}
        )
        assert made_here.verified_on is None
    for dtype in WITHOUT_DATA:
        add_without_data(bundle, "cpu", dtype, options=few)
    listed = {(graph.engine, graph.dtype) for graph in Bundle(bundle).manifest.graphs}
    assert listed == {("cpu", dtype) for dtype in ("fp32", *QUANTIZED)}
    record = engine_record(Bundle(bundle).manifest, "cpu", "int8")["quantization"]
    assert (record["kept"], record["why"], record["weights"], record["activations"]) == (
        [node],
        "a test",
        "int8",
        "uint8",
    )
    assert any(f"kept, 1: {node}" in line for line in record_lines("cpu", "int8", {"quantization": record}))
    document = made("bert").document(3 * S)
    with RMTRuntime(bundle, threads=1) as plain:
        assert plain.dtype == "fp32"
        right = plain.run(document).memory
    errors = []
    for dtype in QUANTIZED:
        with RMTRuntime(bundle, engine="cpu", dtype=dtype, threads=1) as runtime:
            assert runtime.dtype == dtype
            errors.append(relative_error(runtime.run(document).memory, right))
    assert len(set(errors)) == len(QUANTIZED)
    assert min(errors) > 1e-4


@pytest.mark.parametrize(("engine", "dtype"), [("tensorrt-rtx", "fp8"), ("tensorrt", "int8"), ("cuda", "int4-weights")])
def test_a_graph_for_an_engine_that_cannot_run_here_is_verified_on_the_cpu(
    engine: str, dtype: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    few = EngineOptions(segments=3)
    if dtype in WITHOUT_DATA:
        add_without_data(bundle, engine, dtype, options=few)
    else:
        add_static(bundle, ranges_of("bert"), engine, dtype, options=few)
    record = engine_record(Bundle(bundle).manifest, engine, dtype)
    assert record["verified_on"] == "cpu"
    assert record["verification"]["passed"]
    assert record["verification"]["agreement"] >= 0.99
    assert record["unverified"]
    assert "untried" not in record["quantization"]
    assert "stage.rmt" not in record["unverified"]
    assert Bundle(bundle).graph(engine, dtype) is not None
    assert Bundle(bundle).graph("cpu", dtype) is None
    assert "that was engine cpu; not on its own" in "".join(record_lines(engine, dtype, record))
    with pytest.raises(EngineError, match=f"the bundle holds no {dtype} graph for it"):
        RMTRuntime(bundle, engine="cpu", dtype=dtype)


def test_a_step_of_the_users_own_is_quantized_for_the_cpu_and_not_for_cuda(tmp_path: Path) -> None:
    path = tmp_path / "gated.rmt"
    export_step_bundle(GatedStep(), TWO_STATES, path, options=ExportOptions(segments=2))
    added = add_without_data(path, "cpu", "int8-dynamic", options=EngineOptions(segments=3, accept_drift=True))
    assert added.report is not None
    assert added.report.reference == "fp32 graph on the CPU"
    with pytest.raises(FormatError, match=r"a step of the user's own.* Take --engine cpu"):
        add_without_data(path, "cuda", "int8-weights")


USAGE = {
    "engine": (["--dtype", "int8-dynamic", "--engine", "tensorrt"], "no 'int8-dynamic' graph is made for engine 'tensorrt'; for 'tensorrt' there are int8, fp8"),
    "weights": (["--dtype", "int4-weights", "--engine", "tensorrt-rtx"], "no 'int4-weights' graph is made for engine 'tensorrt-rtx'"),
    "torch": (["--task", "detect", "--engine", "torch"], "no 'int8' graph is made for engine 'torch'; quantized graphs are for cpu, tensorrt, tensorrt-rtx, cuda"),
    "half": (["--dtype", "fp16", "--engine", "cuda"], "no 'fp16' graph is made for engine 'cuda'; for 'cuda' there are fp8, int8-weights, int4-weights"),
    "int8": (["--dtype", "int8", "--engine", "cuda", "--ranges", "gpt2.json"], "no INT8 products of Q/DQ graphs. What multiplies in 8 bits there is fp8; int8 is for engines tensorrt, tensorrt-rtx and cpu"),
    "int8 of a task": (["--engine", "cuda", "--task", "detect"], "no 'int8' graph is made for engine 'cuda'"),
    "data": (["--dtype", "int8-dynamic", "--data", "a.npy"], "an int8-dynamic graph reads no data, and --data was given. Leave it out"),
    "ranges": (["--dtype", "int4-weights", "--ranges", "r.json"], "an int4-weights graph reads no data, and --ranges was given"),
    "nothing": (["--dtype", "fp8", "--engine", "cuda"], "nothing to calibrate with was given"),
    "other": (["--ranges", "gpt2.json", "--dtype", "fp8"], "the ranges were taken from a model with fingerprint"),
    "rest": (["--task", "detect", "--engine", "tensorrt", "--rest", "bf16"], "--rest is 'bf16'; expected fp16 or fp32"),
    "rest of none": (["--dtype", "int8-dynamic", "--rest", "fp32"], "--rest is for int8 and fp8, graphs with ranges"),
    "rest on the CPU": (["--task", "detect", "--rest", "fp16"], "--rest fp16 is for the engines of a GPU"),
}  # fmt: skip


@pytest.mark.parametrize("name", USAGE)
def test_the_command_says_in_one_line_which_graphs_there_are(
    name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ranges_of("gpt2").save(tmp_path / "gpt2.json")
    given, message = USAGE[name]
    before = (bundle / "manifest.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["rmt-calibrate", str(bundle), *given])
    with pytest.raises(SystemExit) as ended:
        command.main()
    err = capsys.readouterr().err.strip()
    assert ended.value.code == 1
    assert message in err
    assert "\n" not in err
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_verdict_of_the_engine_itself_takes_the_place_of_the_one_on_the_cpu(bundle: Path) -> None:
    from rmt_trt.bundle import add_files
    from rmt_trt.commands.verify import _record
    from rmt_trt.export.added import recorded

    made_here = add_static(bundle, ranges_of("bert"), options=EngineOptions(segments=3))
    old = {**made_here.to_json(), "verified_on": "cpu", "unverified": "no GPU"}
    add_files(bundle, {}, verification=lambda all_of: recorded(all_of, "cpu", "int8", old))
    assert made_here.report is not None
    _record(bundle, made_here.report)
    record = engine_record(Bundle(bundle).manifest, "cpu", "int8")
    assert "verified_on" not in record
    assert record["unverified"] is None
    assert record["quantization"]["method"].startswith("static, ranges by minmax")
