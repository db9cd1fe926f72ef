"""What a dtype is worth on this machine: size, memory and time of a bundle's step in each, measured in turn in one run.

    python -m rmt_trt.benchmarks.precision MODEL.rmt --engine cpu --dtype fp32,int8,int8-dynamic --batch 1,8 -o speed

The first dtype is what the others are compared with. What a dtype is worth on the task, rmt-eval says, and how it drifts,
rmt-verify.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from rmt_trt.benchmarks.command_line import shown
from rmt_trt.benchmarks.machine import Meters, describe
from rmt_trt.benchmarks.ours import run_call, texts
from rmt_trt.benchmarks.plan import documents
from rmt_trt.benchmarks.rows import Results, Row
from rmt_trt.benchmarks.tables import Section, in_mb, in_ms, markdown_table, screen_table
from rmt_trt.benchmarks.timing import Call, Timing
from rmt_trt.bundle import Bundle
from rmt_trt.commands.app import new_app, run_command
from rmt_trt.commands.engine_options import parse_dtypes
from rmt_trt.errors import ContractError, EngineError
from rmt_trt.runtime import RMTRuntime

app = new_app()

ENGINES = ("cpu", "cuda")
MEMORY_SECONDS = 600.0  # a process that says nothing for so long has failed


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="NAME.rmt, with a graph of each dtype.")],
    engine: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Dtypes, with commas; the others are compared with the first.")] = "fp32",
    batch: Annotated[str, typer.Option(help="Documents stepped together, with commas.")] = "1,8",
    steps: Annotated[int, typer.Option(min=1, help="Full segments in a call.")] = 4,
    repeat: Annotated[int, typer.Option(min=3, help="Calls of each dtype, in turn.")] = 15,
    seconds: Annotated[float, typer.Option(min=0.1, help="At most so long for each dtype and batch.")] = 20.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a step. [default: all cores]")] = None,
    device: Annotated[int, typer.Option(min=0, help="GPU index.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of results.json and results.md.")] = None,
) -> None:
    """Prints one table: size, memory, and milliseconds of a step by dtype and batch, with the ratio to the first dtype."""
    from rmt_trt.commands.bench import whole_numbers

    if engine not in ENGINES:
        raise ContractError(f"--engine is {engine!r}; expected {' or '.join(ENGINES)}")
    dtypes, batches = parse_dtypes(dtype), whole_numbers("--batch", batch)
    gpu = device if engine == "cuda" else None
    opened = Bundle(bundle)
    head = {
        "command": shown(sys.argv[1:], "python -m rmt_trt.benchmarks.precision"),
        "machine": describe(gpu),
        "model": {"name": opened.path.stem, "engine": engine, "segment_length": opened.spec.segment_length},
        "options": {"steps": steps, "threads": threads},
    }
    results = Results(out, head)
    for name in dtypes:
        values = {"disk_bytes": disk_bytes(opened, engine, name)}
        with results.attempt("load", name):
            values |= memory_of(bundle, engine, name, device, threads, batches[0])
        results.add(Row("load", name, batches[0], values=values))
    for size in batches:
        measure_steps(bundle, engine, dtypes, size, steps, repeat, seconds, threads, device, results)
    table = section(results.head, results.rows)
    if out is not None:
        (out / "results.md").write_text("\n".join(markdown_table(table)), encoding="utf-8")
    Console(highlight=False, markup=False, emoji=False).print(screen_table(table))


def disk_bytes(bundle: Bundle, engine: str, dtype: str) -> int:
    """Bytes of the graphs of this use that a step takes, with their weights, each file once."""
    graphs = [g for g in bundle.manifest.graphs if (g.engine, g.dtype) == (engine, dtype)]
    names = {name for graph in graphs for name in (graph.file, *graph.data)}
    if not names:
        raise EngineError(
            f"{bundle.path} has no {dtype} graph for engine '{engine}'. Add it with rmt-export or rmt-calibrate"
        )
    return sum(bundle.manifest.files[name].size for name in names)


def memory_of(bundle: Path, engine: str, dtype: str, device: int, threads: int | None, batch: int) -> dict[str, int]:
    """Bytes that the model takes in a process of its own, beyond what its libraries take: of the host, and of the device.

    Errors: EngineError, when the process fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(sender, bundle, engine, dtype, device, threads, batch))
    process.start()
    sender.close()
    try:
        found: dict[str, int] = receiver.recv() if receiver.poll(MEMORY_SECONDS) else {}
    except EOFError:
        found = {}
    finally:
        process.kill()
        process.join()
    if not found:
        raise EngineError(f"the process that was to measure the memory of {dtype} gave no answer")
    return found


def _measure_memory(
    sender: Any, bundle: Path, engine: str, dtype: str, device: int, threads: int | None, batch: int
) -> None:
    meters = Meters(device if engine == "cuda" else None)
    import onnxruntime

    onnxruntime.get_available_providers()
    host, before = meters.host_bytes(), meters.device_bytes()
    with RMTRuntime(bundle, engine=engine, dtype=dtype, device=device, threads=threads, max_batch=batch) as runtime:
        size = runtime.spec.segment_length
        runtime.run(list(documents(runtime.spec, batch, 3 * size)), alignment="left")
        found = {"host_bytes": meters.host_bytes() - host}
        after = meters.device_bytes()
        if before is not None and after is not None:
            found["device_bytes"] = after - before
        sender.send(found)


def measure_steps(
    bundle: Path, engine: str, dtypes: Sequence[str], batch: int, steps: int, repeat: int, seconds: float,
    threads: int | None, device: int, results: Results,
) -> None:  # fmt: skip
    """A row for each dtype at a batch size: calls of all dtypes in turn, and of each round the ratio to the first."""
    with ExitStack() as stack:
        runtimes: dict[str, RMTRuntime] = {}
        for name in dtypes:
            with results.attempt("step", name, batch):
                runtimes[name] = stack.enter_context(
                    RMTRuntime(bundle, engine=engine, dtype=name, device=device, threads=threads, max_batch=batch)
                )
        calls: dict[str, Call] = {}
        for name, runtime in runtimes.items():
            size = runtime.spec.segment_length
            tokens = texts(documents(runtime.spec, batch, steps * size).reshape(batch, steps, size).swapaxes(0, 1))
            calls[name] = run_call(runtime, tokens)
            calls[name]()
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(1, repeat + 1):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - started)
            if done >= 3 and max(map(sum, samples.values())) > seconds:
                break
    for name, taken in samples.items():
        values = _ratios(samples.get(dtypes[0]), taken)
        results.add(Row("step", name, batch, segments=steps, timing=Timing.of(taken), values=values))


def _ratios(first: list[float] | None, taken: list[float]) -> dict[str, float]:
    """How many times as fast as the first dtype, by rounds: the median and the tenth and ninetieth percentile."""
    if first is None:
        return {}
    low, median, high = np.percentile(np.array(first) / np.array(taken), [10, 50, 90])
    return {"speed_ratio": float(median), "speed_ratio_p10": float(low), "speed_ratio_p90": float(high)}


def section(head: dict[str, Any], rows: Sequence[Row]) -> Section:
    """One line for each dtype."""
    batches = sorted({row.batch for row in rows if row.kind == "step"})
    columns = ("dtype", "on disk", "host memory", "device memory", *(f"ms, batch {b}" for b in batches))
    columns += tuple(f"ratio, batch {b}" for b in batches)
    lines = []
    for load in (row for row in rows if row.kind == "load" and row.values):
        steps = {row.batch: row for row in rows if (row.kind, row.name) == ("step", load.name)}
        times = tuple(in_ms(steps[b].per_segment) if b in steps else "" for b in batches)
        ratios = tuple(_ratio(steps[b]) if b in steps else "" for b in batches)
        held = (in_mb(load.values.get(key)) for key in ("disk_bytes", "host_bytes", "device_bytes"))
        lines.append((load.name, *held, *times, *ratios))
    machine = head["machine"]
    where = (
        machine["gpu"]["name"]
        if "gpu" in machine
        else f"{machine['cpu']}, {machine['cores']} cores, {instructions(machine)}"
    )
    note = f"Ratio: times as fast as the first dtype, median of rounds (10th to 90th percentile). {where}"
    return Section(
        f"{head['model']['name']}: one step by dtype, engine {head['model']['engine']}", columns, lines, note
    )


def _ratio(row: Row) -> str:
    if "speed_ratio" not in row.values:
        return row.failed
    low, middle, high = (row.values[key] for key in ("speed_ratio_p10", "speed_ratio", "speed_ratio_p90"))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def instructions(machine: dict[str, Any]) -> str:
    """The processor's instruction sets that matter here."""
    return ", ".join(machine.get("instructions", [])) or "no vector instructions known"


if __name__ == "__main__":
    run_command("precision", app)
