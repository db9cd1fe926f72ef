"""Graphs for an engine out of a stranger's bundle, on a GPU of host memory: refused before a size in them is believed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import pytest
from gpu import cuda_bundle, open_cuda
from models import S, made
from spoil import alter, put
from stand_in import host_gpu

from rmt_trt import ContractError, EngineError, FormatError, RMTRuntime
from rmt_trt.bundle import MANIFEST, Bundle
from rmt_trt.commands import info, verify
from rmt_trt.export import EngineOptions, add_engine_graphs

DOCUMENT = np.arange(50) % 90 + 5


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """GPT-2 with graphs for CUDA, to be spoiled."""
    return Path(shutil.copytree(cuda_bundle("gpt2"), tmp_path / "model.rmt"))


def run_every_head(path: Path) -> None:
    with host_gpu(), open_cuda(path, "fp32") as runtime:
        for logits in ("none", "last", "loglik", "all"):
            runtime.run([DOCUMENT, DOCUMENT[:3]], logits=logits)


def change_graphs(path: Path, change: Callable[[Any], object]) -> None:
    """Alters every graph for CUDA, its hash put right."""
    for entry in Bundle(path).manifest.graphs:
        if entry.engine == "cuda":
            model = onnx.load(str(path / entry.file), load_external_data=False)
            change(model)
            put(path, entry.file, model.SerializeToString())


def resize(name: str, axis: int, size: int) -> Callable[[Any], None]:
    """States another size of an axis of an input or output."""

    def change(model: Any) -> None:
        for value in [*model.graph.input, *model.graph.output]:
            if value.name == name:
                value.type.tensor_type.shape.dim[axis].Clear()
                value.type.tensor_type.shape.dim[axis].dim_value = size

    return change


def exchange(model: Any) -> None:
    """The state that goes in gets the name of the one that comes out, and the other way round."""
    other = {"memory": "new_memory", "new_memory": "memory"}
    for value in [*model.graph.input, *model.graph.output]:
        value.name = other.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]
        node.output[:] = [other.get(name, name) for name in node.output]


def repeat(model: Any) -> None:
    model.graph.output.append(model.graph.output[0])


GRAPHS: dict[str, tuple[Callable[[Any], object], str]] = {
    "logits of a batch of 2**40": (resize("logits", 0, 1 << 40), r"'logits' is .*\(1099511627776, 96\); its spec says .*\(any, 96\)"),
    "logits of a batch of 2": (resize("logits", 0, 2), r"'logits' is .*\(2, 96\); its spec says .*\(any, 96\)"),
    "a batch of 2": (resize("segment", 0, 2), r"'segment' is .*\(2, 20\); its spec says .*\(any, any or 20\)"),
    "input and output exchanged": (exchange, r"the graph has the inputs \['new_memory', 'segment'\]; its spec says \['memory'"),
    "an output twice": (repeat, r"the graph has the outputs \['new_memory', 'new_memory'\]; its spec says \['new_memory'\]"),
}  # fmt: skip


def test_the_bundle_that_these_tests_spoil_runs(bundle: Path) -> None:
    run_every_head(bundle)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_whose_inputs_and_outputs_are_not_the_specs_is_refused(bundle: Path, name: str) -> None:
    change, message = GRAPHS[name]
    change_graphs(bundle, change)
    with pytest.raises(FormatError, match=message):
        run_every_head(bundle)


def of_cuda(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    def every(manifest: dict[str, Any]) -> None:
        for graph in manifest["graphs"]:
            if graph["engine"] == "cuda":
                change(graph)

    return every


def without(**field: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        kept = [g for g in manifest["graphs"] if g["engine"] != "cuda" or not field.items() <= g.items()]
        manifest["graphs"] = kept

    return change


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = {
    "no graph of role step": (without(role="step"), EngineError, "has no graph for CUDA in fp32 with head 'last'; add them again: rmt-export"),
    "no graph of head loglik or all": (
        lambda m: (without(head="all")(m), without(head="loglik")(m)), EngineError, "has no graph for CUDA in fp32 with head 'loglik'",
    ),
    "graphs for large batches alone": (of_cuda(lambda g: g.update(min_batch=8)), FormatError, "names two graphs"),
    "another graph's file": (of_cuda(lambda g: g.update(file="step.onnx")), FormatError, "step.onnx: the graph has the outputs"),
    "heads exchanged": (
        of_cuda(lambda g: g.update(head={"none": "all", "all": "none"}.get(g["head"], g["head"]))), FormatError, "its spec says",
    ),
    "a graph twice": (lambda m: m["graphs"].append(m["graphs"][-1]), FormatError, "names two graphs, 'graphs/"),
    "the batch below": (of_cuda(lambda g: g.update(min_batch=0)), FormatError, "min_batch is 0; expected a whole number from 1 on"),
    "a need of the future": (
        of_cuda(lambda g: g.update(needs=["native", "tensor-cores"])), FormatError,
        r"'graphs/.*onnx' needs tensor-cores, which this rmt-trt .* does not know: the bundle was made by a newer rmt-trt",
    ),
    "needs in one word": (of_cuda(lambda g: g.update(needs="native")), FormatError, "needs is 'native'; expected a list of names"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_altered_list_of_graphs_is_refused(bundle: Path, name: str) -> None:
    change, kind, message = MANIFESTS[name]
    alter(bundle, change)
    with pytest.raises(kind, match=message):
        run_every_head(bundle)


def test_a_step_that_fails_in_the_middle_of_a_block_harms_no_state(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = made("gpt2").document(30 * S + 3)
    with host_gpu(), open_cuda(bundle, "fp32") as runtime:
        wanted = runtime.run(tokens, alignment="left")
        state = runtime.run(tokens[: 7 * S + 2], alignment="left").state
        session = type(next(iter(runtime._engine._sessions.values())))  # type: ignore[union-attr]
        whole, left = session.run_with_iobinding, 9

        def fails(self: Any, *arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise RuntimeError("CUDA error\n  an illegal address")
            whole(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(session, "run_with_iobinding", fails)
            with pytest.raises(EngineError, match="failed in a step of 1 documents: CUDA error an illegal address"):
                runtime.run(tokens)
        rest = runtime.run(tokens[7 * S + 2 :], state=state, alignment="left")
        assert np.array_equal(rest.logits, wanted.logits)
        assert np.array_equal(runtime.run(tokens, alignment="left").memory, wanted.memory)


@pytest.mark.parametrize("count", [1, 64, 65, 130])
def test_more_documents_than_are_stepped_together(count: int) -> None:
    documents = [made("gpt2").document(1 + row % (2 * S), row) for row in range(count)]
    with made("gpt2").open() as cpu, host_gpu(), open_cuda(cuda_bundle("gpt2"), "fp32") as runtime:
        found, wanted = runtime.run(documents), cpu.run(documents)
        models.check_parity([(out.memory, out.logits) for out in found], [(out.memory, out.logits) for out in wanted])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a path for a model": ({"model": "model.pt"}, "model is str; expected the PyTorch module that .*model.rmt was exported"),
    "a class for a model": ({"model": dict}, "model is type; expected the PyTorch module"),
    "a list of dtypes": ({"dtype": ["fp16"]}, r"no graphs are made for engine 'cuda' in \['fp16'\]; expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_of_add_engine_graphs(bundle: Path, name: str) -> None:
    arguments, message = WRONG[name]
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(ContractError, match=message):
        add_engine_graphs(bundle, **arguments)
    assert (bundle / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("options", [{"plain": "no"}, {"accept_drift": 1}, {"segments": 10**15}, {"check_segments": 1}])
def test_wrong_options_of_graphs_for_an_engine(options: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=r"expected True or False|goes through 65536 at most|expected at least 2"):
        EngineOptions(**options)


def test_a_strangers_names_do_not_steer_the_terminal(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((bundle / "verification.json").read_text())
    report["engine"] = report["rows"][0]["tokens"] = "\x1b[2J\x07"
    put(bundle, "verification.json", json.dumps(report).encode())
    monkeypatch.setattr(sys, "argv", ["rmt-info", str(bundle)])
    with pytest.raises(SystemExit, match="0"):
        info.main()
    assert "\x1b" not in capsys.readouterr().out
    alter(bundle, lambda m: m["spec"].update(form="\x1b[2J"))
    for name, main in (("rmt-info", info.main), ("rmt-verify", verify.main)):
        monkeypatch.setattr(sys, "argv", [name, str(bundle)])
        with pytest.raises(SystemExit, match="1"):
            main()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "\x1b" not in said


@pytest.mark.parametrize("library", ["cuda.core", "onnxruntime"])
def test_a_library_that_is_missing_is_named_with_its_pip_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        EngineError, match=rf"engine 'cuda' cannot run .*'{library}'.*pip install 'rmt-trt\[gpu\]'"
    ) as err:
        RMTRuntime(bundle, engine="cuda")
    assert "\n" not in str(err.value)


def test_an_onnx_runtime_without_cuda_is_named_with_its_pip_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        EngineError, match=r"has no CUDA provider\. .*pip uninstall onnxruntime; pip install 'rmt-trt\[gpu\]'"
    ):
        RMTRuntime(bundle, engine="cuda")
