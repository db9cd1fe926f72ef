"""Graphs made for an engine are checked before a bundle gets them: wrong fusions, padding, every length, and drift."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import pytest
import torch
from added_graphs import FEW
from models import made
from onnx import numpy_helper
from steps import ONE_STATE, Plain, left_in
from tensorrt_builds import contents

from rmt_trt import RMTRuntime, VerificationError
from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.contract import HEADS
from rmt_trt.export import add_engine_graphs, engine_graphs, export_step, graph_check
from rmt_trt.export.graph_check import check_graphs
from rmt_trt.export.plain import plain_graph
from rmt_trt.export.step_to_onnx import initial_values
from rmt_trt.export.verify import model_reference, step_reference


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """GPT-2's bundle alone in a folder, to add to."""
    return Path(shutil.copytree(made("gpt2").bundle, tmp_path / "work" / "model.rmt"))


def altered_twin(change: Callable[[Path], None]) -> Callable[..., Any]:
    """fused_graphs, after which `change(folder)` alters what it wrote in fp32."""
    real = engine_graphs.fused_graphs

    def write(model: Any, spec: Any, dtype: str, folder: Path, **options: Any) -> Any:
        graphs = real(model, spec, dtype, folder, **options)
        if dtype == "fp32":
            change(folder)
        return graphs

    return write


def wrong_weights(folder: Path) -> None:
    data = np.fromfile(folder / "cuda-fp32.data", np.float32)
    (data * 1.01).astype(np.float32).tofile(folder / "cuda-fp32.data")


def wrong_scale(folder: Path) -> None:
    """Attention of one graph alone scales its scores otherwise: nothing but its own outputs shows it."""
    file = folder / "cuda-fp32-step-loglik.onnx"
    graph = onnx.load(str(file), load_external_data=False)
    attention = next(node for node in graph.graph.node if "Attention" in node.op_type)
    attention.attribute.append(onnx.helper.make_attribute("scale", 0.1))
    onnx.save(graph, str(file))


def rows_mixed(folder: Path) -> None:
    """The new memory of every row is that of the first."""
    file = folder / "cuda-fp32-full-none.onnx"
    graph = onnx.load(str(file), load_external_data=False)
    (last,) = (node for node in graph.graph.node if "new_memory" in node.output)
    last.output[list(last.output).index("new_memory")] = "inner"
    graph.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), "first"))
    shape, where = onnx.helper.make_node("Shape", ["inner"], ["shape"]), ["first_row", "shape"]
    graph.graph.node.extend(
        [
            shape,
            onnx.helper.make_node("Gather", ["inner", "first"], ["first_row"], axis=0),
            onnx.helper.make_node("Expand", where, ["new_memory"]),
        ]
    )
    onnx.save(graph, str(file))


@pytest.mark.parametrize(
    ("change", "graph"),
    [(wrong_weights, "cuda-fp32-full-none"), (wrong_scale, "cuda-fp32-step-loglik"), (rows_mixed, "cuda-fp32-full-none")],
    ids=["weights", "scale of one graph", "rows mixed"],
)  # fmt: skip
def test_a_wrong_fusion_is_found_at_export_and_adds_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], graph: str
) -> None:
    before = contents(bundle)
    monkeypatch.setattr(engine_graphs, "fused_graphs", altered_twin(change))
    with pytest.raises(
        VerificationError, match=rf"graph '{graph}\.onnx', run on the CPU, differs from .*--plain"
    ) as info:
        add_engine_graphs(bundle, "cuda", "fp16", options=replace(FEW, accept_drift=True))
    assert info.value.report["error"] > 1e-4
    assert contents(bundle) == before
    assert left_in(bundle.parent) == ["model.rmt"]


def test_a_check_finds_a_graph_that_changes_the_states_of_a_row_of_padding(tmp_path: Path) -> None:
    class Leaking(Plain):
        def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> Any:
            new, logits = super().forward(memory, segment)
            return new + (segment < 0).all(1)[:, None, None] * 1e-6, logits

    step = Leaking()
    plain_graph(step, ONE_STATE, "fp16", tmp_path / "sound.onnx")  # the wrapper keeps such rows
    entry = replace(plain_graph(step, ONE_STATE, "fp16", tmp_path / "x.onnx"), file="leaking.onnx")
    export_step(step, ONE_STATE, tmp_path / "leaking.onnx")
    values = list(initial_values(step, ONE_STATE, None).values())
    reference = step_reference(step, ONE_STATE, values)
    assert (
        check_graphs([replace(entry, file="sound.onnx")], tmp_path, ONE_STATE, values, reference, 4, 1e-2).largest > 0
    )
    with pytest.raises(VerificationError, match=r"'leaking\.onnx', run on the CPU, differs .* by inf after segment 3"):
        check_graphs([entry], tmp_path, ONE_STATE, values, reference, 4, 1e-2)


def test_of_several_graphs_for_one_use_the_largest_error_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.make_model("gpt2")
    entry = GraphEntry("one.onnx", "full", "cuda", "fp32", "none", 20)
    errors = {"one.onnx": [1e-6, 9e-5], "from-8.onnx": [1e-6, 2e-6]}
    monkeypatch.setattr(graph_check, "_session", lambda path, ours: None)
    monkeypatch.setattr(graph_check, "_run", lambda session, entry, *rest: iter(errors[entry.file]))
    check = check_graphs(
        [entry, replace(entry, file="from-8.onnx", min_batch=8)],
        tmp_path, model.config.spec("f" * 64), [model.memory.detach().numpy()], model_reference(model), 2, 1e-4,
    )  # fmt: skip
    assert check.worst == {"full none": 9e-5}


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_a_check_goes_through_full_and_short_segments_whatever_the_alignment(tmp_path: Path, alignment: Any) -> None:
    model = models.make_model("gpt2", alignment=alignment)
    spec = model.config.spec("f" * 64)
    graphs = engine_graphs.fused_graphs(model, spec, "fp32", tmp_path)
    calls: list[tuple[int, int]] = []
    check = check_graphs(
        graphs.entries, tmp_path, spec, [model.memory.detach().numpy()], model_reference(model), 4, 1e-4,
        lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert len(graphs.entries) == 12
    assert set(check.worst) == {f"{role} {head}" for role in ("full", "step") for head in HEADS}
    assert all(0 < error <= 1e-4 for error in check.worst.values())
    assert calls[-1] == (48, 48)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_an_engine_that_drifts_adds_nothing_unless_that_is_accepted(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU engine stands in for a GPU's: verification runs on the bundle as it is going to be."""
    before = contents(bundle)
    opened: list[set[tuple[str, str]]] = []

    class OnCPU(RMTRuntime):
        def __init__(self, path: Path, engine: str, dtype: str) -> None:
            opened.append({(graph.engine, graph.dtype) for graph in Bundle(path).manifest.graphs})
            super().__init__(path, engine="cpu", dtype="fp32", threads=1)

    monkeypatch.setattr(engine_graphs, "RMTRuntime", OnCPU)
    monkeypatch.setattr(engine_graphs, "refusal", lambda *a: None)
    alone = replace(FEW, native=False)  # graphs with our own operators are verified a second time
    tight = replace(alone, tolerance=1e-12)
    with pytest.raises(VerificationError, match=r"drifts from the PyTorch recurrence by .*--accept-drift"):
        add_engine_graphs(bundle, "cuda", "fp16", options=tight)
    assert contents(bundle) == before
    kept = add_engine_graphs(bundle, "cuda", "fp16", options=replace(tight, accept_drift=True))
    record = Bundle(bundle).manifest.verification["engines"]["cuda"]["fp16"]["verification"]
    assert kept.report is not None
    assert (record["passed"], record["accepted_drift"], record["worst"]) == (False, True, kept.report.worst)
    passed = add_engine_graphs(bundle, "cuda", "fp16", options=alone)
    assert passed.report is not None
    assert passed.report.passed
    assert passed.unverified is None
    assert opened == [{("cpu", "fp32"), ("cuda", "fp16")}] * 3
    assert left_in(bundle.parent) == ["model.rmt"]
