"""Ours and its peers in one process, taking turns, over the same full segments from the same memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.benchmarks.machine import Meters
from rmt_trt.benchmarks.ours import OURS, energy, texts
from rmt_trt.benchmarks.plan import CHECKED_SEGMENTS, Plan, documents
from rmt_trt.benchmarks.presets import Prepared
from rmt_trt.benchmarks.rows import Results, Row
from rmt_trt.benchmarks.timing import measure_in_turn
from rmt_trt.contract import StepSpec
from rmt_trt.errors import VerificationError
from rmt_trt.runtime import RMTRuntime

Loop = Callable[[int], Any]  # steps through the first n segments, waits, and gives the memory: see `peers`
Say = Callable[[str], None]


RANDOM_WEIGHTS = 5  # times the tolerance: rounding grows further in random weights; what is wrong is off by 1


class Segments:
    """The full segments that all run over, by batch size, and the fp32 memory after the first few of them."""

    def __init__(self, prepared: Prepared, spec: StepSpec, plan: Plan) -> None:
        from rmt_trt.benchmarks.lean import exact_memory

        self.by_batch: dict[int, np.ndarray] = {}
        self.exact: dict[int, np.ndarray] = {}
        for batch in plan.batches:
            steps = plan.steps_at(batch)
            rows = documents(spec, batch, steps * spec.segment_length, seed=batch).reshape(batch, steps, -1)
            self.by_batch[batch] = np.ascontiguousarray(rows.transpose(1, 0, 2))
            self.exact[batch] = exact_memory(prepared.model, self.by_batch[batch][:CHECKED_SEGMENTS], plan.place)

    def error(self, memory: np.ndarray, batch: int) -> float:
        """Relative L2 error of a memory (b, M, d) after the first segments."""
        from rmt_trt.export.verify import relative_error

        return relative_error(memory, self.exact[batch])


@dataclass(frozen=True)
class Candidate:
    """A peer that can be opened for a batch size; `smallest_only`: what it does differently pays in small batches."""

    name: str
    open: Callable[[int], Loop]
    smallest_only: bool = False


def candidates(prepared: Prepared, plan: Plan, segments: Segments, work: Path) -> list[Candidate]:
    """The peers that the plan names. Their weights and sessions are made when the first of them is opened, and kept."""
    return [*_torch_candidates(prepared, plan, segments), *_ort_candidates(prepared, plan, segments, work)]


def _torch_candidates(prepared: Prepared, plan: Plan, segments: Segments) -> list[Candidate]:
    from rmt_trt.benchmarks.lean import LeanStep
    from rmt_trt.benchmarks.peers import TORCH_PEERS

    @functools.cache
    def step() -> LeanStep:
        return LeanStep(prepared.model, plan.dtype, plan.place)

    def opened(opener: Callable[..., Loop], batch: int) -> Loop:
        return opener(step(), *_on_device(prepared, plan, segments.by_batch[batch]))

    return [
        Candidate(name, functools.partial(opened, opener), smallest_only=number > 0)
        for peer, variants in TORCH_PEERS.items()
        if peer in plan.peers
        for number, (name, opener) in enumerate(variants.items())
        if number == 0 or not plan.quick
    ]


def _ort_candidates(prepared: Prepared, plan: Plan, segments: Segments, work: Path) -> list[Candidate]:
    from rmt_trt.benchmarks import ort_peer

    if "ort" not in plan.peers:
        return []
    place = plan.device if plan.gpu else None

    @functools.cache
    def session(opset: int, graph: bool) -> Any:
        path = ort_peer.export_lean(prepared.model, plan.dtype, opset, work, prepared.name)
        return ort_peer.session(path, place, plan.threads, plan.dtype, graph)

    @functools.cache
    def step_session() -> Any:
        return ort_peer.session(prepared.bundle / "step.onnx", place, plan.threads, plan.dtype)

    def opened(opset: int, graph: bool, batch: int) -> Loop:
        memory, rows = _on_device(prepared, plan, segments.by_batch[batch])
        loop = ort_peer.captured_loop if graph else ort_peer.bound_loop
        return loop(session(opset, graph), memory, rows)

    def opened_step(batch: int) -> Loop:
        """The bundle's own step.onnx, in fp32, with its mask and head."""
        import torch

        memory, rows = _on_device(prepared, plan, segments.by_batch[batch], "fp32")
        config = prepared.model.config
        middle = () if config.form == "encoder" else (config.segment_length,)
        logits = torch.empty((batch, *middle, config.num_logits), device=plan.place)
        return ort_peer.bound_loop(step_session(), memory, rows, logits)

    variants = [(20, False), (23, False), (20, True)] if plan.gpu else [(20, False), (23, False)]
    has_step = (prepared.bundle / "step.onnx").exists() and not plan.quick
    plain = [Candidate("ONNX Runtime, step.onnx in fp32", opened_step, smallest_only=True)] if has_step else []
    return plain + [
        Candidate(
            f"ONNX Runtime, opset {opset}" + (" + CUDA graph" if graph else ""),
            functools.partial(opened, opset, graph),
            smallest_only=graph,
        )
        for opset, graph in variants[: 1 if plan.quick else None]
    ]


def compare(
    runtime: RMTRuntime,
    peers: list[Candidate],
    plan: Plan,
    segments: Segments,
    meters: Meters,
    results: Results,
    say: Say,
) -> None:
    """Every peer at every batch size, ours and the peer taking turns."""
    for peer in peers:
        for batch in plan.batches:
            if peer.smallest_only and batch != min(plan.batches):
                continue
            say(f"{peer.name}, batch {batch}")
            with results.attempt("step", peer.name, batch):
                results.add(*_beside(runtime, peer, batch, plan, segments, meters))
            meters.release()


def _beside(
    runtime: RMTRuntime, peer: Candidate, batch: int, plan: Plan, segments: Segments, meters: Meters
) -> list[Row]:
    """Opens a peer, proves it right, times it beside ours. Errors: VerificationError, when its memory is wrong."""
    before = meters.device_bytes()
    loop = peer.open(batch)
    error = segments.error(loop(CHECKED_SEGMENTS).float().cpu().numpy(), batch)
    require_right(error, plan)
    rows = segments.by_batch[batch]
    ours = texts(rows)

    def theirs() -> object:
        return loop(len(rows))

    def mine() -> object:
        return runtime.run(ours, alignment="left")

    theirs(), mine()
    timing, turn = measure_in_turn([theirs, mine], plan.effort)
    values: dict[str, Any] = {"error": error, f"{OURS}_seconds": turn.median}
    used = meters.device_bytes()
    if used is not None and before is not None:
        values["device_bytes"] = used - before
    found = [Row("step", peer.name, batch, rows.shape[0] * rows.shape[2], rows.shape[0], timing, values)]
    if not plan.quick and batch in plan.smallest_and_largest:
        found += energy(peer.name, theirs, rows.size, batch, meters)
    return found


def require_right(error: float, plan: Plan) -> None:
    """Errors: VerificationError, when a memory is further from the fp32 step's than any rounding explains."""
    from rmt_trt.export.verify import TOLERANCES

    limit = RANDOM_WEIGHTS * TOLERANCES[plan.dtype]
    if not error <= limit:
        raise VerificationError(
            f"the memory after {CHECKED_SEGMENTS} segments is off by {error:.1e}, more than {limit:.1e}", {}
        )


def _on_device(prepared: Prepared, plan: Plan, rows: np.ndarray, dtype: str = "") -> tuple[Any, Any]:
    """The first memory (b, M, d) in a dtype, the plan's own unless another is given, and the segments (n, b, S) int64."""
    import torch

    from rmt_trt.benchmarks.lean import DTYPES

    memory = prepared.model.memory.detach()[None].expand(rows.shape[1], -1, -1)
    return memory.to(device=plan.place, dtype=DTYPES[dtype or plan.dtype]).contiguous(), torch.from_numpy(rows).to(
        plan.place
    )
