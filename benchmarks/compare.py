"""Ours and its peers, one after another in one process, over the same full segments from the same memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.benchmarks.machine import Meters
from rmt_trt.benchmarks.plan import CHECKED_SEGMENTS, Plan, documents
from rmt_trt.benchmarks.presets import Prepared
from rmt_trt.benchmarks.rows import Results, Row
from rmt_trt.benchmarks.timing import measure
from rmt_trt.contract import StepSpec
from rmt_trt.errors import VerificationError

ORT_OPSETS = (20, 23)  # the second has a standard Attention node
Say = Callable[[str], None]


class Segments:
    """The full segments that all run over, by batch size, and the fp32 memory after the first few of them."""

    def __init__(self, prepared: Prepared, spec: StepSpec, plan: Plan) -> None:
        from rmt_trt.benchmarks.lean import exact_memory

        self.by_batch: dict[int, np.ndarray] = {}
        self.exact: dict[int, np.ndarray] = {}
        device = f"cuda:{plan.device}" if plan.gpu else "cpu"
        for batch in plan.batches:
            steps = plan.steps_at(batch)
            ids = documents(spec, batch, steps * spec.segment_length, seed=batch)
            rows = ids.reshape(batch, steps, spec.segment_length)
            self.by_batch[batch] = np.ascontiguousarray(rows.transpose(1, 0, 2))
            self.exact[batch] = exact_memory(prepared.model, self.by_batch[batch][:CHECKED_SEGMENTS], device)

    def error(self, memory: np.ndarray, batch: int) -> float:
        """Relative L2 error of a memory (b, M, d) after the first segments."""
        from rmt_trt.export.verify import relative_error

        return relative_error(memory, self.exact[batch])


def torch_peers(prepared: Prepared, plan: Plan, segments: Segments, meters: Meters, results: Results, say: Say) -> None:
    """The PyTorch peers that the plan names, at every batch size."""
    import torch

    from rmt_trt.benchmarks.lean import LeanStep
    from rmt_trt.benchmarks.peers import TORCH_PEERS

    device = f"cuda:{plan.device}" if plan.gpu else "cpu"
    if not plan.gpu and plan.threads is not None:
        torch.set_num_threads(plan.threads)
    wanted = [variants for peer, variants in TORCH_PEERS.items() if peer in plan.peers]
    if not wanted:
        return
    step = LeanStep(prepared.model, plan.dtype, device)
    for batch in plan.batches:
        memory, rows = _on_device(prepared, plan, segments.by_batch[batch], step.embed.weight.dtype, device)
        for variants in wanted:
            for name, opener in list(variants.items())[: 1 if plan.quick else None]:
                say(f"{name}, batch {batch}")
                with results.attempt("step", name, batch):
                    _peer(name, partial(opener, step, memory, rows), batch, plan, segments, meters, results)
                meters.release()


def ort_peers(
    prepared: Prepared, plan: Plan, segments: Segments, meters: Meters, work: Path, results: Results, say: Say
) -> None:
    """ONNX Runtime with plain exports of the step, at every batch size."""
    from rmt_trt.benchmarks.ort_peer import bound_loop, export_lean, host_loop, session

    device = f"cuda:{plan.device}" if plan.gpu else "cpu"
    for opset in ORT_OPSETS[: 1 if plan.quick else None]:
        name = f"ONNX Runtime, plain export, opset {opset}"
        say(name)
        with results.attempt("step", name, plan.batches[0]):
            path = export_lean(prepared.model, plan.dtype, opset, work, prepared.name)
            made = session(path, plan.device if plan.gpu else None, plan.threads, plan.dtype)
            for batch in plan.batches:
                rows = segments.by_batch[batch]
                dtype = _torch_dtype(plan.dtype)
                memory, tokens = _on_device(prepared, plan, rows, dtype, device)

                def opened(memory: Any = memory, tokens: Any = tokens, made: Any = made) -> Any:
                    if plan.gpu:
                        return bound_loop(made, memory, tokens, {})
                    return host_loop(made, memory.numpy(), tokens.numpy())

                with results.attempt("step", name, batch):
                    _peer(name, opened, batch, plan, segments, meters, results)
        made = None
        meters.release()


def _peer(
    name: str, opened: Callable[[], Any], batch: int, plan: Plan, segments: Segments, meters: Meters, results: Results
) -> None:
    """Opens a peer, proves it right, times it. Errors: VerificationError, when its memory is wrong."""
    from rmt_trt.export.verify import TOLERANCES

    before = meters.device_bytes()
    loop = opened()
    error = segments.error(loop(CHECKED_SEGMENTS).float().cpu().numpy(), batch)
    if not error <= TOLERANCES[plan.dtype]:
        raise VerificationError(f"its memory is off by {error:.1e}, more than {TOLERANCES[plan.dtype]:.1e}", {})
    rows = segments.by_batch[batch]
    timing = measure(lambda: loop(len(rows)), plan.effort)
    values: dict[str, Any] = {"error": error}
    used = meters.device_bytes()
    if used is not None and before is not None:
        values["device_bytes"] = used - before
    results.add(Row("step", name, batch, rows.shape[0] * rows.shape[2], rows.shape[0], timing, values))


def _torch_dtype(name: str) -> Any:
    from rmt_trt.benchmarks.lean import DTYPES

    return DTYPES[name]


def _on_device(prepared: Prepared, plan: Plan, rows: np.ndarray, dtype: Any, device: str) -> tuple[Any, Any]:
    import torch

    batch = rows.shape[1]
    memory = prepared.model.memory.detach()[None].expand(batch, -1, -1).to(device=device, dtype=dtype).contiguous()
    return memory, torch.from_numpy(rows).to(device)
