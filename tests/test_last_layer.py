"""Fused graphs compute, in their last layer and behind attention, only the rows that are read: which these are, that they are
right, and that the FLOPs that are reported count no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnxruntime
import pytest
from hardware import require_native
from models import CLASSES, DECODERS, ENCODERS, VOCAB, M, S

from rmt_trt.benchmarks.limits import needed_flops, step_flops
from rmt_trt.bundle import GraphEntry
from rmt_trt.export.fused import FusedGraphs, Native, fused_graphs
from rmt_trt.export.graph_check import check_graphs
from rmt_trt.export.verify import model_reference, random_document, relative_error
from rmt_trt.model.recurrence import recurrence
from rmt_trt.model.step import RMTModel, model_spec
from rmt_trt.runtime import native

PRODUCTS = ("out", "up", "gate", "gate_up", "down")  # what stands behind attention
LAST = 1  # of the two layers
WHOLE = {"head_dim": 16}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in (*ENCODERS, *DECODERS)),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("llama", WHOLE),
    ("qwen2", {**WHOLE, "model_type": "qwen3"}),
]
IDS = [f"{name} {backbone.get('model_type', '')}{len(backbone)}" for name, backbone in FAMILIES]


def written(model: RMTModel, folder: Path, **options: Any) -> FusedGraphs:
    """All graphs in fp32, those with our own operators as the nodes that they stand for."""
    return fused_graphs(
        model, model_spec(model), "fp32", folder, **{"grouped": True, "beside": True, "by_nodes": True, **options}
    )


def session_of(path: Path, outputs: list[str] | None = None) -> Any:
    """outputs: tensors that it gives too."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    native.register(options)
    if outputs is None:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path, load_external_data=False)
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    widened = path.with_name(f"wide-{path.name}")
    onnx.save(graph, widened)
    return onnxruntime.InferenceSession(widened, options, providers=["CPUExecutionProvider"])


def feeds(model: RMTModel, batch: int) -> dict[str, np.ndarray]:
    spec = model_spec(model)
    segment = np.stack([random_document(spec, S, seed) for seed in range(batch)])
    return {"memory": np.repeat(model.memory.detach().numpy()[None], batch, 0), "segment": segment}


def products(path: Path, given: dict[str, np.ndarray]) -> dict[str, tuple[int, int, int]]:
    """Rows of a document, and sides of the matrix, of each product of a layer ("layer1.up") in a run of a graph."""
    graph = onnx.load(path, load_external_data=False).graph
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    source = {
        part: (node.input[0], len(node.output))
        for node in graph.node
        if node.op_type == "Split"
        for part in node.output
    }
    found = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            weight, parts = source.get(node.input[1], (node.input[1], 1))
            if weight.startswith("layer"):
                part = f".{node.input[1]}" if parts > 1 else ""
                k, n = sizes[weight]
                found[weight.removesuffix(".weight") + part] = (node.output[0], k, n // parts)
    names = [output for output, _, _ in found.values()]
    values = session_of(path, names).run(names, given)
    rows = (value.shape[1] for value in values)
    return {name: (count, k, n) for count, (name, (_, k, n)) in zip(rows, found.items(), strict=True)}


def kept_rows(form: str, head: str) -> int:
    """Memory's and a head's one: without a head too, so that memory is rounded alike whichever graph computes it."""
    return S + 2 * M if form == "decoder" and head in ("all", "loglik") else M + 1


@pytest.mark.parametrize(("name", "backbone"), FAMILIES, ids=IDS)
def test_behind_the_last_attention_only_rows_that_are_read_are_multiplied(
    name: str, backbone: dict[str, Any], tmp_path: Path
) -> None:
    model = models.make_model(name, backbone=backbone)
    graphs, positions = written(model, tmp_path), model.config.positions
    for entry in (*graphs.entries, *graphs.native):
        found, seen = products(tmp_path / entry.file, feeds(model, 2)), set()
        few = kept_rows(model.config.form, entry.head)
        for product, (rows, _, _) in found.items():
            layer, _, kind = product.partition(".")
            cut = kind.partition(".")[0] in PRODUCTS or (kind == "query" and model.config.form == "encoder")
            assert rows == (few if cut and layer == f"layer{LAST}" else positions), (entry.file, product)
            seen.add((layer, kind.partition(".")[0]))
        assert {kind for layer, kind in seen if layer == "layer0"} == {
            kind for layer, kind in seen if layer == "layer1"
        }
        assert len(seen) >= 6


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"backbone": backbone}) for name, backbone in FAMILIES),
    ("bert", {"prefix_ids": ()}),
    ("bert", {"prefix_ids": (2, 3), "num_memory": 1}),
    ("bert", {"backbone": {"num_hidden_layers": 1}}),
    ("gpt2", {"backbone": {"n_layer": 1}, "num_memory": 1}),
    ("llama", {"backbone": {"num_hidden_layers": 1}, "num_memory": 1}),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_every_role_and_head_follows_the_recurrence(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Two documents together, one of which is padding alone after a while, the other with a short segment at its end."""
    model = models.make_model(name, **changes)
    graphs, initial = written(model, tmp_path, beside=False), [model.memory.detach().numpy()]
    check = check_graphs(graphs.entries, tmp_path, model_spec(model), initial, model_reference(model), 5, 1e-4)
    assert 0 < check.largest <= 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox", "llama"])
def test_rows_of_every_length_in_one_batch_are_each_what_they_are_alone(name: str, tmp_path: Path) -> None:
    model = models.make_model(name)
    given = feeds(model, S + 1)
    for count, row in enumerate(given["segment"]):
        row[count:] = -1
    wanted = [next(recurrence(model, row[:count].tolist())) for count, row in enumerate(given["segment"]) if count]
    for entry in written(model, tmp_path, beside=False).entries:
        if entry.role != "step":
            continue
        memory, *answers = session_of(tmp_path / entry.file).run(None, given)
        np.testing.assert_array_equal(memory[0], given["memory"][0])
        for count, (states, logits) in enumerate(wanted, 1):
            assert relative_error(memory[count], states.numpy()) <= 1e-5
            if answers:
                found = answers[0][count]
                right = logits.numpy() if found.shape in ((CLASSES,), (S, VOCAB)) else logits[-1].numpy()
                assert relative_error(found[:count] if found.shape == (S, VOCAB) else found, right) <= 1e-5


def by_use(
    entries: tuple[GraphEntry, ...], folder: Path, given: dict[str, np.ndarray]
) -> dict[tuple[str, str], list[Any]]:
    return {(e.role, e.head): session_of(folder / e.file).run(None, given) for e in entries if e.min_batch == 1}


@pytest.mark.parametrize(
    ("name", "packed", "tolerance"),
    [("bert", False, 1e-5), ("bert", True, 0.05), ("gpt2", False, 1e-5), ("llama", False, 1e-5)],
)
def test_in_fp8_the_kept_rows_are_what_they_are_among_all(
    name: str, packed: bool, tolerance: float, tmp_path: Path
) -> None:
    """A decoder's head over all of the text keeps all rows. An encoder's role "step" cuts behind attention, "full" before;
    query, key and value in one matrix are rounded otherwise than three."""
    require_native()
    model = models.make_model(name)
    thresholds = {f"layer{n}.{product}": 8.0 for n in range(2) for product in ("qkv", "out", "up", "down")}
    made = written(model, tmp_path, beside=False, by_nodes=False, native=Native(thresholds=thresholds, packed=packed))
    found = by_use(made.entries, tmp_path, feeds(model, 3))
    whole = found["step", "all"][0]
    assert all(relative_error(memory, whole) <= tolerance for memory, *_ in found.values())
    if name != "bert":
        last = found["full", "all"][1][:, -1]
        assert all(relative_error(found[role, "last"][1], last) <= 1e-5 for role in ("full", "step"))


def test_the_last_layer_has_no_weights_of_its_own_kind(tmp_path: Path) -> None:
    """All graphs read one file: another cut of a matrix would stand there beside the first."""
    for name in ("bert", "gpt2", "llama"):
        graphs = written(models.make_model(name), tmp_path)
        tensors = {
            tensor.name
            for entry in (*graphs.entries, *graphs.native)
            for tensor in onnx.load(tmp_path / entry.file, load_external_data=False).graph.initializer
        }
        kinds = [{t.partition(".")[2] for t in tensors if t.startswith(f"layer{layer}.")} for layer in range(2)]
        assert kinds[0] == kinds[1]
        assert len(kinds[0]) >= 6


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_needed_flops_are_those_of_the_graph_with_the_fewest(name: str, tmp_path: Path) -> None:
    model = models.make_model(name, **({"prefix_ids": ()} if name == "bert" else {}))  # [CLS] would be one row more
    config, entries = model.config, written(model, tmp_path, beside=False).entries
    entry = [e for e in entries if (e.role, e.head) == ("full", "none")][-1]
    found = products(tmp_path / entry.file, feeds(model, 1))
    in_products = sum(2 * rows * k * n for rows, k, n in found.values())
    p, d, layers = config.positions, config.width, 2
    pairs = p * p + M * p
    if config.form == "decoder":  # the graph does more than is needed: queries of all rows, and the text's last one
        in_products -= 2 * (p - M) * d * d + sum(2 * k * n for rows, k, n in found.values() if rows == M + 1)
        pairs = p * (p + 1) // 2 + sum(range(p - M + 1, p + 1))
    assert needed_flops(config) == in_products + 4 * pairs * d
    assert step_flops(config) * (layers - 1) // layers < needed_flops(config) < step_flops(config)
