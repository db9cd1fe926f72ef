"""Model -> bundle: the graph, its initial state, its tokenizer, and the proof that it gives the model's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import transformers
from torch import nn

from rmt_trt import initial_state
from rmt_trt.bundle import INITIAL, REPORT, STEP, TOKENIZER, GraphEntry, Manifest, made_by, new_bundle, write_manifest
from rmt_trt.contract import StepSpec
from rmt_trt.export.step_to_onnx import EXTERNAL_DATA_BYTES, OPSET, export_step, initial_values
from rmt_trt.export.verify import Reference, Report, check_options, model_reference, step_reference, verify
from rmt_trt.files import sha256
from rmt_trt.model.checkpoint import LoadedModel
from rmt_trt.runtime import RMTRuntime

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportOptions:
    """segments: how many the verification goes through, one of them short. tolerance: None takes the table's.
    accept_drift keeps a bundle that breaches it. overwrite replaces a bundle that exists. external_data_bytes: weights
    of this many bytes and more go into a file beside the graph."""

    segments: int = 16
    tolerance: float | None = None
    accept_drift: bool = False
    overwrite: bool = False
    opset: int = OPSET
    external_data_bytes: int = EXTERNAL_DATA_BYTES

    def __post_init__(self) -> None:
        check_options(self.segments, self.tolerance)


def export_model(
    loaded: LoadedModel,
    path: Path | str,
    options: ExportOptions = ExportOptions(),
    source: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Writes the bundle `path` (NAME.rmt) of a model, verified against the plain PyTorch recurrence.

    source    the checkpoint's file or folder: its name, and a file's hash, are recorded
    progress  called with (stage, done, total)

    Nothing is left at `path` unless the verification passes, or drift is accepted. Errors: VerificationError for a
    breach, FormatError when `path` exists or cannot be written, ContractError when the model cannot be exported.
    """
    reference = model_reference(loaded.model)
    manifest = Manifest(loaded.spec, (), {}, _versions(), _source(source), loaded.model.config.to_json())
    initial = initial_values(loaded.model, loaded.spec, None)
    return _write(loaded.model, Path(path), options, manifest, initial, reference, loaded.tokenizer, progress)


def export_step_bundle(
    step: nn.Module,
    spec: StepSpec,
    path: Path | str,
    initial: Mapping[str, Any] | None = None,
    options: ExportOptions = ExportOptions(),
    tokenizer: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """The same for a step of the user's own: verified against the module itself, run plainly in PyTorch.

    step, spec, initial: as `export_step`. tokenizer: the text of a tokenizer.json. Errors: as `export_model`.
    """
    values = initial_values(step, spec, initial)
    reference = step_reference(step, spec, [values[state.initial] for state in spec.states])
    manifest = Manifest(spec, (), {}, _versions())
    return _write(step, Path(path), options, manifest, values, reference, tokenizer, progress)


def _write(
    step: nn.Module,
    path: Path,
    options: ExportOptions,
    manifest: Manifest,
    initial: Mapping[str, Any],
    reference: Reference,
    tokenizer: str | None,
    progress: Progress,
) -> Report:
    with new_bundle(path, options.overwrite) as folder:
        progress("export", 0, 1)
        graph = folder / STEP
        spec = export_step(
            step, manifest.spec, graph, initial, opset=options.opset, external_data_bytes=options.external_data_bytes
        )
        progress("export", 1, 1)
        (folder / INITIAL).write_bytes(initial_state.to_bytes(initial, spec))
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        data = tuple(p.name for p in folder.iterdir() if p.name.startswith(STEP) and p != graph)
        entry = GraphEntry(STEP, "step", "cpu", "fp32", "all", options.opset, data)
        manifest = replace(manifest, spec=spec, graphs=(entry,))
        write_manifest(folder, manifest)

        with RMTRuntime(folder, engine="cpu") as runtime:
            report = verify(
                runtime,
                reference,
                options.segments,
                options.tolerance,
                progress=lambda done, total: progress("verify", done, total),
            )
        if not options.accept_drift:
            report.require()
        (folder / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        summary = {
            "passed": report.passed,
            "worst": report.to_json()["worst"],
            "tolerance": report.tolerance,
            "segments": report.segments,
            "accepted_drift": not report.passed,
        }
        write_manifest(folder, replace(manifest, verification=summary))
    return report


def _versions() -> dict[str, str]:
    return made_by(
        torch=torch.__version__,
        transformers=transformers.__version__,
        onnx=onnx.__version__,
        onnxruntime=onnxruntime.__version__,
    )


def _source(path: Path | None) -> dict[str, Any]:
    """The checkpoint by name, never by its whole path: bundles travel."""
    if path is None:
        return {}
    return {"file": path.name} | ({"sha256": sha256(path)} if path.is_file() else {})
