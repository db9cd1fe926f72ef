"""Graphs made for an engine, added to a bundle, replaced, recorded, or refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import pytest
import torch
from added_graphs import FEW, uses
from models import made
from spoil import open_and_run
from steps import TWO_STATES, VOCAB, GatedStep, left_in
from tensorrt_builds import contents, gated

from rmt_trt import ContractError, FormatError, RMTRuntime
from rmt_trt.bundle import STEP, Bundle, GraphEntry
from rmt_trt.export import EngineOptions, add_engine_graphs, engine_graphs
from rmt_trt.export.fused import CannotFuse
from rmt_trt.export.plain import plain_graph
from rmt_trt.export.step_to_onnx import initial_values
from rmt_trt.runtime.engines.cpu import open_session


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """GPT-2's bundle alone in a folder, to add to."""
    return Path(shutil.copytree(made("gpt2").bundle, tmp_path / "work" / "model.rmt"))


@pytest.mark.parametrize("name", models.BACKBONES)
def test_graphs_of_every_backbone_come_from_the_bundle_alone(name: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made(name).bundle, tmp_path / "model.rmt"))
    added = add_engine_graphs(path, "cuda", "fp16", options=FEW)
    assert added.plain is None
    assert sum(added.fused.values()) > 0
    assert added.check is not None
    heads = {"none", "all"} if name in models.ENCODERS else {"none", "last", "all", "loglik"}
    assert set(added.check.worst) == {f"{role} {head}" for role in ("full", "step") for head in heads}
    assert 0 < added.check.largest <= 1e-4
    assert uses(path) == {("cpu", "fp32", "step", "all")} | {
        ("cuda", "fp16", role, head) for role in ("full", "step") for head in heads
    }
    opened = Bundle(path)
    assert all(opened.graph_path(entry).is_file() for entry in added.entries)
    assert {data for entry in added.entries for data in entry.data} == {"graphs/cuda-fp16.data"}
    assert left_in(tmp_path) == ["model.rmt"]
    assert open_and_run(path, made(name).document(50)).segments == 3


def test_what_is_recorded_is_read_again(bundle: Path) -> None:
    before = Bundle(bundle).manifest.verification
    half = add_engine_graphs(bundle, "cuda", "fp16", options=FEW)
    whole = add_engine_graphs(bundle, "cuda", "fp32", options=FEW)
    found = dict(Bundle(bundle).manifest.verification)
    assert found.pop("engines") == {"cuda": {"fp16": half.to_json(), "fp32": whole.to_json()}}
    assert found == before
    assert half.to_json()["check"] == {"dtype": "fp32", "segments": 3, "tolerance": 1e-4, "worst": half.check.largest}  # type: ignore[union-attr]
    if half.report is None:
        assert half.unverified
        assert half.to_json()["verification"] is None


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_graphs_that_are_added_again_replace_the_old_ones_and_their_files(bundle: Path, dtype: str) -> None:
    add_engine_graphs(bundle, "cuda", dtype, options=FEW)
    first = contents(bundle)
    add_engine_graphs(bundle, "cuda", dtype, options=FEW)
    assert contents(bundle) == first
    added = add_engine_graphs(bundle, "cuda", dtype, options=replace(FEW, plain=True))
    assert (added.plain, added.fused) == ("asked for", {})
    assert uses(bundle) == {("cpu", "fp32", "step", "all"), ("cuda", dtype, "step", "all")}
    graphs = [] if dtype == "fp32" else ["cuda-fp16-step-all.onnx"]
    assert left_in(bundle / "graphs") == graphs
    assert {name for name in Bundle(bundle).manifest.files if "/" in name} == {f"graphs/{name}" for name in graphs}


def test_a_plain_fp32_graph_is_step_onnx_itself(bundle: Path) -> None:
    before = set(contents(bundle))
    added = add_engine_graphs(bundle, "cuda", "fp32", options=replace(FEW, plain=True))
    assert [entry.file for entry in added.entries] == [STEP]
    assert set(contents(bundle)) == before
    assert Bundle(bundle).graph("cuda", "fp32") == replace(Bundle(bundle).graph("cpu", "fp32"), engine="cuda")  # type: ignore[type-var]


def test_a_backbone_that_cannot_be_fused_is_exported_plainly_and_the_reason_is_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(model: Any, spec: Any, dtype: str, folder: Path, **options: Any) -> Any:
        (folder / f"cuda-{dtype}.data").write_bytes(b"half written")
        raise CannotFuse("no fused graph is known for 'x' backbones")

    monkeypatch.setattr(engine_graphs, "fused_graphs", cannot)
    added = add_engine_graphs(bundle, "cuda", "fp16", options=FEW)
    assert added.plain == "no fused graph is known for 'x' backbones"
    assert added.check is not None
    assert (added.check.dtype, added.check.tolerance) == ("fp16", 2e-2)
    assert left_in(bundle / "graphs") == ["cuda-fp16-step-all.onnx"]
    assert Bundle(bundle).manifest.verification["engines"]["cuda"]["fp16"]["plain"] == added.plain


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_plain_half_graph_says_who_it_is(dtype: str, tmp_path: Path) -> None:
    step, spec = GatedStep(), TWO_STATES.with_(fingerprint="f" * 64)
    entry = plain_graph(step, spec, dtype, tmp_path / "half.onnx")
    assert entry == GraphEntry("half.onnx", "step", "cuda", dtype, "all", 20)
    graph = onnx.load(tmp_path / "half.onnx")
    assert json.loads(next(p.value for p in graph.metadata_props if p.key == "rmt_trt.spec")) == spec.to_json()
    kinds = {tensor.data_type for tensor in graph.graph.initializer if len(tensor.dims) == 2}
    assert kinds == {onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.BFLOAT16}
    assert {value.type.tensor_type.elem_type for value in graph.graph.output} == {onnx.TensorProto.FLOAT}


def test_a_row_of_padding_keeps_its_states_in_a_half_graph_too(tmp_path: Path) -> None:
    step = GatedStep()
    plain_graph(step, TWO_STATES, "fp16", tmp_path / "half.onnx")
    session = open_session(tmp_path / "half.onnx", 1)
    values = initial_values(step, TWO_STATES, None)
    feeds = {state.input: np.stack([values[state.initial]] * 2) for state in TWO_STATES.states}
    out = session.run(None, feeds | {"segment": np.array([[3, 4, 5], [-1, -1, -1]])})
    for new, state in zip(out, TWO_STATES.states, strict=False):
        assert np.array_equal(new[1], values[state.initial])
        assert not np.array_equal(new[0], values[state.initial])


def test_a_step_of_ones_own_in_every_dtype(tmp_path: Path) -> None:
    path = Path(shutil.copytree(gated(), tmp_path / "gated.rmt"))
    added = add_engine_graphs(path, "cuda", "fp32", options=FEW)
    assert (added.plain, [entry.file for entry in added.entries]) == ("a step of the user's own", [STEP])
    for dtype in ("fp16", "bf16"):
        with pytest.raises(
            FormatError, match=rf"{dtype} graphs of it are made from its PyTorch module\. Pass it: .*model=step"
        ):
            add_engine_graphs(path, "cuda", dtype, options=FEW)
        added = add_engine_graphs(path, "cuda", dtype, GatedStep(), FEW)
        assert [entry.file for entry in added.entries] == [f"graphs/cuda-{dtype}-step-all.onnx"]
    assert uses(path) == {("cpu", "fp32", "step", "all")} | {
        ("cuda", dtype, "step", "all") for dtype in ("fp32", "fp16", "bf16")
    }
    with RMTRuntime(path, engine="cpu", threads=1) as runtime:
        assert runtime.run(np.arange(30) % VOCAB).segments == 3


def test_another_model_than_the_bundles_is_refused(bundle: Path) -> None:
    before = contents(bundle)
    with pytest.raises(FormatError, match=r"the model holds other weights than .*model\.rmt was exported from"):
        add_engine_graphs(bundle, "cuda", "fp16", models.make_model("gpt2", seed=1), FEW)
    other = GatedStep()
    torch.nn.init.zeros_(other.head.bias)
    with pytest.raises(FormatError, match="the model holds other weights"):
        add_engine_graphs(gated(), "cuda", "fp16", other, FEW)
    assert contents(bundle) == before


@pytest.mark.parametrize(("engine", "dtype"), [("cpu", "fp32"), ("tensorrt", "fp16"), ("cuda", "int8"), ("x", "fp32")])
def test_an_engine_or_dtype_without_graphs_is_refused(bundle: Path, engine: str, dtype: str) -> None:
    with pytest.raises(ContractError, match=f"no graphs are made for engine '{engine}' in '{dtype}'; expected engine"):
        add_engine_graphs(bundle, engine, dtype)


@pytest.mark.parametrize("options", [{"segments": 1}, {"check_segments": 1}, {"tolerance": 0}, {"segments": True}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=r"expected (at least 2|a number above 0)"):
        EngineOptions(**options)


def test_progress_goes_through_the_stages(bundle: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    add_engine_graphs(bundle, "cuda", "fp16", options=FEW, progress=lambda *call: calls.append(call))
    stages = dict.fromkeys(stage for stage, _, _ in calls)
    assert [stage for stage in stages if stage != "verify"] == ["graphs", "check", "native"]
    assert all(0 <= done <= total for _, done, total in calls)
    assert ("check", 36, 36) in calls
