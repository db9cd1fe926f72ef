"""rmt-export: a trained checkpoint becomes a bundle, verified against the PyTorch recurrence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rmt_trt.commands.app import Debug, Version, console, new_app, run_command, stage_progress
from rmt_trt.commands.report import drift_table
from rmt_trt.contract import ALIGNMENTS
from rmt_trt.errors import ContractError, FormatError, VerificationError, require
from rmt_trt.files import check_target

app = new_app()

LABELS = {"load": "reading the checkpoint", "export": "exporting the segment step", "verify": "verifying"}


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="model.pt, or a checkpoint as the published RMT trainers write it.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The bundle to write. [default: MODEL's name.rmt]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Backbone config.json, or a folder that holds one.")] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Form E: positions of a full segment, all counted (512).")
    ] = None,
    segment_size: Annotated[int | None, typer.Option(help="Form D: text tokens of a segment.")] = None,
    alignment: Annotated[str | None, typer.Option(help="left, right or center: which segment may be short.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, or a folder that holds one.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="alpha of the LoRA weights in the checkpoint.")] = None,
    drop_ids: Annotated[str | None, typer.Option(help="Ids dropped from documents: 0,101,102; '' for none.")] = None,
    max_segments: Annotated[
        int | None, typer.Option(help="Segments it was trained on; a record, never a limit.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the classes in order: no,yes.")] = None,
    segments: Annotated[int, typer.Option(help="Segments that the verification goes through.")] = 16,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative L2 error. [default: 1e-4 for fp32]")] = None,
    accept_drift: Annotated[bool, typer.Option("--accept-drift", help="Keep a bundle that breaches it.")] = False,
    save_model: Annotated[
        Path | None, typer.Option(help="Also write the checkpoint as model.pt, flags included.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that exists.")] = False,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Exports the segment step of MODEL to ONNX and proves it along the recurrence.

    The bundle appears only when the exported graph gives the numbers of the PyTorch recurrence.
    """
    target = out or default_bundle(model)
    if target.exists() and not overwrite:  # said before minutes of work, and checked again when it is written
        raise FormatError(f"{target} exists already. Choose another name (-o), or replace it with --overwrite")
    if save_model is not None:
        check_target(save_model)
    if alignment is not None and alignment not in ALIGNMENTS:
        raise ContractError(f"--alignment is {alignment!r}; expected one of {', '.join(ALIGNMENTS)}")
    for module in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "rmt-export")
    from rmt_trt.export import ExportOptions, export_model
    from rmt_trt.model.checkpoint import LoadOptions, load_model
    from rmt_trt.model.checkpoint import save_model as write_model

    screen = console()
    started = time.perf_counter()
    flags = LoadOptions(
        config=config, input_size=input_size, segment_size=segment_size, alignment=alignment,
        tokenizer=tokenizer, lora_alpha=lora_alpha, drop_ids=whole_numbers(drop_ids), max_segments=max_segments,
        labels=None if labels is None else tuple(labels.split(",")),
    )  # fmt: skip
    options = ExportOptions(segments=segments, tolerance=tolerance, accept_drift=accept_drift, overwrite=overwrite)
    with stage_progress(screen) as bars:
        tasks: dict[str, Any] = {"load": bars.add_task(LABELS["load"], total=1)}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(LABELS[stage], total=total)
            bars.update(tasks[stage], completed=done, total=total)

        loaded = load_model(model, flags)
        show("load", 1, 1)
        try:
            report = export_model(loaded, target, options, source=model, progress=show)
        except VerificationError as err:
            screen.print(drift_table(err.report))
            raise
        if save_model is not None:
            write_model(save_model, loaded.model, loaded.tokenizer)
    screen.print(drift_table(report.to_json()))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    verdict = "verified" if report.passed else "KEPT ALTHOUGH IT DRIFTS"
    screen.print(
        f"{target}: {verdict}, {size / 1e6:.1f} MB, in {time.perf_counter() - started:.1f} s. "
        f"Try: rmt-run {target} {'book.txt' if loaded.tokenizer else 'tokens.npy'}"
    )


def default_bundle(model: Path) -> Path:
    """NAME.rmt beside the checkpoint."""
    named = model if model.name not in ("", "..") else model.resolve()
    return named.with_name((named.stem if named.is_file() else named.name) + ".rmt")


def whole_numbers(text: str | None) -> tuple[int, ...] | None:
    """Ids of a flag such as --drop-ids 0,101. Errors: ContractError."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as err:
        raise ContractError(f"--drop-ids is {text!r}; expected whole numbers with commas, such as 0,101,102") from err


def main() -> None:
    """Console entry point."""
    run_command("rmt-export", app)
