"""rmt-info: what a bundle holds, and which engines and engine files this machine can run."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rmt_trt.bundle import REPORT, Bundle
from rmt_trt.commands.app import Debug, Version, new_app, printable, run_command
from rmt_trt.commands.engines_table import (
    engine_files_table,
    engine_rows,
    gpu_facts,
    gpu_line,
    providers_json,
    providers_table,
)
from rmt_trt.commands.report import drift_table, graphs_table
from rmt_trt.errors import FormatError
from rmt_trt.runtime.engines import PREFERENCE, refusal
from rmt_trt.runtime.providers import providers
from rmt_trt.runtime.source import Source, open_source

app = new_app()

DEVICE = 0  # the GPU that is asked about


@app.command()
def info(
    path: Annotated[
        Path, typer.Argument(help="A bundle (NAME.rmt), an ONNX graph, an engine (NAME.engine), or a checkpoint.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print it all as JSON.")] = False,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Prints what PATH holds, how it was verified, and which engines can run it here, or why not."""
    source = open_source(path)
    refusals = {name: refusal(name, source, None, DEVICE) for name in PREFERENCE}
    files, gpu, found = engine_rows(source, DEVICE), gpu_facts(DEVICE), providers(DEVICE)
    if as_json:
        more = {"engine_files": files, "gpu": gpu, "providers": providers_json(found)}
        print(json.dumps(_as_json(source, refusals) | more, indent=2))
        return
    screen = Console(highlight=False, markup=False, emoji=False)
    screen.print(_spec_table(source))
    if source.bundle is not None:
        screen.print(_files_table(source.bundle))
        screen.print(graphs_table(source.bundle))
        if REPORT in source.bundle.manifest.files:
            screen.print(_drift_table(source.bundle))
    screen.print(gpu_line(DEVICE, gpu))
    if files:
        screen.print(engine_files_table(files))
    screen.print(_engine_table(refusals))
    screen.print(providers_table(found))


def _drift_table(bundle: Bundle) -> Table:
    report = bundle.report()
    try:
        return drift_table(report)
    except (KeyError, IndexError, TypeError, ValueError) as err:  # a stranger's file may hold any JSON
        raise FormatError(
            f"{bundle.path / REPORT} is no verification report ({err!r}). Export the model again"
        ) from err


def _as_json(source: Source, refusals: dict[str, str | None]) -> dict[str, Any]:
    value: dict[str, Any] = {"path": str(source.path), "kind": source.kind, "spec": source.spec.to_json()}
    if source.bundle is not None:
        value["manifest"] = json.loads(source.bundle.manifest.to_json())
    value["engines"] = {name: {"runs": reason is None, "reason": reason} for name, reason in refusals.items()}
    return value


def _spec_table(source: Source) -> Table:
    spec = source.spec
    table = Table(title=str(source.path), title_justify="left", show_header=False)
    states = ", ".join(f"{s.input} -> {s.output} {tuple(s.shape)} {s.dtype}" for s in spec.states)
    logits = (
        f"{spec.num_logits} classes" if spec.logits == "classifier" else f"language model, {spec.num_logits} tokens"
    )
    rows = {
        "form": f"{spec.form}, {logits}",
        "segment": f"{spec.segment_length} text tokens, alignment {spec.alignment}",
        "states": states,
        "vocabulary": f"ids 0 to {spec.vocab_size - 1}, dropped: {list(spec.dropped_ids) or 'none'}",
        "answers": ", ".join(spec.id2label) or "no names",
        "trained on": f"{spec.max_segments} segments" if spec.max_segments else "not recorded",
        "text input": "yes, it holds its tokenizer" if source.tokenizer else "no tokenizer: token ids only",
        "fingerprint": spec.fingerprint[:16],
    }
    for name, text in rows.items():
        table.add_row(name, printable(text))
    return table


def _files_table(bundle: Bundle) -> Table:
    manifest = bundle.manifest
    made_by = ", ".join(printable(f"{name} {version}") for name, version in manifest.made_by.items())
    table = Table(title="files", title_justify="left", caption=f"made by {made_by}", caption_justify="left")
    table.add_column("file")
    table.add_column("MB", justify="right")
    for name, entry in sorted(manifest.files.items()):
        table.add_row(name, f"{entry.size / 1e6:.2f}")
    return table


def _engine_table(refusals: dict[str, str | None]) -> Table:
    table = Table(title=f"engines on this machine ({platform.machine()}, {platform.system()})", title_justify="left")
    table.add_column("engine")
    table.add_column("runs")
    table.add_column("why not")
    for name, reason in refusals.items():
        table.add_row(name, "no" if reason else "yes", printable(reason or ""))
    return table


def main() -> None:
    """Console entry point."""
    run_command("rmt-info", app)
