"""rmt-info: what a bundle holds, and which engines and engine files this machine can run; what is inside one of them."""

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
from rmt_trt.commands.layers import Look, show_layers
from rmt_trt.commands.report import drift_table, graphs_table
from rmt_trt.errors import FormatError
from rmt_trt.runtime import native
from rmt_trt.runtime.engines import PREFERENCE, refusal
from rmt_trt.runtime.providers import providers
from rmt_trt.runtime.source import Source, open_source

app = new_app()


@app.command()
def info(
    path: Annotated[
        Path, typer.Argument(help="A bundle (NAME.rmt), an ONNX graph, an engine (NAME.engine), or a checkpoint.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print it all as JSON.")] = False,
    device: Annotated[int, typer.Option(min=0, help="The GPU that is asked about.")] = 0,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print instead the layers and tensors of a TensorRT engine; needs its GPU.")
    ] = False,
    layer_times: Annotated[
        Path | None, typer.Option(help="Run a TensorRT engine, print how long its layers take, and write that as JSON.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Which of a bundle's engines to look into: tensorrt, tensorrt-rtx.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="In which dtype.")] = None,
    head: Annotated[str | None, typer.Option(help="all: the one with logits; none: without.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Documents in its steps. [default: what it was tuned for]", show_default=False)
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Steps that are timed. [default: 50]", show_default=False)] = None,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Prints what PATH holds, how it was verified, and which engines can run it here, or why not."""
    look = Look(layers, layer_times, engine, dtype, head, batch, runs)
    look.check()
    source = open_source(path)
    if look.wanted:
        show_layers(source, look, device, as_json)
        return
    refusals = {name: refusal(name, source, None, device) for name in PREFERENCE}
    files, gpu, found = engine_rows(source, device), gpu_facts(device), providers(device)
    if as_json:
        own = {"library": native.library(), "not_used": native.unused()}
        hopper = {"not_used": native.lacking([native.HOPPER], device)}
        more = {"native": own, "hopper": hopper, "engine_files": files, "gpu": gpu, "providers": providers_json(found)}
        print(json.dumps(_as_json(source, refusals) | more, indent=2))
        return
    screen = Console(highlight=False, markup=False, emoji=False)
    screen.print(_spec_table(source))
    if source.bundle is not None:
        screen.print(_files_table(source.bundle))
        screen.print(graphs_table(source.bundle))
        if REPORT in source.bundle.manifest.files:
            screen.print(_drift_table(source.bundle))
    screen.print(gpu_line(device, gpu))
    if files:
        screen.print(engine_files_table(files))
    screen.print(_engine_table(refusals, device))
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


def _engine_table(refusals: dict[str, str | None], device: int) -> Table:
    table = Table(title=f"engines on this machine ({platform.machine()}, {platform.system()})", title_justify="left")
    table.add_column("engine")
    table.add_column("runs")
    table.add_column("why not")
    table.caption_justify, table.caption = "left", printable(f"native products of 'cuda': {_native_line(device)}")
    for name, reason in refusals.items():
        table.add_row(name, "no" if reason else "yes", printable(reason or ""))
    return table


def _native_line(device: int) -> str:
    """Whether graphs with rmt-trt's own operators are taken here, and those with kernels for one kind of GPU."""
    if reason := native.unused():
        return f"not used: {reason}"
    reason = native.lacking([native.HOPPER], device)
    return (
        f"from {native.library()}; kernels for one kind of GPU: {'used' if reason is None else f'not used: {reason}'}"
    )


def main() -> None:
    """Console entry point."""
    run_command("rmt-info", app)
