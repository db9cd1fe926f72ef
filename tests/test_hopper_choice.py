"""Graphs with kernels for compute capability 9.0 in a bundle: how an export proves them, which GPU runs them, what is said of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
from gpu import open_cuda
from hardware import require_native
from heads_of_64 import wide
from models import S
from shared import once
from stand_in import host_gpu

from rmt_trt import EngineError, RMTRuntime
from rmt_trt.bundle import Bundle, GraphEntry, add_files
from rmt_trt.commands import info
from rmt_trt.commands import verify as verify_command
from rmt_trt.commands.report import record_lines
from rmt_trt.errors import FormatError
from rmt_trt.export import EngineOptions, ExportOptions, add_engine_graphs, engine_graphs, export_model
from rmt_trt.export.fused import fused_graphs
from rmt_trt.export.verify import random_document, relative_error
from rmt_trt.model.checkpoint import LoadedModel
from rmt_trt.model.step import model_spec
from rmt_trt.runtime import machine, native
from rmt_trt.runtime.engines.cuda import CudaEngine


@pytest.fixture(autouse=True)
def _built() -> None:
    require_native()


def plain_bundle() -> Path:
    """BERT with heads of 64; nobody may change it."""
    model = wide("bert")
    return once(
        "heads-of-64.rmt",
        lambda path: export_model(LoadedModel(model, model_spec(model), None), path, ExportOptions(segments=2)),
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with graphs for CUDA in fp32, which the stand-in runs, of all kinds; nobody may change it."""
    folder = tmp_path_factory.mktemp("hopper")
    path = Path(shutil.copytree(plain_bundle(), folder / "bert.rmt"))
    graphs = fused_graphs(wide("bert"), model_spec(wide("bert")), "fp32", folder, grouped=True, beside=True)
    entries = [replace(entry, data=("graphs/cuda-fp32.data",), file=f"graphs/{entry.file}")
               for entry in (*graphs.hopper, *graphs.entries, *graphs.native)]  # fmt: skip
    names = {name for entry in entries for name in (entry.file, *entry.data)}
    add_files(path, {name: folder / Path(name).name for name in names}, entries)
    return path


def kinds(runtime: RMTRuntime) -> set[str]:
    """Of the graphs that sessions were made of, as their files are named."""
    engine = runtime._engine
    assert isinstance(engine, CudaEngine)
    files = [Path(engine._graphs[key].file).name for key, _ in engine._sessions]
    return {next((kind for kind in ("hopper", "native") if kind in file), "plain") for file in files}


def is_gpu(patch: pytest.MonkeyPatch, capability: int | None) -> None:
    def of(device: int) -> int:
        if capability is None:
            raise EngineError("the compute capability of GPU 0 cannot be read")
        return capability

    patch.setattr(machine, "capability", of)


def said_of(runtime: RMTRuntime) -> str:
    engine = runtime._engine
    assert isinstance(engine, CudaEngine)
    return engine.products


@pytest.mark.parametrize("capability", [90, 89, 100, 120, None])
def test_the_engine_takes_them_on_one_kind_of_gpu_alone(
    bundle: Path, capability: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_gpu(monkeypatch, capability)
    with host_gpu(), open_cuda(bundle, "fp32") as runtime:
        found = runtime.run(random_document(runtime.spec, 3 * S + 7, 0))
        used, said = kinds(runtime), said_of(runtime)
        runtime.run([random_document(runtime.spec, 2 * S, seed) for seed in range(9)])
        large = kinds(runtime)
    if capability == 90:
        assert (used, large) == ({"hopper"}, {"hopper", "native"})  # of many documents the others are quicker
        assert said == f"native products and kernels for this GPU, from {native.library()}"
    else:
        assert (used, large) == ({"native"}, {"native"})
        reason = "cannot be read" if capability is None else f"compute capability 9.0; GPU 0 has {capability / 10}"
        assert "more of its native graphs are not used" in said
        assert reason in said
    with RMTRuntime(bundle, engine="cpu", threads=1) as cpu:
        exact = cpu.run(random_document(cpu.spec, 3 * S + 7, 0))
    assert relative_error(found.memory, exact.memory) < 1e-2  # the tanh form of GELU


def test_without_our_operators_plain_ones_run_there_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_gpu(monkeypatch, 90)
    monkeypatch.setenv(native.SWITCH, "0")
    with host_gpu(), open_cuda(bundle, "fp32") as runtime:
        assert (kinds(runtime), "RMT_NATIVE=0 leaves them out" in said_of(runtime)) == ({"plain"}, True)


def test_which_gpu_it_is_is_asked_for_such_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "capability", lambda device: pytest.fail("nobody needs to know"))
    assert native.lacking((), 0) is None
    assert native.lacking((native.NEED,), 0) is None


def test_a_bundle_with_nothing_else_says_which_gpu_it_takes(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Path(shutil.copytree(bundle, tmp_path / "alone.rmt"))
    add_files(alone, {}, drop=lambda graph: graph.engine == "cuda" and native.HOPPER not in graph.needs)
    is_gpu(monkeypatch, 90)
    with host_gpu(), open_cuda(alone, "fp32") as runtime:
        assert kinds(runtime) == {"hopper"}
    is_gpu(monkeypatch, 89)
    with host_gpu(), pytest.raises(EngineError, match=r"in fp32 need rmt-trt's own operators.*9\.0; GPU 0 has 8\.9"):
        RMTRuntime(alone, engine="cuda", dtype="fp32")


def test_a_manifest_keeps_what_a_graph_needs_and_one_of_later_needs_is_refused(bundle: Path) -> None:
    found = [graph.needs for graph in Bundle(bundle).manifest.graphs if graph.engine == "cuda"]
    assert {needs: found.count(needs) for needs in found} == {(): 6, ("native",): 6, ("hopper", "native"): 4}
    with pytest.raises(FormatError, match=r"needs blackwell, which this rmt-trt .* does not know.*newer rmt-trt"):
        GraphEntry("step.onnx", needs=("blackwell", "native"))


def test_an_export_checks_and_records_them_apart(tmp_path: Path) -> None:
    path = Path(shutil.copytree(plain_bundle(), tmp_path / "model.rmt"))
    options = EngineOptions(check_segments=2, segments=2)
    added = add_engine_graphs(path, "cuda", "fp16", options=options)
    assert sum(native.HOPPER in entry.needs for entry in added.entries) == 4
    assert (path / "graphs/cuda-fp16-hopper-full-none.onnx").is_file()
    record = Bundle(path).manifest.verification["engines"]["cuda"]["fp16"]
    assert added.hopper is not None
    assert record["hopper"] == added.hopper.to_json()
    assert record["hopper"]["fused"] == {"first rows": 1, "attention": 2, "product+bias": 4, "product+skip-norm": 4}
    assert (record["hopper"]["check"]["by"], record["hopper"]["check"]["worst"] < 1e-5) == ("operators", True)
    assert record["hopper"]["unverified"] == record["native"]["unverified"] is not None
    add_engine_graphs(path, "cuda", "fp16", options=replace(options, native=False, check_segments=0))
    assert not any(graph.needs for graph in Bundle(path).manifest.graphs)
    assert "hopper" not in Bundle(path).manifest.verification["engines"]["cuda"]["fp16"]


@pytest.mark.parametrize("capability", [90, 89])
def test_on_its_engine_an_export_verifies_each_kind_that_runs_there(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = Path(shutil.copytree(plain_bundle(), tmp_path / "model.rmt")), []

    def verified(stage: Path, engine: str, *rest: Any) -> Any:
        seen.append({graph.needs for graph in Bundle(stage).manifest.graphs if graph.engine == engine})
        return models.made("bert").report

    monkeypatch.setattr(engine_graphs, "refusal", lambda *arguments: None)
    monkeypatch.setattr(engine_graphs, "_verified", verified)
    is_gpu(monkeypatch, capability)
    made = add_engine_graphs(path, "cuda", "fp16", options=EngineOptions(check_segments=0))
    runs = capability == 90
    assert seen == [{()}, {(), ("native",)}, {(), ("native",), ("hopper", "native")}][: 3 if runs else 2]
    assert made.native is not None
    assert made.hopper is not None
    assert (made.native.report is not None, made.hopper.report is not None) == (True, runs)
    assert runs or "GPU 0 has 8.9" in str(made.hopper.unverified)


def test_what_is_recorded_is_shown() -> None:
    own = {"fused": {"attention": 2}, "check": None, "verification": None, "unverified": "left out"}
    lines = record_lines(
        "cuda", "fp16", {"fused": {"product+skip-norm": 4}, "plain": None, "native": own, "hopper": own}
    )
    assert [line.strip() for line in lines if "beside them" in line] == [
        "beside them with native products: 2 attention",
        "beside them with kernels for compute capability 9.0: 2 attention",
    ]


@pytest.mark.parametrize(("capability", "need"), [(90, "hopper"), (89, "native")])
def test_a_verdict_is_recorded_beside_the_graphs_that_ran(
    capability: int, need: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(plain_bundle(), tmp_path / "model.rmt"))
    add_engine_graphs(path, "cuda", "fp16", options=EngineOptions(check_segments=0, segments=0))
    is_gpu(monkeypatch, capability)
    verify_command._record(path, replace(models.made("bert").report, engine="cuda", dtype="fp16"))
    record = Bundle(path).manifest.verification["engines"]["cuda"]["fp16"]
    verified = {name for name in ("native", "hopper") if record[name]["verification"] is not None}
    assert (verified, record["verification"]) == ({need}, None)


@pytest.mark.parametrize("capability", [90, 120])
def test_rmt_info_says_whether_this_gpu_runs_them(
    capability: int, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    is_gpu(monkeypatch, capability)
    info.info(bundle, as_json=True)
    reason = json.loads(capsys.readouterr().out)["hopper"]["not_used"]
    info.info(bundle)
    shown = " ".join(capsys.readouterr().out.split())
    if capability == 90:
        assert (reason, "kernels for one kind of GPU: used" in shown) == (None, True)
    else:
        assert reason == "their kernels are for compute capability 9.0; GPU 0 has 12.0"
        assert "kernels for one kind of GPU: not used: their" in shown
