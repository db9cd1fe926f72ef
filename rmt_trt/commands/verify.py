"""rmt-verify: engines of a bundle against the PyTorch recurrence, over any number of segments."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmt_trt.bundle import Bundle, add_files
from rmt_trt.commands.app import Debug, Version, console, new_app, run_command, stage_progress
from rmt_trt.commands.engine_options import parse_dtypes
from rmt_trt.commands.inputs import read_input
from rmt_trt.commands.reference import bundle_model
from rmt_trt.commands.report import drift_table
from rmt_trt.errors import ContractError, FormatError, VerificationError, require
from rmt_trt.files import check_target, write_file

if TYPE_CHECKING:
    from rmt_trt.export.drift_report import Report
    from rmt_trt.export.verify import Documents, Reference
    from rmt_trt.runtime import RMTRuntime

app = new_app()

SEGMENTS = 16  # of random ids


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.rmt.")],
    segments: Annotated[
        int | None,
        typer.Option(help=f"Segments to go through, one of them short. [default: {SEGMENTS}; of --data all]"),
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, cpu, cuda, tensorrt, tensorrt-rtx.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16, int8, ...; several with commas, beside one reference.")
    ] = None,
    device: Annotated[int, typer.Option(help="GPU index.")] = 0,
    model: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint to compare with. [default: the one beside the bundle, or the bundle's own model]"
        ),
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative L2 error. [default: of the dtype]")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A document of your own: ids (.npy) or text. [default: random ids]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random documents.")] = 0,
    record: Annotated[bool, typer.Option("--record", help="Write the verdict into the bundle's manifest.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the whole report as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw errors and answers by segment into this .png.")] = None,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Compares memory, logits and answers after every segment; exit 1 when they drift more than the tolerance."""
    dtypes = _dtypes(dtype, record)
    _check_files(out, plot)
    for module in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "rmt-verify")
    from rmt_trt.export.verify import check_options, verify_all
    from rmt_trt.runtime import RMTRuntime

    check_options(SEGMENTS if segments is None else segments, tolerance)
    opened = Bundle(bundle)
    screen = console()
    with ExitStack() as stack:
        runtimes = [stack.enter_context(RMTRuntime(bundle, engine, one, device)) for one in dtypes]
        if record and (runtimes[0].engine, runtimes[0].dtype) == ("cpu", "fp32"):
            raise ContractError(
                "--record is for an engine's graphs, and this is step.onnx on the CPU, whose verdict the export recorded. "
                "Name the engine (--engine cuda --dtype fp16), or leave --record out"
            )
        documents = _documents(runtimes[0], data, segments, seed)
        reference, name = _reference(opened, model, runtimes, stack)
        bars = stack.enter_context(stage_progress(screen))
        task = bars.add_task(f"verifying on {', '.join(sorted({one.engine for one in runtimes}))}", total=None)
        reports = verify_all(
            runtimes, reference, documents, tolerance, name,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )  # fmt: skip
    for report in reports:
        screen.print(drift_table(report.to_json()))
    _write(reports, out, plot)
    if record:
        _record(bundle, reports[0], device)
    _require(reports)


def _dtypes(dtype: str | None, record: bool) -> tuple[str | None, ...]:
    """Errors: ContractError, for dtypes that are unknown or named twice, and for --record of several."""
    if dtype is None:
        return (None,)
    found = parse_dtypes(dtype)
    twice = [one for one in found if dtype.split(",").count(one) > 1]
    if twice:
        raise ContractError(f"--dtype {dtype} names {twice[0]} twice; expected each dtype once")
    if record and len(found) > 1:
        raise ContractError(
            f"--record writes the verdict of one dtype, and --dtype names {len(found)}: {dtype}. Give one"
        )
    return found


def _check_files(out: Path | None, plot: Path | None) -> None:
    """Says before the work what would stop the report or the plot. Errors: ContractError, EngineError, FormatError."""
    if out is not None:
        check_target(out)
    if plot is None:
        return
    if plot.suffix.lower() != ".png":
        raise ContractError(f"--plot is {plot}; expected the name of a picture that ends in .png")
    if out is not None and out.resolve() == plot.resolve():
        raise ContractError(f"--out and --plot are both {plot}; expected two files")
    check_target(plot)
    require("matplotlib", "analyze", "--plot")


def _documents(runtime: RMTRuntime, data: Path | None, segments: int | None, seed: int) -> Documents:
    from rmt_trt.export.verify import own_documents, random_documents

    if data is None:
        return random_documents(runtime.spec, SEGMENTS if segments is None else segments, seed)
    tokens = read_input(data, ids=False, skip=0)
    if isinstance(tokens, str):
        tokens = runtime.encode(tokens)
    if tokens.ndim != 1:
        raise ContractError(
            f"{data} holds an array of shape {tokens.shape}; expected the ids of one document, so one axis"
        )
    return own_documents(runtime.spec, tokens, segments, str(data))


def _reference(
    bundle: Bundle, model: Path | None, runtimes: list[RMTRuntime], stack: ExitStack
) -> tuple[Reference, str]:
    """What the engines are compared with, and its name."""
    from rmt_trt.export.verify import engine_reference, model_reference
    from rmt_trt.runtime import RMTRuntime

    if bundle.manifest.model is not None or model is not None:
        return model_reference(bundle_model(bundle, model)), "PyTorch recurrence"
    if any(one.engine == "cpu" and one.dtype == "fp32" for one in runtimes):
        raise FormatError(
            f"{bundle.path} holds a step of the user's own, whose PyTorch module no file describes: its fp32 graph is what "
            f"others are compared with. It was verified when it was exported"
        )
    exact = stack.enter_context(RMTRuntime(bundle.path, engine="cpu", dtype="fp32"))
    return engine_reference(exact), "fp32 graph on the CPU"


def _write(reports: tuple[Report, ...], out: Path | None, plot: Path | None) -> None:
    """The report of one dtype as it is, of several as a list under "reports"; the plot with all of them."""
    if out is not None:
        values = [report.to_json() for report in reports]
        value = values[0] if len(values) == 1 else {"reports": values}
        write_file(out, (json.dumps(value, indent=2) + "\n").encode())
    if plot is not None:
        from rmt_trt.export.drift_plot import draw

        draw(plot, reports)


def _require(reports: tuple[Report, ...]) -> None:
    """Errors: VerificationError, in which every report that did not pass has its say."""
    failed: list[VerificationError] = []
    for report in reports:
        try:
            report.require()
        except VerificationError as err:
            failed.append(err)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise VerificationError("; ".join(map(str, failed)), {"reports": [err.report for err in failed]})


def _record(path: Path, report: Report, device: int = 0) -> None:
    """Puts the verdict into the manifest, beside what the export recorded of these graphs: of those that need something,
    where these were what ran, beside theirs."""
    from rmt_trt.export.added import recorded, summary
    from rmt_trt.runtime import native

    def changed(old: dict[str, Any]) -> dict[str, Any]:
        engines = old.get("engines")
        before = engines.get(report.engine) if isinstance(engines, dict) else None
        record = before.get(report.dtype) if isinstance(before, dict) else None
        record = dict(record) if isinstance(record, dict) else {}
        record.pop("verified_on", None)
        verdict = summary(report) | {"accepted_drift": False}  # nobody was asked to keep it
        proof: dict[str, Any] = {"verification": verdict, "unverified": None}
        for need in (native.HOPPER, native.NEED):
            own = record.get(need)
            if isinstance(own, dict) and native.lacking([need], device) is None:
                proof = {need: {**own, **proof}}
                break
        return recorded(old, report.engine, report.dtype, {**record, **proof})

    add_files(path, {}, verification=changed)


def main() -> None:
    """Console entry point."""
    run_command("rmt-verify", app)
