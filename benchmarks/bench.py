"""A whole benchmark: what is measured, in what order, into which folder."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmt_trt.benchmarks.budget import Budget, Task, carry_out
from rmt_trt.benchmarks.candidates import GROUP_NAMES, LARGER_BATCH, Candidate, candidates
from rmt_trt.benchmarks.command_line import shown
from rmt_trt.benchmarks.compare import Segments, beside, require_right
from rmt_trt.benchmarks.endurance import drift, growth
from rmt_trt.benchmarks.limits import limits, needed_flops, step_flops
from rmt_trt.benchmarks.machine import Meters, describe
from rmt_trt.benchmarks.many import ManyOptions, lengths, many
from rmt_trt.benchmarks.ours import (
    OURS,
    choose_steps,
    energy,
    latencies,
    length_times,
    load,
    memory_after,
    run_call,
    step_seconds,
    step_times,
    texts,
)
from rmt_trt.benchmarks.plan import CHECKED_SEGMENTS, PUBLISHED, Plan, documents
from rmt_trt.benchmarks.plots import draw
from rmt_trt.benchmarks.presets import Prepared
from rmt_trt.benchmarks.quiet import quiet
from rmt_trt.benchmarks.ratios import best_peer
from rmt_trt.benchmarks.report import markdown
from rmt_trt.benchmarks.rows import Results
from rmt_trt.errors import EngineError
from rmt_trt.runtime import RMTRuntime

Say = Callable[[str], None]
KERNEL_STEPS = 16
KERNEL_SECONDS = 6.0  # of two recordings, and of opening a peer that was opened before
FP32_TIMES = 5  # a step in fp32 by one in half precision, about, and without its tensor cores


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


@dataclass(frozen=True)
class Run:
    """What all measurements of a run share."""

    prepared: Prepared
    plan: Plan
    extra: Extra
    runtime: RMTRuntime
    meters: Meters
    results: Results
    work: Path
    say: Say


def run_benchmark(
    prepared: Prepared, plan: Plan, extra: Extra, out: Path, work: Path, say: Say, budget: Budget | None = None
) -> Results:
    """Measures, and writes `results.json` after each measurement, `results.md` and plots at the end.

    Ours comes first; what no longer fits into the budget becomes a row that says so.
    Errors: FormatError or EngineError, when ours cannot run at all; a peer that cannot is a row of its own.
    """
    meters = Meters(plan.device if plan.gpu else None)
    most = max([*plan.batches, extra.many.slots if extra.many else 1])
    results = Results(out, {"command": shown(sys.argv[1:])})
    if plan.threads is not None and not plan.gpu:
        import torch

        torch.set_num_threads(plan.threads)  # the peers get as many as ours
    try:
        with load(prepared.bundle, plan, meters, results, most) as runtime:
            run = Run(prepared, plan, extra, runtime, meters, results, work, say)
            results.head |= _head(prepared, plan, runtime)
            segments = _ours(run) if extra.compare else None
            peers = [] if segments is None else candidates(prepared, plan, segments, work)
            tasks = [*_peer_tasks(run, segments, peers), *_lasting(run), *_kernel_tasks(run, peers), *_drift(run)]
            carry_out(tasks, budget or Budget(), results, say)
    finally:  # an interrupted run has its report too
        write_report(results, out)
    return results


def write_report(results: Results, folder: Path) -> None:
    """`results.json`, `results.md` and the plots, of the rows that there are."""
    results.save()
    model = results.head.get("model", {})
    title = f"{model.get('name')}, {model.get('engine')} {model.get('dtype')}"
    try:
        plots: Sequence[str] = draw(folder, results.rows, title)
    except EngineError:  # without matplotlib there are no plots, and the figures are there all the same
        plots = ()
    (folder / "results.md").write_text(markdown(results.head, results.rows, plots), encoding="utf-8")


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
            "needed_flops_per_segment": needed_flops(config),
        },
        "plan": asdict(plan),
    }


def _ours(run: Run) -> Segments:
    """The machine's limits, and ours at each batch size and length. Returns the segments that the peers run over."""
    plan, runtime, meters, results = run.plan, run.runtime, run.meters, run.results
    run.say("limits of the machine")
    limits(plan, results)
    meters.release()
    steps = {batch: choose_steps(runtime, plan, batch) for batch in plan.batches}
    segments = Segments(run.prepared, runtime.spec, plan, steps)
    meters.release()
    for batch, rows in segments.by_batch.items():
        run.say(f"step: {OURS}, batch {batch}, {len(rows)} segments")
        with results.attempt("step", OURS, batch):
            error = segments.error(memory_after(runtime, rows[:CHECKED_SEGMENTS]), batch)
            require_right(error, plan)
            step_times(runtime, plan, rows, error, meters, results)
    run.say(f"length: {OURS}")
    length_times(runtime, plan, meters, results)
    latencies(runtime, plan, results)
    for batch in plan.smallest_and_largest:
        with results.attempt("energy", OURS, batch):
            rows = segments.by_batch[batch]
            results.add(*energy(OURS, run_call(runtime, texts(rows)), rows.size, batch, meters))
    return segments


def _peer_tasks(run: Run, segments: Segments | None, peers: list[Candidate]) -> list[Task]:
    """Every peer at every batch size, ours and the peer taking turns; and full attention."""
    if segments is None:
        return []
    plan, smallest = run.plan, min(run.plan.batches)

    def measured(peer: Candidate, batch: int) -> None:
        run.results.add(*beside(run.runtime, peer, batch, plan, segments, run.meters, run.work))
        run.meters.release()

    def full() -> None:
        from rmt_trt.benchmarks.full_attention import full_attention

        full_attention(run.prepared, run.runtime.spec, plan, run.meters, run.results, run.say)

    tasks = []
    for peer in peers:
        published = peer.name.startswith(GROUP_NAMES[PUBLISHED])
        for batch in [smallest] if peer.smallest_only else plan.batches:
            larger = batch > smallest
            seconds = peer.seconds * (LARGER_BATCH if larger and peer.cost == "compile" else 1.0)
            call = functools.partial(measured, peer, batch)
            spare = peer.spare or (published and larger)
            tasks.append(Task("step", peer.name, call, seconds, batch, peer.cost, spare))
    if "full" in plan.peers:
        tasks.append(Task("full", "full attention", full, 4.0 + 1.5 * plan.full_seconds))
    return tasks


def _lasting(run: Run) -> list[Task]:
    """Many documents, and one that is very long."""
    tasks, extra, rate = [], run.extra, _rates(run)
    options, grown = extra.many, extra.growth
    if options is not None:
        tokens = int(lengths(options).sum()) * run.runtime.spec.segment_length
        call = functools.partial(many, run.runtime, options, run.results, run.say)
        tasks.append(Task("many", OURS, call, 4.0 + 2.1 * tokens / rate[-1], options.slots))
    if grown is not None:
        call = functools.partial(growth, run.runtime, run.meters, run.results, run.say, grown)
        tasks.append(Task("growth", OURS, call, 1.0 + 1.1 * grown / rate[0]))
    return tasks


def _kernel_tasks(run: Run, peers: list[Candidate]) -> list[Task]:
    """Recorded at the smallest and the largest batch: it may slow what comes after, so nothing that is timed does."""
    if not (run.extra.kernels and run.plan.gpu):
        return []
    return [
        Task("kernels", OURS, functools.partial(_kernels, run, peers, batch), KERNEL_SECONDS, batch, "kernels")
        for batch in run.plan.smallest_and_largest
    ]


def _kernels(run: Run, peers: list[Candidate], batch: int) -> None:
    """Ours and the best peer."""
    from rmt_trt.benchmarks.kernels import kernels

    spec, results = run.runtime.spec, run.results
    tokens = documents(spec, batch, KERNEL_STEPS * spec.segment_length)
    with results.attempt("kernels", OURS, batch):
        kernels(OURS, run_call(run.runtime, list(tokens)), batch, KERNEL_STEPS, results)
    best = best_peer(results.rows, batch)
    for peer in peers:
        if best is not None and peer.name == best.name:
            with results.attempt("kernels", peer.name, batch):
                with quiet(run.work):
                    loop = peer.open(batch)
                    loop(1)  # what compiles at its first call
                kernels(peer.name, functools.partial(loop, KERNEL_STEPS), batch, KERNEL_STEPS, results)


def _drift(run: Run) -> list[Task]:
    """The last: the runtime is closed before, so that its memory is free for the others."""
    extra, spec = run.extra, run.runtime.spec
    segments = extra.drift
    if segments is None:
        return []

    def call() -> None:
        run.runtime.close()
        args = (extra.drift_dtypes, segments, run.results, run.say, extra.drift_reference)
        drift(run.prepared.bundle, run.plan, *args)

    each = segments * spec.segment_length / _rates(run)[0]
    return [Task("drift", OURS, call, 4.0 + (FP32_TIMES + len(extra.drift_dtypes)) * each)]


def _rates(run: Run) -> list[float]:
    """Tokens per second of ours at the batch sizes, the smallest first; by short runs where none was measured."""
    size = run.runtime.spec.segment_length
    rows = sorted(run.results.of("step", OURS), key=lambda row: row.batch)
    measured = [row.tokens_per_second for row in rows if row.tokens_per_second]
    sizes = run.plan.smallest_and_largest
    return measured or [batch * size / step_seconds(run.runtime, run.plan, batch) for batch in sizes]
