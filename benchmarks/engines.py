"""Engines side by side, interleaved in one process: time per segment, and how many times as fast as PyTorch.

    python -m rmt_trt.benchmarks.engines BUNDLE MODEL [--batch 1,8] [--segments 20] [--rounds 7]

BUNDLE runs on the CPU engine, MODEL (the checkpoint that it was exported from) on the PyTorch reference, eager with
scaled_dot_product_attention. Both go through the same driver, over the same documents, with as many threads.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from rmt_trt.commands.app import new_app, run_command
from rmt_trt.errors import FormatError, require
from rmt_trt.runtime import RMTRuntime

app = new_app()


def seconds_per_step(runtime: RMTRuntime, documents: list[np.ndarray], segments: int) -> float:
    """Seconds that a run takes, per step of the whole batch."""
    started = time.perf_counter()
    runtime.run(documents, alignment="left")
    return (time.perf_counter() - started) / segments


@app.command()
def engines(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    model: Annotated[Path, typer.Argument(help="The checkpoint that it was exported from.")],
    batch: Annotated[str, typer.Option(help="Documents stepped together, with commas.")] = "1,8",
    segments: Annotated[int, typer.Option(min=1, help="Full segments in a round.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; engines take turns in each.")] = 7,
) -> None:
    """Prints a row per batch size: medians with their range, and the ratio of the medians."""
    versions = f"onnxruntime {require('onnxruntime', 'cpu', 'this').__version__}, torch {require('torch', 'export', 'this').__version__}"
    print(
        f"{bundle.name}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {versions}"
    )
    with RMTRuntime(bundle, engine="cpu") as ours, RMTRuntime(model, engine="torch") as peer:
        spec = ours.spec
        if peer.spec.fingerprint != spec.fingerprint:
            raise FormatError(f"{model} holds other weights than {bundle} was exported from; give its own checkpoint")
        allowed = np.setdiff1d(np.arange(spec.vocab_size), spec.dropped_ids)
        random = np.random.default_rng(0)
        for size in map(int, batch.split(",")):
            documents = [random.choice(allowed, segments * spec.segment_length) for _ in range(size)]
            times = np.array(
                [[seconds_per_step(rt, documents, segments) for rt in (ours, peer)] for _ in range(rounds + 1)]
            )[1:]  # the first round warms up
            a, b = 1e3 * np.median(times, axis=0)
            (low_a, low_b), (high_a, high_b) = 1e3 * times.min(axis=0), 1e3 * times.max(axis=0)
            print(
                f"batch {size}: cpu {a:.2f} ms ({low_a:.2f} to {high_a:.2f}), torch {b:.2f} ms ({low_b:.2f} to {high_b:.2f}); "
                f"{b / a:.2f} times as fast as PyTorch"
            )


if __name__ == "__main__":
    run_command("engines", app)
