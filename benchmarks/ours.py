"""What a deployed RMT takes, through `RMTRuntime` alone: as its user calls it, tokens in host memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.benchmarks.machine import Meters
from rmt_trt.benchmarks.plan import CHECKED_SEGMENTS, Plan, documents
from rmt_trt.benchmarks.rows import Results, Row
from rmt_trt.benchmarks.timing import Effort, measure, measure_in_turn
from rmt_trt.runtime import RMTRuntime

OURS = "rmt-trt"
ENERGY_SECONDS = 2.0  # the counter moves every tenth of a second or so
MORE_TOKENS = 1000
RUN_SECONDS = 0.5  # a run that compares engines takes at least about so long: what a run costs once then weighs little
FEWEST_STEPS, MOST_STEPS = 32, 4096
CPU_STEPS = 8  # there a step takes long beside all else
PROBED, CPU_PROBED = (8, 40), (1, 3)  # segments of the two runs by which a step is judged beforehand


def load(bundle: Path, plan: Plan, meters: Meters, results: Results, max_batch: int) -> RMTRuntime:
    """Opens the bundle; the time until it is open, and until its first answer, and what that takes of memory."""
    before, host = meters.device_bytes(), meters.host_bytes()
    started = time.perf_counter()
    runtime = RMTRuntime(
        bundle, engine=plan.engine, dtype=plan.dtype, device=plan.device, threads=plan.threads, max_batch=max_batch
    )
    opened = time.perf_counter() - started
    runtime.run(documents(runtime.spec, 1, runtime.spec.segment_length)[0], alignment="left")
    values = {
        "open_seconds": opened,
        "first_answer_seconds": time.perf_counter() - started,
        "host_bytes": meters.host_bytes() - host,
    }
    used = meters.device_bytes()
    if used is not None and before is not None:
        values["device_bytes"] = used - before
    results.add(Row("load", OURS, values=values))
    return runtime


def choose_steps(runtime: RMTRuntime, plan: Plan, batch: int) -> int:
    """Full segments in a run that compares engines at a batch size, at least CHECKED_SEGMENTS."""
    if plan.steps is not None or not plan.gpu:
        return max(plan.steps or CPU_STEPS, CHECKED_SEGMENTS)
    return steps_for(step_seconds(runtime, plan, batch))


def step_seconds(runtime: RMTRuntime, plan: Plan, batch: int) -> float:
    """Seconds of a step at a batch size, by two short runs: enough to plan by."""
    size, counts = runtime.spec.segment_length, PROBED if plan.gpu else CPU_PROBED
    effort = Effort(3, 1.0) if plan.gpu else Effort(1, 1.0, at_least=1)
    few, more = (
        measure(run_call(runtime, list(documents(runtime.spec, batch, count * size))), effort).low for count in counts
    )
    return max(more - few, 1e-6) / (counts[1] - counts[0])


def steps_for(seconds: float) -> int:
    """Segments of a run, by the seconds of a step."""
    return min(MOST_STEPS, max(FEWEST_STEPS, math.ceil(RUN_SECONDS / seconds)))


def texts(segments: np.ndarray) -> Any:
    """Full segments (n, b, S) as a user has them: a list of b documents, or one document for b = 1."""
    rows = [np.ascontiguousarray(segments[:, i].reshape(-1)) for i in range(segments.shape[1])]
    return rows if len(rows) > 1 else rows[0]


def memory_after(runtime: RMTRuntime, segments: np.ndarray) -> np.ndarray:
    """Memory (b, M, d) after the segments (n, b, S)."""
    memory: np.ndarray = runtime.run(texts(segments), alignment="left", logits="none").memory
    return memory.reshape(segments.shape[1], *memory.shape[-2:])


def step_times(
    runtime: RMTRuntime, plan: Plan, segments: np.ndarray, error: float, meters: Meters, results: Results
) -> None:
    """Full segments (n, b, S), as a user runs a batch of documents, and the bare replay of as many, in turn, since a GPU at
    its power limit changes its pace. error: of the memory, for the report.

    What a run costs once is what a run of one segment takes beyond a step; the head of the last segment is in it.
    """
    steps, batch, size = segments.shape
    run, replay = run_call(runtime, texts(segments)), bare_call(runtime, batch, steps)
    calls = [run] if replay is None else [run, replay]
    for call in calls:
        call()
    timing, *bare = measure_in_turn(calls, plan.effort)
    one = measure(run_call(runtime, texts(segments[:1])), Effort(50, plan.effort.seconds / 2)).median
    values: dict[str, Any] = {
        "error": error,
        "one_segment_seconds": one,
        "once_seconds": one - timing.median / steps,
    }
    used = meters.device_bytes()
    if used is not None:
        values["device_bytes_in_use"] = used
    results.add(Row("step", OURS, batch, steps * size, steps, timing, values))
    results.add(*(Row("bare", OURS, batch, steps * size, steps, replayed) for replayed in bare))


def bare_call(runtime: RMTRuntime, batch: int, steps: int) -> Callable[[], object] | None:
    """The engine's own captured steps alone, without tokens or driver, where the engine can replay them."""
    engine: Any = runtime._live_engine()
    replay = getattr(engine, "replay", None)
    return None if replay is None else lambda: replay(batch, steps)


def length_times(runtime: RMTRuntime, plan: Plan, meters: Meters, results: Results) -> None:
    """One document of each length, from its first token to the answer."""
    spec = runtime.spec
    effort = replace(plan.effort, at_least=2) if plan.quick else plan.effort
    for tokens in plan.tokens:
        with results.attempt("length", OURS, tokens=tokens):
            document = documents(spec, 1, tokens)[0]
            short = document[: 64 * spec.segment_length]
            timing = measure(run_call(runtime, document), effort, warm=run_call(runtime, short))
            values = {"host_bytes": meters.host_bytes()}
            used = meters.device_bytes()
            if used is not None:
                values["device_bytes_in_use"] = used
            steps = -(-tokens // spec.segment_length)
            results.add(Row("length", OURS, 1, tokens, steps, timing, values))


def run_call(runtime: RMTRuntime, tokens: Any, state: Any = None) -> Callable[[], object]:
    """A run to the answer, to be timed."""
    return lambda: runtime.run(tokens, state=state, alignment="left")


def latencies(runtime: RMTRuntime, plan: Plan, results: Results) -> None:
    """Going on from a kept state: one full segment, and 1,000 tokens more, each to the answer."""
    spec = runtime.spec
    first = documents(spec, 1, 3 * spec.segment_length)[0]
    state = runtime.run(first, alignment="left").state
    for name, tokens in (("one segment more", spec.segment_length), ("1,000 tokens more", MORE_TOKENS)):
        with results.attempt("latency", name, tokens=tokens):
            more = documents(spec, 1, tokens, seed=1)[0]
            timing = measure(run_call(runtime, more, state), Effort(100, plan.effort.seconds / 2))
            results.add(Row("latency", name, 1, tokens, -(-tokens // spec.segment_length), timing))


def energy(name: str, call: Callable[[], object], tokens: int, batch: int, meters: Meters) -> list[Row]:
    """Joules of the device by its own counter, over some seconds of calls of `tokens` tokens each; [] without a counter."""
    first = meters.joules()
    if first is None:
        return []
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < ENERGY_SECONDS:
        call()
        calls += 1
    spent, seconds = (meters.joules() or 0.0) - first, time.perf_counter() - started
    values = {"joules_per_million_tokens": 1e6 * spent / (calls * tokens), "watts": spent / seconds}
    return [Row("energy", name, batch, values=values)]
