"""Ours and its peers in one process, taking turns, over the same full segments from the same memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmt_trt.benchmarks.machine import Meters
from rmt_trt.benchmarks.ours import OURS, energy, texts
from rmt_trt.benchmarks.plan import CHECKED_SEGMENTS, Plan, documents
from rmt_trt.benchmarks.presets import Prepared
from rmt_trt.benchmarks.quiet import quiet
from rmt_trt.benchmarks.rows import Row
from rmt_trt.benchmarks.timing import measure_in_turn
from rmt_trt.contract import StepSpec
from rmt_trt.errors import VerificationError
from rmt_trt.runtime import RMTRuntime

if TYPE_CHECKING:
    from rmt_trt.benchmarks.candidates import Candidate

RANDOM_WEIGHTS = 5  # times the tolerance: rounding grows further in random weights; what is wrong is off by 1


class Segments:
    """The full segments that all run over, by batch size, and the fp32 memory after the first few of them.

    steps  how many of them, by batch size
    """

    def __init__(self, prepared: Prepared, spec: StepSpec, plan: Plan, steps: dict[int, int]) -> None:
        from rmt_trt.benchmarks.lean import exact_memory

        self.by_batch: dict[int, np.ndarray] = {}
        self.exact: dict[int, np.ndarray] = {}
        for batch in plan.batches:
            rows = documents(spec, batch, steps[batch] * spec.segment_length, seed=batch)
            rows = rows.reshape(batch, steps[batch], -1)
            self.by_batch[batch] = np.ascontiguousarray(rows.transpose(1, 0, 2))
            self.exact[batch] = exact_memory(prepared.model, self.by_batch[batch][:CHECKED_SEGMENTS], plan.place)

    def error(self, memory: np.ndarray, batch: int) -> float:
        """Relative L2 error of a memory (b, M, d) after the first segments."""
        from rmt_trt.export.verify import relative_error

        return relative_error(memory, self.exact[batch])


def beside(
    runtime: RMTRuntime, peer: Candidate, batch: int, plan: Plan, segments: Segments, meters: Meters, work: Path
) -> list[Row]:
    """Opens a peer, proves it right, times it beside ours. Errors: VerificationError, when its memory is wrong."""
    before = meters.device_bytes()
    with quiet(work):
        loop = peer.open(batch)
        memory = loop(CHECKED_SEGMENTS).float().cpu().numpy()
    error = segments.error(memory, batch)
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


def on_device(prepared: Prepared, plan: Plan, rows: np.ndarray, dtype: str = "") -> tuple[Any, Any]:
    """The first memory (b, M, d) in a dtype, the plan's own unless another is given, and the segments (n, b, S) int64."""
    import torch

    from rmt_trt.benchmarks.lean import DTYPES

    memory = prepared.model.memory.detach()[None].expand(rows.shape[1], -1, -1)
    return memory.to(device=plan.place, dtype=DTYPES[dtype or plan.dtype]).contiguous(), torch.from_numpy(rows).to(
        plan.place
    )
