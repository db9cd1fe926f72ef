"""A whole benchmark: what is measured, in what order, into which folder."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmt_trt.benchmarks.compare import Candidate, Segments, candidates, compare, require_right
from rmt_trt.benchmarks.endurance import drift, growth
from rmt_trt.benchmarks.limits import limits, step_flops
from rmt_trt.benchmarks.machine import Meters, describe
from rmt_trt.benchmarks.many import ManyOptions, many
from rmt_trt.benchmarks.ours import (
    OURS,
    energy,
    latencies,
    length_times,
    load,
    memory_after,
    run_call,
    step_times,
    texts,
)
from rmt_trt.benchmarks.plan import CHECKED_SEGMENTS, Plan, documents
from rmt_trt.benchmarks.plots import draw
from rmt_trt.benchmarks.presets import Prepared
from rmt_trt.benchmarks.ratios import best_peer
from rmt_trt.benchmarks.report import markdown
from rmt_trt.benchmarks.rows import Results
from rmt_trt.errors import EngineError
from rmt_trt.runtime import RMTRuntime

Say = Callable[[str], None]
KERNEL_STEPS = 16


@dataclass(frozen=True)
class Extra:
    """What is measured beyond the comparison. drift: segments to go through, or None; kernels: record them."""

    compare: bool = True
    many: ManyOptions | None = None
    drift: int | None = None
    drift_dtypes: tuple[str, ...] = ("fp16", "bf16")
    drift_reference: str | None = None
    growth: int | None = None
    kernels: bool = False


def run_benchmark(prepared: Prepared, plan: Plan, extra: Extra, out: Path, work: Path, say: Say) -> Results:
    """Measures, and writes `results.json` after each measurement, `results.md` and plots at the end.

    Errors: FormatError or EngineError, when ours cannot run at all; a peer that cannot is a row of its own.
    """
    meters = Meters(plan.device if plan.gpu else None)
    most = max([*plan.batches, extra.many.slots if extra.many else 1])
    results = Results(out, {"command": shlex.join(["rmt-bench", *sys.argv[1:]])})
    try:
        with load(prepared.bundle, plan, meters, results, most) as runtime:
            results.head |= _head(prepared, plan, runtime)
            peers = []
            if extra.compare:
                peers = _compare(prepared, plan, runtime, meters, results, work, say)
            if extra.many is not None:
                with results.attempt("many", OURS):
                    many(runtime, extra.many, results, say)
            if extra.growth is not None:
                with results.attempt("growth", OURS):
                    growth(runtime, meters, results, say, extra.growth)
            if extra.kernels and plan.gpu:
                _kernels(plan, runtime, peers, results, say)
        if extra.drift is not None:
            drift(prepared.bundle, plan, extra.drift_dtypes, extra.drift, results, say, extra.drift_reference)
    finally:  # an interrupted run has its report too
        write_report(results)
    return results


def write_report(results: Results) -> None:
    """`results.json`, `results.md` and the plots, of the rows that there are."""
    results.save()
    model = results.head.get("model", {})
    title = f"{model.get('name')}, {model.get('engine')} {model.get('dtype')}"
    try:
        plots: Sequence[str] = draw(results.folder, results.rows, title)
    except EngineError:  # without matplotlib there are no plots, and the figures are there all the same
        plots = ()
    (results.folder / "results.md").write_text(markdown(results.head, results.rows, plots), encoding="utf-8")


def _head(prepared: Prepared, plan: Plan, runtime: RMTRuntime) -> dict[str, Any]:
    config = prepared.model.config
    return {
        "machine": describe(plan.device if plan.gpu else None),
        "model": {
            "name": prepared.name,
            "weights": prepared.weights,
            "engine": runtime.engine,
            "dtype": runtime.dtype,
            "form": config.form,
            "backbone": config.backbone,
            "segment_length": config.segment_length,
            "num_memory": config.num_memory,
            "positions": config.positions,
            "parameters": sum(parameter.numel() for parameter in prepared.model.parameters()),
            "flops_per_segment": step_flops(config),
        },
        "plan": asdict(plan),
    }


def _compare(
    prepared: Prepared, plan: Plan, runtime: RMTRuntime, meters: Meters, results: Results, work: Path, say: Say
) -> list[Candidate]:
    """Ours, the peers, and the machine's limits. Returns the peers, for what is measured of them later."""
    say("limits of the machine")
    limits(plan, results)
    meters.release()
    segments = Segments(prepared, runtime.spec, plan)
    meters.release()
    for batch, rows in segments.by_batch.items():
        say(f"{OURS}, batch {batch}")
        with results.attempt("step", OURS, batch):
            error = segments.error(memory_after(runtime, rows[:CHECKED_SEGMENTS]), batch)
            require_right(error, plan)
            step_times(runtime, plan, rows, error, meters, results)
    say(f"{OURS}, by length")
    length_times(runtime, plan, meters, results)
    latencies(runtime, plan, results)
    for batch in plan.smallest_and_largest:
        with results.attempt("energy", OURS, batch):
            rows = segments.by_batch[batch]
            results.add(*energy(OURS, run_call(runtime, texts(rows)), rows.size, batch, meters))
    peers = candidates(prepared, plan, segments, work)
    compare(runtime, peers, plan, segments, meters, results, say)
    if "full" in plan.peers:
        from rmt_trt.benchmarks.full_attention import full_attention

        full_attention(prepared, runtime.spec, plan, meters, results, say)
    return peers


def _kernels(plan: Plan, runtime: RMTRuntime, peers: list[Candidate], results: Results, say: Say) -> None:
    """Ours and the best peer, at the smallest and the largest batch."""
    from rmt_trt.benchmarks.kernels import kernels

    for batch in plan.smallest_and_largest:
        tokens = documents(runtime.spec, batch, KERNEL_STEPS * runtime.spec.segment_length)
        say(f"kernels, batch {batch}")
        with results.attempt("kernels", OURS, batch):
            kernels(OURS, run_call(runtime, list(tokens)), batch, KERNEL_STEPS, results)
        best = best_peer(results.rows, batch)
        for peer in peers:
            if best is not None and peer.name == best.name:
                with results.attempt("kernels", peer.name, batch):
                    loop = peer.open(batch)
                    kernels(peer.name, functools.partial(loop, KERNEL_STEPS), batch, KERNEL_STEPS, results)
