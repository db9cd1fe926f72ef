"""Graphs made for an engine, added to a bundle: checked first, all or none, replaced, recorded, and how the commands say it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import pytest
import torch
from models import made
from onnx import numpy_helper
from spoil import alter, open_and_run
from steps import ONE_STATE, TWO_STATES, VOCAB, GatedStep, Plain, left_in

from rmt_trt import ContractError, FormatError, RMTRuntime, VerificationError
from rmt_trt.bundle import LOCK, MANIFEST, STEP, Bundle, GraphEntry, add_files
from rmt_trt.commands import export, info, verify
from rmt_trt.contract import HEADS
from rmt_trt.export import (
    EngineOptions,
    ExportOptions,
    add_engine_graphs,
    engine_graphs,
    export_step,
    export_step_bundle,
    graph_check,
)
from rmt_trt.export.fused import CannotFuse
from rmt_trt.export.graph_check import check_graphs
from rmt_trt.export.plain import plain_graph
from rmt_trt.export.step_to_onnx import initial_values
from rmt_trt.export.verify import model_reference, step_reference
from rmt_trt.runtime.engines.cpu import open_session

FEW = EngineOptions(check_segments=3, segments=2)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """GPT-2's bundle alone in a folder, to add to."""
    return Path(shutil.copytree(made("gpt2").bundle, tmp_path / "work" / "model.rmt"))


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gated") / "gated.rmt"
    export_step_bundle(GatedStep(), TWO_STATES, path, options=ExportOptions(segments=3))
    return path


def contents(path: Path) -> dict[str, bytes]:
    """Every file but the lock, which a writer leaves behind."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != LOCK
    }


def uses(path: Path) -> set[tuple[str, str, str, str]]:
    return {(graph.engine, graph.dtype, graph.role, graph.head) for graph in Bundle(path).manifest.graphs}


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


def test_a_step_of_ones_own_in_every_dtype(gated: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(gated, tmp_path / "gated.rmt"))
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


def test_another_model_than_the_bundles_is_refused(bundle: Path, gated: Path) -> None:
    before = contents(bundle)
    with pytest.raises(FormatError, match=r"the model holds other weights than .*model\.rmt was exported from"):
        add_engine_graphs(bundle, "cuda", "fp16", models.make_model("gpt2", seed=1), FEW)
    other = GatedStep()
    torch.nn.init.zeros_(other.head.bias)
    with pytest.raises(FormatError, match="the model holds other weights"):
        add_engine_graphs(gated, "cuda", "fp16", other, FEW)
    assert contents(bundle) == before


@pytest.mark.parametrize(("engine", "dtype"), [("cpu", "fp32"), ("tensorrt", "fp16"), ("cuda", "int8"), ("x", "fp32")])
def test_an_engine_or_dtype_without_graphs_is_refused(bundle: Path, engine: str, dtype: str) -> None:
    with pytest.raises(ContractError, match=f"no graphs are made for engine '{engine}' in '{dtype}'; expected engine"):
        add_engine_graphs(bundle, engine, dtype)


@pytest.mark.parametrize("options", [{"segments": 1}, {"check_segments": 1}, {"tolerance": 0}, {"segments": True}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=r"expected (at least 2|a number above 0)"):
        EngineOptions(**options)


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
    tight = replace(FEW, tolerance=1e-12)
    with pytest.raises(VerificationError, match=r"drifts from the PyTorch recurrence by .*--accept-drift"):
        add_engine_graphs(bundle, "cuda", "fp16", options=tight)
    assert contents(bundle) == before
    kept = add_engine_graphs(bundle, "cuda", "fp16", options=replace(tight, accept_drift=True))
    record = Bundle(bundle).manifest.verification["engines"]["cuda"]["fp16"]["verification"]
    assert kept.report is not None
    assert (record["passed"], record["accepted_drift"], record["worst"]) == (False, True, kept.report.worst)
    passed = add_engine_graphs(bundle, "cuda", "fp16", options=FEW)
    assert passed.report is not None
    assert passed.report.passed
    assert passed.unverified is None
    assert opened == [{("cpu", "fp32"), ("cuda", "fp16")}] * 3
    assert left_in(bundle.parent) == ["model.rmt"]


def test_progress_goes_through_the_stages(bundle: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    add_engine_graphs(bundle, "cuda", "fp16", options=FEW, progress=lambda *call: calls.append(call))
    assert [stage for stage in dict.fromkeys(stage for stage, _, _ in calls) if stage != "verify"] == [
        "graphs",
        "check",
    ]
    assert all(0 <= done <= total for _, done, total in calls)
    assert ("check", 36, 36) in calls


def full_disk(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "plain"),
    [("os.fsync", True), ("os.replace", False), ("rmt_trt.bundle.sync", False), ("tempfile.mkdtemp", False)],
)
def test_a_full_disk_keeps_the_graphs_that_were_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, place: str, plain: bool
) -> None:
    """Plain graphs take the place of fused ones, or fused ones that of a plain one."""
    if plain:
        add_engine_graphs(bundle, "cuda", "fp16", options=FEW)
    else:
        entry = GraphEntry("graphs/cuda-fp16-step-all.onnx", engine="cuda", dtype="fp16")
        add_files(bundle, {entry.file: bundle / STEP}, [entry])
    before = contents(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(place, full_disk)
        with pytest.raises(FormatError, match="No space left on device"):
            add_engine_graphs(bundle, "cuda", "fp16", options=replace(FEW, plain=plain))
    assert contents(bundle) == before
    assert left_in(bundle.parent) == ["model.rmt"]


@pytest.mark.parametrize("stage", ["graphs", "check"])
def test_an_interrupt_in_any_stage_changes_nothing(bundle: Path, stage: str) -> None:
    before = contents(bundle)

    def interrupted(name: str, done: int, total: int) -> None:
        if name == stage and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_engine_graphs(bundle, "cuda", "fp16", options=FEW, progress=interrupted)
    assert contents(bundle) == before
    assert left_in(bundle.parent) == ["model.rmt"]


# The process dies when the n-th file of a replacement takes its place, the manifest counted.
DIE = """
import os, signal, sys
from pathlib import Path
from rmt_trt.bundle import GraphEntry, add_files
replace, left = os.replace, int(sys.argv[2])
def die(*args):
    global left
    left -= 1
    os.kill(os.getpid(), signal.SIGKILL) if left == 0 else replace(*args)
os.replace = die
path = Path(sys.argv[1])
entries = [GraphEntry(f"graphs/{name}.onnx", engine="cuda", dtype="fp16", head=name, data=("graphs/w",)) for name in ("all", "last")]
files = {"graphs/all.onnx": path / "step.onnx", "graphs/last.onnx": path / "step.onnx", "graphs/w": Path(__file__)}
add_files(path, files, entries, drop=lambda graph: graph.engine == "cuda", made_by={"made": "new"})
"""


@pytest.mark.parametrize("times", range(1, 7))
def test_a_run_that_is_killed_anywhere_leaves_the_old_graphs_the_new_ones_or_none(
    bundle: Path, tmp_path: Path, times: int
) -> None:
    old = GraphEntry("graphs/all.onnx", engine="cuda", dtype="fp16", data=("graphs/w", "graphs/old"))
    (tmp_path / "old").write_text("old")
    add_files(
        bundle, {"graphs/all.onnx": bundle / STEP, "graphs/w": tmp_path / "old", "graphs/old": tmp_path / "old"}, [old]
    )
    script = tmp_path / "die.py"
    script.write_text(DIE)
    done = subprocess.run([sys.executable, str(script), str(bundle), str(times)], check=False)
    assert done.returncode == (-signal.SIGKILL if times <= 5 else 0)
    after = Bundle(bundle)
    cuda = [graph for graph in after.manifest.graphs if graph.engine == "cuda"]
    assert len(cuda) == {1: 1, 6: 2}.get(times, 0)
    assert all(after.graph_path(graph).is_file() for graph in after.manifest.graphs)
    assert open_and_run(bundle, made("gpt2").document(50)).segments == 3
    if times == 6:
        assert "graphs/old" not in contents(bundle)
        assert after.manifest.made_by == {"made": "new"}
    subprocess.run([sys.executable, str(script), str(bundle), "99"], check=True)  # and it can be done again
    assert len(Bundle(bundle).manifest.graphs) == 3


def test_a_change_that_is_a_function_gets_the_value_that_is_there_under_the_lock(bundle: Path) -> None:
    add_files(bundle, {}, made_by=lambda old: {**old, "more": "1"})
    assert Bundle(bundle).manifest.made_by["more"] == "1"
    assert "torch" in Bundle(bundle).manifest.made_by
    with pytest.raises(FormatError, match=r"none\.rmt is no folder; expected a bundle"):
        add_files(bundle.with_name("none.rmt"), {})


def test_graphs_that_the_bundle_needs_are_not_dropped(bundle: Path) -> None:
    before = contents(bundle)
    with pytest.raises(FormatError, match="cannot do without its graphs of role 'step'"):
        add_files(bundle, {}, drop=lambda graph: True)
    assert contents(bundle) == before


def test_nothing_is_written_or_removed_through_a_link_out_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.onnx").write_bytes((bundle / STEP).read_bytes())
    (bundle / "graphs").symlink_to(outside)
    with pytest.raises(FormatError, match=r"graphs/cuda-\S+ leads out of the bundle through a link"):
        add_engine_graphs(bundle, "cuda", "fp16", options=FEW)
    entry = json.loads((bundle / MANIFEST).read_text())["files"][STEP]
    graph = {"file": "graphs/precious.onnx", "engine": "cuda", "role": "full"}
    alter(bundle, lambda m: (m["files"].update({"graphs/precious.onnx": entry}), m["graphs"].append(graph)))
    add_files(bundle, {}, drop=lambda graph: graph.engine == "cuda")
    assert left_in(outside) == ["precious.onnx"]


def run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_commands_from_a_checkpoint_to_its_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(made("gpt2").checkpoint, tmp_path / "model.pt")
    bundle = tmp_path / "model.rmt"
    few = ("--segments", 2)
    assert run(export.main, monkeypatch, tmp_path / "model.pt", "--engine", "cuda", "--dtype", "fp16,fp32", *few) == 0
    said = capsys.readouterr().err
    assert "cuda fp16: fused: 2 attention, 2 bias+gelu, 4 skip-norm" in said
    assert "checked on the CPU provider in fp32: largest error" in said
    assert "model.rmt: 12 graphs, " in said
    (tmp_path / "model.pt").unlink()  # from here on the bundle speaks for itself
    assert run(export.main, monkeypatch, bundle, "--engine", "cuda", "--dtype", "bf16", "--plain", *few) == 0
    assert "cuda bf16: exported plainly: asked for" in capsys.readouterr().err
    assert run(info.main, monkeypatch, bundle) == 0
    shown = capsys.readouterr().out
    assert "graphs/cuda-fp16.data" in shown
    assert "cuda fp32: fused: 2 attention" in shown
    assert run(verify.main, monkeypatch, bundle, "--engine", "cpu", *few) == 0
    assert "against the PyTorch recurrence" in capsys.readouterr().err


def test_a_bundle_that_does_not_give_its_model_takes_the_checkpoint(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rmt_trt.export.recover.WEIGHTS_KEY", "rmt_trt.none")  # as an older version left it out
    command = (bundle, "--engine", "cuda", "--segments", 2)
    assert run(export.main, monkeypatch, *command) == 1
    assert (
        "an older rmt-trt wrote it. Give the checkpoint that it was exported from (--model model.pt)"
        in capsys.readouterr().err
    )
    assert run(export.main, monkeypatch, *command, "--model", made("bert").checkpoint) == 1
    assert "holds other weights than" in capsys.readouterr().err
    assert run(export.main, monkeypatch, *command, "--model", made("gpt2").checkpoint) == 0
    assert len(uses(bundle)) == 9


WRONG: dict[str, tuple[str, str]] = {
    "bundle and nothing to add": ("model.rmt", "model.rmt is a bundle already. Add graphs to it with: rmt-export model.rmt --engine cuda"),
    "bundle with flags of a checkpoint": (
        "model.rmt --engine cuda --alignment left --segment-size 9 --overwrite",
        "--segment-size, --alignment, --overwrite go with a checkpoint, and model.rmt is a bundle already",
    ),
    "bundle with another name": ("model.rmt --engine cuda -o x.rmt", "--out goes with a checkpoint, and model.rmt is a bundle"),
    "unknown engine": ("model.pt --engine trt", "--engine is 'trt'; rmt-export makes graphs for cpu, cuda"),
    "unknown dtype": ("model.pt --engine cuda --dtype fp16,int8", "--dtype is 'fp16,int8'; expected one of fp32, fp16, bf16, or several"),
    "dtype of the CPU": ("model.pt --dtype fp16", "--dtype fp16 goes with --engine cuda; the CPU engine runs step.onnx in fp32"),
    "plain on the CPU": ("model.pt --plain", "--plain goes with --engine cuda; nothing is fused in step.onnx"),
    "a verdict of the CPU": ("verify model.rmt --record", "--record is for an engine's graphs, and this is step.onnx on the CPU"),
    "model twice": ("model.pt --model model.pt", "--model goes with a bundle that exists; here model.pt is the checkpoint"),
    "a step of one's own": ("gated.rmt --engine cuda", "Pass it: rmt_trt.export.add_engine_graphs(path, dtype='fp16', model=step)"),
    "verify a step of one's own": ("verify gated.rmt --engine cpu", "its fp32 graph is what others are compared with"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags_are_one_line(
    bundle: Path, gated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(bundle.parent)
    shutil.copytree(gated, "gated.rmt")
    shutil.copy(made("gpt2").checkpoint, "model.pt")
    before = contents(Path())
    arguments, message = WRONG[name]
    main = verify.main if arguments.startswith("verify") else export.main
    assert run(main, monkeypatch, *arguments.removeprefix("verify ").split()) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert contents(Path()) == before


@pytest.mark.parametrize(
    "record",
    [
        [], "x", {"cuda": []}, {"cuda": {"fp16": 5}}, {"cuda": {"fp16": {"fused": [1], "check": 3, "verification": "yes"}}},
        {"cuda": {"fp16": {"fused": {"\x1b[2J": {"a": 1}}, "check": {"worst": "much"}, "verification": {"passed": 1}}}},
    ],
)  # fmt: skip
def test_a_strangers_record_neither_breaks_nor_steers_the_terminal(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], record: Any
) -> None:
    add_engine_graphs(bundle, "cuda", "fp16", options=replace(FEW, check_segments=0, segments=0))
    alter(bundle, lambda m: m["verification"].update(engines=record))
    assert run(info.main, monkeypatch, bundle) == 0
    assert "\x1b" not in capsys.readouterr().out
    add_engine_graphs(bundle, "cuda", "fp16", options=replace(FEW, check_segments=0, segments=0))
    assert Bundle(bundle).manifest.verification["engines"]["cuda"]["fp16"]["unverified"] == "left out"
