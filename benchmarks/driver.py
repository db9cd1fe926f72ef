"""What the driver costs: everything but the engine's own calls, per segment, measured in one process.

    python -m rmt_trt.benchmarks.driver BUNDLE [--batch 1,32] [--segments 500] [--rounds 5] [--null]

Documents are driven exactly as `RMTRuntime.run` drives them, through an engine whose calls are timed; the driver's own
time is all the rest: reading and checking tokens, cutting, laying out, gathering, results. Both come from the same run.
With --null the engine does nothing, so that the driver is seen alone, at any batch size and at once.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from rmt_trt.commands.app import new_app, run_command
from rmt_trt.contract import Answer, Engine, Head, StepSpec
from rmt_trt.runtime import RMTRuntime
from rmt_trt.runtime.engines.cpu import open_engine
from rmt_trt.runtime.source import open_source

app = new_app()


class NullEngine:
    """An engine that computes nothing: states stay what they were, logits are 0."""

    name, dtype, max_batch = "null", "fp32", None

    def __init__(self, spec: StepSpec) -> None:
        self._spec = spec

    def load(self, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return states

    def fetch(self, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tuple(value.copy() for value in states)

    share = fetch

    def take(self, parts: Sequence[tuple[np.ndarray, ...]], rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.concatenate(values)[rows] for values in zip(*parts, strict=True))

    def step(
        self, states: tuple[np.ndarray, ...], segment: np.ndarray, head: Head, host: bool = True
    ) -> tuple[tuple[np.ndarray, ...], Answer | None]:
        return states, None if head == "none" else Answer(np.zeros((len(segment), self._spec.num_logits), np.float32))

    def steps(self, states: tuple[np.ndarray, ...], segments: np.ndarray) -> tuple[np.ndarray, ...]:
        return states

    def close(self) -> None:
        pass


class TimedEngine:
    """An engine that adds up the seconds spent in its calls."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.name, self.dtype, self.close = engine, engine.name, engine.dtype, engine.close
        self.max_batch = engine.max_batch
        self.seconds = 0.0

    def _timed(self, call: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments)
        self.seconds += time.perf_counter() - started
        return result

    def load(self, states: tuple[np.ndarray, ...]) -> Any:
        return self._timed(self._engine.load, states)

    def fetch(self, states: Any) -> Any:
        return self._timed(self._engine.fetch, states)

    def share(self, states: Any) -> Any:
        return self._timed(self._engine.share, states)

    def take(self, parts: Sequence[Any], rows: np.ndarray) -> Any:
        return self._timed(self._engine.take, parts, rows)

    def step(self, states: Any, segment: np.ndarray, head: Head, host: bool = True) -> Any:
        return self._timed(self._engine.step, states, segment, head, host)

    def steps(self, states: Any, segments: np.ndarray) -> Any:
        return self._timed(self._engine.steps, states, segments)


def measure(runtime: RMTRuntime, engine: TimedEngine, batch: int, segments: int) -> tuple[float, float]:
    """Seconds per document and segment of a run over `batch` random documents: (the driver's own, the engine's)."""
    spec = runtime.spec
    allowed = np.setdiff1d(np.arange(spec.vocab_size), np.array(spec.dropped_ids, np.int64))
    random = np.random.default_rng(0)
    documents = [random.choice(allowed, segments * spec.segment_length) for _ in range(batch)]
    engine.seconds = 0.0
    started = time.perf_counter()
    runtime.run(documents, alignment="left")
    seconds = time.perf_counter() - started
    return (seconds - engine.seconds) / (batch * segments), engine.seconds / (batch * segments)


@app.command()
def driver(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    batch: Annotated[str, typer.Option(help="Documents run together, with commas.")] = "1,32",
    segments: Annotated[int, typer.Option(min=1, help="Full segments of each document.")] = 500,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which the median is reported.")] = 5,
    null: Annotated[bool, typer.Option("--null", help="Drive an engine that does nothing.")] = False,
) -> None:
    """Prints the driver's own time per document and segment, and its share of the run."""
    source = open_source(bundle)
    with RMTRuntime(bundle, engine="cpu") as runtime:
        inner: Engine = NullEngine(runtime.spec) if null else open_engine(source, "fp32", 0, None)
        engine = TimedEngine(inner)
        runtime._engine = engine  # the runtime's own path is what is measured, with this engine under it
        print(
            f"{bundle.name} (segments of {runtime.spec.segment_length}) on {platform.processor() or platform.machine()}, "
            f"engine '{inner.name}'"
        )
        for size in map(int, batch.split(",")):
            measure(runtime, engine, size, min(segments, 20))  # warm-up
            parts = np.array([measure(runtime, engine, size, segments) for _ in range(rounds)])
            outside, inside = 1e6 * np.median(parts, axis=0)
            low, high = 1e6 * parts[:, 0].min(), 1e6 * parts[:, 0].max()
            print(
                f"batch {size}: driver {outside:.2f} us per document and segment ({low:.2f} to {high:.2f}), engine "
                f"{inside:.2f} us; driver's share {outside / (outside + inside):.1%}"
            )


if __name__ == "__main__":
    run_command("driver", app)
