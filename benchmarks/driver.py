"""What the driver costs: everything but the engine's own call, per segment, measured in one process.

    python -m rmt_trt.benchmarks.driver BUNDLE [--segments 200] [--rounds 5]

A document is driven exactly as `RMTRuntime.run` drives it, through an engine that notes the time of each of its calls.
The driver's own time is all the rest: reading tokens, cutting, laying out, marks, pieces. Both come from the same run.
"""

from __future__ import annotations

import platform
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from rmt_trt.commands.app import new_app, run_command
from rmt_trt.contract import Engine
from rmt_trt.runtime import RMTRuntime
from rmt_trt.runtime.engines.cpu import open_engine
from rmt_trt.runtime.recurrence import Recurrence
from rmt_trt.runtime.source import open_source
from rmt_trt.runtime.tracks import Reading, open_tracks

app = new_app()


class TimedEngine:
    """An engine that adds up the seconds spent in its steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.name, self.dtype = engine, engine.name, engine.dtype
        self.load, self.fetch, self.take, self.close = engine.load, engine.fetch, engine.take, engine.close
        self.seconds: list[float] = []

    def step(self, states: Any, segment: np.ndarray, logits: bool) -> tuple[Any, np.ndarray | None]:
        started = time.perf_counter()
        result = self._engine.step(states, segment, logits)
        self.seconds.append(time.perf_counter() - started)
        return result


def measure(runtime: RMTRuntime, engine: TimedEngine, segments: int) -> tuple[np.ndarray, np.ndarray]:
    """(driver seconds, engine seconds) of each segment of a random document."""
    spec = runtime.spec
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, segments * spec.segment_length)
    tokens = tokens[~np.isin(tokens, spec.dropped_ids)]
    reading = Reading.of(spec, "left", "last", None, "error")
    tracks, _ = open_tracks(tokens, None, None, reading, spec, runtime.initial, runtime.encode)
    engine.seconds.clear()
    stamps = [time.perf_counter()]
    for _ in Recurrence(lambda: engine, spec, tracks, threading.RLock(), "last"):
        stamps.append(time.perf_counter())
    inside = np.array(engine.seconds)
    return np.diff(stamps)[: len(inside)] - inside, inside


@app.command()
def driver(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    segments: Annotated[int, typer.Option(help="Segments in a round.")] = 200,
    rounds: Annotated[int, typer.Option(help="Rounds; the median over all their segments is reported.")] = 5,
) -> None:
    """Prints the driver's own time per segment and its share of the run."""
    source = open_source(bundle)
    with RMTRuntime(bundle, engine="cpu") as runtime:
        engine = TimedEngine(open_engine(source, "fp32", 0, None))
        measure(runtime, engine, min(segments, 20))  # warm-up
        parts = [measure(runtime, engine, segments) for _ in range(rounds)]
    outside, inside = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    low, high = np.percentile(outside, [10, 90])
    print(
        f"{bundle.name} on {platform.processor() or platform.machine()}: {len(outside)} segments; driver median "
        f"{1e3 * np.median(outside):.3f} ms a segment (p10 {1e3 * low:.3f}, p90 {1e3 * high:.3f}), engine median "
        f"{1e3 * np.median(inside):.3f} ms; driver's share of the run {outside.sum() / (outside.sum() + inside.sum()):.1%}"
    )


if __name__ == "__main__":
    run_command("driver", app)
