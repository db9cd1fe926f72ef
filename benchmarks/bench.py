"""A whole benchmark: what is measured, in what order, into which folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmt_trt.benchmarks.compare import Segments, ort_peers, torch_peers
from rmt_trt.benchmarks.endurance import drift, growth
from rmt_trt.benchmarks.limits import limits, step_flops
from rmt_trt.benchmarks.machine import Meters, describe
from rmt_trt.benchmarks.many import ManyOptions, many
from rmt_trt.benchmarks.ours import OURS, energy, latencies, length_times, load, step_times
from rmt_trt.benchmarks.plan import Plan
from rmt_trt.benchmarks.plots import draw
from rmt_trt.benchmarks.presets import Prepared
from rmt_trt.benchmarks.report import markdown
from rmt_trt.benchmarks.rows import Results
from rmt_trt.errors import EngineError
from rmt_trt.runtime import RMTRuntime

Say = Callable[[str], None]


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
            if extra.compare:
                _compare(prepared, plan, runtime, meters, results, work, say)
            if extra.many is not None:
                many(runtime, extra.many, results, say)
            if extra.growth is not None:
                growth(runtime, meters, results, say, extra.growth)
            if extra.kernels and plan.gpu:
                _kernels(prepared, plan, runtime, results, say)
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
) -> None:
    say("limits of the machine")
    limits(plan, results)
    meters.release()
    segments = Segments(prepared, runtime.spec, plan)
    meters.release()
    for batch in plan.batches:
        say(f"{OURS}, batch {batch}")
        with results.attempt("step", OURS, batch):
            step_times(runtime, plan, batch, segments.by_batch[batch], segments.error, meters, results)
    say(f"{OURS}, by length")
    length_times(runtime, plan, meters, results)
    latencies(runtime, plan, results)
    for batch in sorted({min(plan.batches), max(plan.batches)}):
        with results.attempt("energy", OURS, batch):
            energy(runtime, plan, batch, meters, results)
    torch_peers(prepared, plan, segments, meters, results, say)
    if "ort" in plan.peers:
        ort_peers(prepared, plan, segments, meters, work, results, say)
    if "full" in plan.peers:
        from rmt_trt.benchmarks.full_attention import full_attention

        full_attention(prepared, runtime.spec, plan, meters, results, say)


def _kernels(prepared: Prepared, plan: Plan, runtime: RMTRuntime, results: Results, say: Say) -> None:
    from rmt_trt.benchmarks.kernels import kernels
    from rmt_trt.benchmarks.plan import documents

    size = runtime.spec.segment_length
    for batch in sorted({min(plan.batches), max(plan.batches)}):
        say(f"kernels, batch {batch}")

        def run(steps: int, batch: int = batch) -> object:
            return runtime.run(list(documents(runtime.spec, batch, steps * size)), alignment="left")

        with results.attempt("kernels", OURS, batch):
            kernels(OURS, run, batch, 16, results)
