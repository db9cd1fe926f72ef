"""Export of a user's own step, what is refused, and the verification that a bundle must pass."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import check_parity, made
from steps import LENGTH, ONE_STATE, TWO_STATES, VOCAB, GatedStep, Plain, broken, left_in
from torch import nn

from rmt_trt import ContractError, FormatError, RMTRuntime, StateSpec, StepSpec, VerificationError
from rmt_trt.bundle import Bundle
from rmt_trt.commands import verify
from rmt_trt.commands.report import drift_table
from rmt_trt.export import ExportOptions, export_model, export_step, export_step_bundle
from rmt_trt.export import bundle as exporting
from rmt_trt.model.checkpoint import LoadOptions, load_model


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of GatedStep."""
    path = tmp_path_factory.mktemp("gated") / "gated.rmt"
    export_step_bundle(GatedStep(), TWO_STATES, path, options=ExportOptions(segments=8))
    return path


def test_a_step_of_ones_own_with_two_states_runs_as_it_does_in_torch(gated: Path) -> None:
    step, tokens = GatedStep(), np.random.default_rng(0).integers(0, VOCAB, 5 * LENGTH + 4)
    states, wanted = (step.hidden0[None], step.table0[None]), []
    with torch.no_grad():
        for start in range(0, len(tokens), LENGTH):
            *states, logits = step(*states, torch.from_numpy(tokens[start : start + LENGTH])[None])
            wanted.append((states[1][0].numpy(), logits[0].numpy()))
    with RMTRuntime(gated, engine="cpu", threads=1) as runtime:
        pieces = list(runtime.stream(tokens, memory=True))
        check_parity([(piece.states[1], piece.logits) for piece in pieces], wanted)
        out = runtime.run(tokens)
        assert {name: value.shape for name, value in out.states.items()} == {"hidden": (16,), "table": (3, 16)}
        np.testing.assert_allclose(out.states["hidden"], states[0][0].detach(), rtol=1e-4, atol=1e-5)
        first = runtime.run(tokens[: LENGTH + 5]).state
        second = runtime.run(tokens[LENGTH + 5 :], state=first)
        assert all(np.array_equal(second.states[name], out.states[name]) for name in out.states)
        batch = runtime.run([tokens, tokens[:3], tokens[:LENGTH]], logits="loglik")
        alone = runtime.run(tokens[:3], logits="loglik")
        np.testing.assert_allclose(batch[1].loglik, alone.loglik, rtol=1e-4)


def test_its_graph_alone_runs_too_and_says_who_it_is(tmp_path: Path) -> None:
    spec = export_step(GatedStep(), TWO_STATES, tmp_path / "gated.onnx")
    assert re.fullmatch("[0-9a-f]{64}", spec.fingerprint)
    assert spec.with_(fingerprint="") == TWO_STATES
    with RMTRuntime(tmp_path / "gated.onnx", engine="cpu", threads=1) as runtime:
        assert runtime.spec == spec
        assert runtime.run([3, 4, 5]).segments == 1
    graph = onnx.load(tmp_path / "gated.onnx").graph
    assert [value.name for value in graph.input] == ["hidden", "table", "segment"]
    assert [value.name for value in graph.output] == ["new_hidden", "new_table", "logits"]


def test_the_initial_state_may_be_given_apart_from_the_step(tmp_path: Path) -> None:
    start = np.arange(8, dtype=np.float64)[None]
    export_step(Plain(), ONE_STATE, tmp_path / "plain.onnx", {"memory": start})
    with RMTRuntime(tmp_path / "plain.onnx", engine="cpu", threads=1) as runtime:
        piece = next(runtime.stream([0], memory=True))
    embedding = Plain().embed.weight
    assert piece.memory.shape == embedding[:1].shape
    assert not np.allclose(piece.memory, 0)


def freezes_the_batch(new: torch.Tensor, logits: torch.Tensor, segment: torch.Tensor) -> Any:
    return new.reshape(2, 1, 8), logits


def freezes_the_text(new: torch.Tensor, logits: torch.Tensor, segment: torch.Tensor) -> Any:
    return new + (segment * torch.ones(6, dtype=torch.int64)).sum(1)[:, None, None], logits


def branches_on_a_value(new: torch.Tensor, logits: torch.Tensor, segment: torch.Tensor) -> Any:
    return (new, logits) if segment.sum() > 3 else (new + 1, logits)


REFUSED = {
    freezes_the_batch: r"froze axes \[0\] of 'memory' to \[2\].*any batch and length",
    freezes_the_text: r"froze axes \[1\] of 'segment' to \[6\].*any batch and length",
    branches_on_a_value: r"cannot be exported to ONNX by torch .*data-dependent.*without branches on values",
}
MISSHAPEN: dict[str, tuple[Callable[..., Any], str]] = {
    "outputs in the wrong order": (
        lambda new, logits, segment: (logits, new),
        r"gives 'new_memory' as \(batch, 3\) FLOAT; the spec says \(batch, 1, 8\) float32. Does the step return",
    ),
    "state without an axis": (lambda new, logits, segment: (new[:, 0], logits), r"'new_memory' as \(batch, 8\)"),
    "state of another dtype": (lambda new, logits, segment: (new.half(), logits), r"'new_memory' as .* FLOAT16"),
    "logits of another width": (lambda new, logits, segment: (new, logits[:, :2]), r"'logits' as \(batch, 2\)"),
    "logits of another rank": (lambda new, logits, segment: (new, logits[:, None]), r"'logits' as \(batch, 1, 3\)"),
    "logits of another dtype": (lambda new, logits, segment: (new, logits.half()), r"'logits' as .* FLOAT16"),
    "no logits": (lambda new, logits, segment: new, r"outputs \['new_memory'\]; the spec says .* and then its logits"),
    "one output more": (lambda new, logits, segment: (new, logits, logits + 1), r"outputs \['new_memory', 'logits', "),
}


@pytest.mark.parametrize("answer", REFUSED, ids=lambda answer: answer.__name__)
def test_a_step_that_works_for_some_sizes_only_is_refused(answer: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=REFUSED[answer]):
        export_step_bundle(broken(answer), ONE_STATE, tmp_path / "broken.rmt")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", MISSHAPEN)
def test_a_step_whose_outputs_do_not_fit_its_spec_is_refused(name: str, tmp_path: Path) -> None:
    answer, message = MISSHAPEN[name]
    with pytest.raises(ContractError, match=message):
        export_step(broken(answer), ONE_STATE, tmp_path / "broken.onnx")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        ({}, r"initial value of state 'memory' is unknown.*Pass initial=\{'memory': array of shape \(1, 8\)\}"),
        ({"other": np.zeros((1, 8))}, "initial value of state 'memory' is unknown"),
        ({"memory": np.zeros((2, 8))}, r"initial state 'memory' is \(2, 8\); expected \(1, 8\)"),
        ({"memory": np.full((1, 8), np.nan)}, "every value finite"),
        ({"memory": "zeros"}, r"initial value of state 'memory' cannot be read as numbers .*; expected \(1, 8\)"),
    ],
)
def test_an_initial_state_that_does_not_fit_is_refused(initial: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=message):
        export_step(Plain(), ONE_STATE, tmp_path / "plain.onnx", initial)
    assert left_in(tmp_path) == []


def test_a_step_without_the_attribute_asks_for_its_initial_state(tmp_path: Path) -> None:
    step = Plain()
    del step.memory
    with pytest.raises(ContractError, match="the step has no attribute of that name"):
        export_step(step, ONE_STATE, tmp_path / "plain.onnx")


def test_a_step_without_weights_is_exported(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> Any:
            return memory + (segment >= 0).sum(1)[:, None], memory * 1.0

    spec = StepSpec("custom", (StateSpec(shape=(1,)),), LENGTH, VOCAB, "classifier", 1)
    export_step_bundle(Counting(), spec, tmp_path / "counting.rmt", {"memory": np.zeros(1)})
    with RMTRuntime(tmp_path / "counting.rmt", engine="cpu", threads=1) as runtime:
        assert runtime.run([1] * 100).memory.tolist() == [100.0]


def ignores_padding(new: torch.Tensor, logits: torch.Tensor, segment: torch.Tensor) -> Any:
    return new + 0.1 * (segment < 0).sum(1)[:, None, None], logits


def test_a_step_that_lets_padding_through_fails_the_verification(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"drifts from the .* first in a batch"):
        export_step_bundle(broken(ignores_padding), ONE_STATE, tmp_path / "padding.rmt")
    assert left_in(tmp_path) == []


def test_a_breach_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"drifts .* more than 1.0e-12.*--tolerance.*--accept-drift"):
        export_step_bundle(
            GatedStep(), TWO_STATES, tmp_path / "gated.rmt", options=ExportOptions(segments=4, tolerance=1e-12)
        )
    assert left_in(tmp_path) == []


def test_accepted_drift_keeps_the_bundle_and_the_manifest_says_so(tmp_path: Path) -> None:
    options = ExportOptions(segments=4, tolerance=1e-12, accept_drift=True)
    report = export_step_bundle(GatedStep(), TWO_STATES, tmp_path / "drift.rmt", options=options)
    assert not report.passed
    opened = Bundle(tmp_path / "drift.rmt")
    stated = opened.manifest.verification
    assert stated["passed"] is False
    assert stated["accepted_drift"] is True
    assert stated["worst"] == report.worst > stated["tolerance"] == 1e-12
    assert opened.report()["passed"] is False
    with RMTRuntime(tmp_path / "drift.rmt", engine="cpu", threads=1) as runtime:
        assert runtime.run([5, 6]).segments == 1


def test_a_bundle_that_passes_says_so_with_its_figures() -> None:
    this = made("gpt2")
    stated = Bundle(this.bundle).manifest.verification
    assert (stated["passed"], stated["accepted_drift"], stated["segments"]) == (True, False, 4)
    assert stated["worst"] == this.report.worst <= stated["tolerance"] == 1e-4
    assert [row.segment for row in this.report.rows] == [1, 2, 3, 4]
    assert Bundle(this.bundle).report() == json.loads(json.dumps(this.report.to_json()))


def test_a_bundle_exported_with_another_alignment_and_other_dropped_ids_is_verified_again_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    this = made("bert")
    loaded = load_model(this.checkpoint, LoadOptions(alignment="center", drop_ids=(0, 7)))
    export_model(loaded, tmp_path / "center.rmt", ExportOptions(segments=3))
    command = [
        "rmt-verify",
        tmp_path / "center.rmt",
        "--model",
        this.checkpoint,
        "--segments",
        4,
        "-o",
        tmp_path / "r.json",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as ended:
        verify.main()
    assert not ended.value.code
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (report["passed"], report["segments"], len(report["rows"])) == (True, 4, 4)


def test_a_graph_with_altered_weights_does_not_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def alter(step: nn.Module, spec: StepSpec, path: Path, *rest: Any, **options: Any) -> StepSpec:
        spec = export_step(step, spec, path, *rest, **options)
        model = onnx.load(path)
        largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        values = np.frombuffer(largest.raw_data, np.float32) * 1.01
        largest.raw_data = values.astype(np.float32).tobytes()
        onnx.save(model, path)
        return spec

    monkeypatch.setattr(exporting, "export_step", alter)
    with pytest.raises(VerificationError, match="drifts"):
        export_step_bundle(GatedStep(), TWO_STATES, tmp_path / "gated.rmt", options=ExportOptions(segments=2))
    assert left_in(tmp_path) == []


def test_a_graph_that_cannot_be_written_whole_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step.onnx"
    export_step(GatedStep(), TWO_STATES, path)
    before = path.read_bytes()

    def fails(file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rmt_trt.export.step_to_onnx.sync", fails)
    with pytest.raises(FormatError, match=r"cannot write .*step\.onnx: No space left on device\. .*free some space"):
        export_step(GatedStep(), TWO_STATES, path, external_data_bytes=0)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_is_not_finite_is_json_all_the_same() -> None:
    report = replace(made("bert").report, batch_memory=float("nan"), memory_effect=float("inf"))
    assert not report.passed
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (value["batch_memory"], value["memory_effect"], value["worst"]) == (None, None, None)
    table = drift_table(value)
    assert "not finite" in str(table.caption)
    assert "an unknown share" in str(table.caption)
