"""rmt-bench: a deployed RMT beside everything that a user could run instead, measured in one run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rmt_trt.commands.app import Debug, Version, console, new_app, run_command
from rmt_trt.errors import ContractError, require
from rmt_trt.files import checked_path

app = new_app()

PAPER_WIDTH = 170  # characters of a line that no terminal bounds
GPU_PEERS, CPU_PEERS = "published,lean,ort,full", "published,lean,ort"
SINGLE_PEERS = "published-eager, -graph, -compile, lean-eager, -graph, -compile"
MANY_DOCUMENTS, QUICK_DOCUMENTS = 512, 192
GPU_TOKENS, CPU_TOKENS = "4096,65536,1048576,2000000", "4096,16384"


@app.command()
def bench(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE_OR_MODEL]", help="A bundle with the engine's graphs, or a checkpoint."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="bert-base, gpt2-small, llama-1b (random weights), or example.")
    ] = None,
    engine: Annotated[str, typer.Option(help="cpu, cuda.")] = "cuda",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16. [default: fp16 on a GPU, else fp32]")] = None,
    device: Annotated[int, typer.Option(help="GPU index.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a step.")] = None,
    batch: Annotated[str, typer.Option(help="Documents stepped together, with commas.")] = "1,8,32",
    tokens: Annotated[
        str | None, typer.Option(help=f"Lengths at batch 1. [default: {GPU_TOKENS}; {CPU_TOKENS} on a CPU]")
    ] = None,
    peers: Annotated[
        str | None, typer.Option(help=f"Some of {GPU_PEERS}, {SINGLE_PEERS}; '' for none. [default: all of the device]")
    ] = None,
    compile_mode: Annotated[
        str, typer.Option(help="Of torch.compile: default, or max-autotune, which takes minutes.")
    ] = "max-autotune",
    budget: Annotated[
        float | None, typer.Option(help="Seconds in all: the most important first, what no longer fits is left out.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Repeats of a measurement, as far as time allows.")] = 20,
    steps: Annotated[int | None, typer.Option(help="Full segments in a run that compares engines.")] = None,
    full_seconds: Annotated[float | None, typer.Option(help="Longest pass of full attention. [default: 30]")] = None,
    compare: Annotated[bool, typer.Option(help="Measure the steps, lengths and peers.")] = True,
    many: Annotated[bool, typer.Option("--many", help="Many documents of unequal lengths.")] = False,
    many_documents: Annotated[
        int | None, typer.Option(help=f"How many. [default: {MANY_DOCUMENTS}; {QUICK_DOCUMENTS} with --quick]")
    ] = None,
    many_segments: Annotated[str, typer.Option(help="Their segments, from and to.")] = "10,1000",
    slots: Annotated[int, typer.Option(help="Documents of --many that are stepped together.")] = 32,
    drift: Annotated[
        bool, typer.Option("--drift", help="The memory's distance from fp32 along the recurrence.")
    ] = False,
    drift_dtypes: Annotated[str, typer.Option(help="Dtypes of --drift.")] = "fp16,bf16",
    drift_reference: Annotated[str | None, typer.Option(help="Engine of its fp32. [default: --engine]")] = None,
    segments: Annotated[int, typer.Option(help="Segments of --drift.")] = 4096,
    growth: Annotated[bool, typer.Option("--growth", help="Memory and time along a very long text.")] = False,
    growth_tokens: Annotated[int, typer.Option(help="Tokens of --growth.")] = 20_000_000,
    kernels: Annotated[bool, typer.Option("--kernels", help="Record the GPU's kernels by name.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats, variants and sizes of the peers.")] = False,
    suite: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Measure every preset and recall, each in a process of its own, into FOLDER; takes --budget, --quick, "
            "--device, --compile-mode and --work.",
        ),
    ] = None,
    work: Annotated[Path, typer.Option(help="Where bundles and exports are made, and found again.")] = Path(
        "bench-work"
    ),
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of results.json, results.md and plots.")] = Path(
        "bench"
    ),
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Measures a model through the runtime, and PyTorch, ONNX Runtime and full attention beside it, in one process."""
    for module in ("torch", "transformers", "onnx", "onnxruntime"):
        require(module, "bench", "rmt-bench")
    if suite is not None:
        if model is not None or preset is not None:
            raise ContractError("--suite measures every preset; give no model and no --preset with it")
        _check_folder("--suite", suite)
        return _suite(suite, work, device, budget, quick, compile_mode)
    from rmt_trt.benchmarks.bench import Extra, run_benchmark
    from rmt_trt.benchmarks.budget import Budget
    from rmt_trt.benchmarks.machine import require_device
    from rmt_trt.benchmarks.many import ManyOptions
    from rmt_trt.benchmarks.plan import COMPARED_DTYPES, Plan
    from rmt_trt.benchmarks.presets import prepare, preset_config
    from rmt_trt.benchmarks.report import sections
    from rmt_trt.benchmarks.tables import screen_table

    gpu = engine != "cpu"
    plan = Plan(
        engine=engine, dtype=dtype or ("fp16" if gpu else "fp32"), device=device, threads=threads, repeat=repeat,
        batches=whole_numbers("--batch", batch),
        tokens=whole_numbers("--tokens", tokens or (GPU_TOKENS if gpu else CPU_TOKENS)),
        peers=names(peers if peers is not None else (GPU_PEERS if gpu else CPU_PEERS)),
        steps=steps, quick=quick, compile_mode=compile_mode, full_seconds=full_seconds or (3.0 if quick else 30.0),
    )  # fmt: skip
    if preset not in (None, "example"):
        preset_config(str(preset))
    unknown = [name for name in names(drift_dtypes) if name not in COMPARED_DTYPES]
    if unknown:
        raise ContractError(f"--drift-dtypes names {unknown[0]!r}; expected some of {', '.join(COMPARED_DTYPES)}")
    _check_folder("--out", out)
    if gpu:
        require_device(device)
    bounds = whole_numbers("--many-segments", many_segments)
    if len(bounds) != 2:
        raise ContractError(f"--many-segments is {many_segments!r}; expected two whole numbers, such as 10,1000")
    if segments < 2 or growth_tokens < 1:
        raise ContractError(f"--segments is {segments} and --growth-tokens {growth_tokens}; expected at least 2 and 1")
    count = many_documents if many_documents is not None else QUICK_DOCUMENTS if quick else MANY_DOCUMENTS
    extra = Extra(
        compare=compare, many=ManyOptions(count, *bounds, slots) if many else None, kernels=kernels,
        drift=segments if drift else None, drift_dtypes=names(drift_dtypes), drift_reference=drift_reference,
        growth=growth_tokens if growth else None,
    )  # fmt: skip
    screen = console()
    limit = Budget(budget)
    started = time.perf_counter()

    def say(text: str) -> None:
        screen.print(f"[{time.perf_counter() - started:6.1f} s] {text}")

    source = checked_path(model) if model is not None else None
    wanted = dict.fromkeys((plan.dtype, *(("fp32", *extra.drift_dtypes) if drift else ())))
    prepared = prepare(source, preset, work, engine, tuple(wanted), say)
    results = run_benchmark(prepared, plan, extra, out, work, say, limit)
    for section in sections(results.head, results.rows):
        _paper().print(screen_table(section))
    screen.print(f"{out}/results.json, {out}/results.md, in {time.perf_counter() - started:.1f} s")


def _suite(folder: Path, work: Path, device: int, budget: float | None, quick: bool, compile_mode: str) -> None:
    from rmt_trt.benchmarks.machine import require_device
    from rmt_trt.benchmarks.suite import SUMMARY, SuiteOptions, run_suite
    from rmt_trt.benchmarks.tables import screen_table

    require_device(device)
    screen = console()
    section = run_suite(folder, work, SuiteOptions(budget, quick, device, compile_mode), screen.print)
    _paper().print(screen_table(section))
    screen.print(f"{folder}/{SUMMARY}")


def _check_folder(flag: str, path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ContractError(f"{flag} is {path}, a file; expected a folder, which is made where it is missing")


def _paper() -> Console:
    """Where the tables go: standard output."""
    return Console(width=None if sys.stdout.isatty() else PAPER_WIDTH, highlight=False, markup=False, emoji=False)


def names(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Numbers between commas. Errors: ContractError, naming the flag."""
    try:
        return tuple(int(part.replace("_", "")) for part in names(text))
    except ValueError as err:
        raise ContractError(f"{flag} is {text!r}; expected whole numbers with commas, such as 1,8,32") from err


def main() -> None:
    """Console entry point."""
    run_command("rmt-bench", app)


if __name__ == "__main__":  # for the processes of a suite
    main()
