"""How fast documents are made and read: those of rmt-eval, through the runtime, with an engine that does nothing.

    python -m rmt_trt.benchmarks.feeding BUNDLE [--task detect] [--text FILE --part 0.9:1.0] [--slots 1,32] [--tokens 1000000]

An engine that steps fewer tokens a second than this does not wait for its documents.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from rmt_trt.benchmarks.driver import NullEngine
from rmt_trt.benchmarks.machine import describe
from rmt_trt.commands.app import new_app, run_command
from rmt_trt.commands.bench import whole_numbers
from rmt_trt.commands.eval import parse_part
from rmt_trt.evaluation.cases import Case, documents
from rmt_trt.evaluation.measure import read_many
from rmt_trt.runtime import RMTRuntime
from rmt_trt.training.tasks import open_task

app = new_app()


@app.command()
def feeding(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    task: Annotated[str, typer.Option(help="memorize, detect or reasoning.")] = "detect",
    text: Annotated[Path | None, typer.Option(help="Background text. [default: synthetic words]")] = None,
    part: Annotated[str | None, typer.Option(help="Part of the text, from and to. [default: all]")] = None,
    slots: Annotated[str, typer.Option(help="Documents read together, with commas.")] = "1,32",
    tokens: Annotated[int, typer.Option(min=1, help="Of each document.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which the best is reported.")] = 5,
) -> None:
    """Prints tokens per second of wall time, and the nanoseconds of CPU time that a token takes."""
    machine = describe(None)
    with RMTRuntime(bundle, engine="cpu", max_batch=max(whole_numbers("--slots", slots))) as runtime:
        one = open_task(task, text, None if text is None else runtime.tokenizer, parse_part(part, text))
        runtime._engine = NullEngine(
            runtime.spec
        )  # the runtime's own path is what is measured, with this engine under it
        segments = -(-tokens // runtime.spec.segment_length)
        print(f"{bundle.name}, {one.describe(tokens)}, on {machine['cpu']}, numpy {machine['versions']['numpy']}")
        for count in whole_numbers("--slots", slots):
            asked = documents(one, Case(task, segments, None, count), runtime.spec, 0)
            total = sum(document.length for document in asked)
            found = []
            for _ in range(rounds):
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in read_many(runtime, asked, count):
                    pass
                found.append((time.perf_counter() - wall, time.process_time() - cpu))
            seconds, worked = min(found)
            print(f"{count} slots: {total / seconds:,.0f} tokens/s, {1e9 * worked / total:.1f} ns of CPU time a token")


if __name__ == "__main__":
    run_command("feeding", app)
