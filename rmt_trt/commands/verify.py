"""rmt-verify: an engine of a bundle against the PyTorch recurrence, over any number of segments."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmt_trt.bundle import Bundle, add_files
from rmt_trt.commands.app import Debug, Version, console, new_app, run_command, stage_progress
from rmt_trt.commands.reference import bundle_model
from rmt_trt.commands.report import drift_table
from rmt_trt.errors import ContractError, FormatError, require
from rmt_trt.files import check_target, write_file

if TYPE_CHECKING:
    from rmt_trt.export.verify import Report

app = new_app()


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.rmt.")],
    segments: Annotated[int, typer.Option(help="Segments to go through, one of them short.")] = 16,
    engine: Annotated[str, typer.Option(help="auto, cpu, cuda, tensorrt, tensorrt-rtx.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16, int8, fp8.")] = None,
    device: Annotated[int, typer.Option(help="GPU index.")] = 0,
    model: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint to compare with. [default: the one beside the bundle, or the bundle's own model]"
        ),
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative L2 error. [default: of the dtype]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random documents.")] = 0,
    record: Annotated[bool, typer.Option("--record", help="Write the verdict into the bundle's manifest.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the whole report as JSON.")] = None,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Compares memory and logits after every segment; exit 1 when they drift more than the tolerance."""
    for module in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "rmt-verify")
    from rmt_trt.export.verify import check_options, engine_reference, model_reference
    from rmt_trt.export.verify import verify as run_verification
    from rmt_trt.runtime import RMTRuntime

    check_options(segments, tolerance)
    if out is not None:
        check_target(out)
    opened = Bundle(bundle)
    screen = console()
    with ExitStack() as stack:
        runtime = stack.enter_context(RMTRuntime(bundle, engine=engine, dtype=dtype, device=device))
        if record and (runtime.engine, runtime.dtype) == ("cpu", "fp32"):
            raise ContractError(
                "--record is for an engine's graphs, and this is step.onnx on the CPU, whose verdict the export recorded. "
                "Name the engine (--engine cuda --dtype fp16), or leave --record out"
            )
        if opened.manifest.model is not None or model is not None:
            reference, name = model_reference(bundle_model(opened, model)), "PyTorch recurrence"
        elif runtime.engine == "cpu" and runtime.dtype == "fp32":
            raise FormatError(
                f"{bundle} holds a step of the user's own, whose PyTorch module no file describes: its fp32 graph is what "
                f"others are compared with. It was verified when it was exported"
            )
        else:
            exact = stack.enter_context(RMTRuntime(bundle, engine="cpu", dtype="fp32"))
            reference, name = engine_reference(exact), "fp32 graph on the CPU"
        bars = stack.enter_context(stage_progress(screen))
        task = bars.add_task(f"verifying on {runtime.engine}", total=None)
        report = run_verification(
            runtime, reference, segments, tolerance, seed, name,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )  # fmt: skip
    screen.print(drift_table(report.to_json()))
    if out is not None:
        write_file(out, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    if record:
        _record(bundle, runtime.engine, runtime.dtype, report)
    report.require()


def _record(path: Path, engine: str, dtype: str, report: Report) -> None:
    """Puts the verdict into the manifest, beside what the export recorded of these graphs."""
    from rmt_trt.export.engine_graphs import recorded, summary

    def changed(old: dict[str, Any]) -> dict[str, Any]:
        engines = old.get("engines")
        before = engines.get(engine) if isinstance(engines, dict) else None
        record = before.get(dtype) if isinstance(before, dict) else None
        record = record if isinstance(record, dict) else {}
        verdict = summary(report) | {"accepted_drift": False}  # nobody was asked to keep it
        return recorded(old, engine, dtype, {**record, "verification": verdict, "unverified": None})

    add_files(path, {}, verification=changed)


def main() -> None:
    """Console entry point."""
    run_command("rmt-verify", app)
