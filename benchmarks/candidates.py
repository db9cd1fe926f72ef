"""The peers of a run: PyTorch with the published and with the lean step, ONNX Runtime with a plain export.

A name is "GROUP: VARIANT": a user takes the best variant of a group, so the report compares with that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmt_trt.benchmarks.compare import Segments, on_device
from rmt_trt.benchmarks.plan import GROUPS, LEAN, PUBLISHED, WAYS, Plan
from rmt_trt.benchmarks.presets import Prepared

Loop = Callable[[int], Any]  # steps through the first n segments, waits, and gives the memory: see `peers`
GROUP_NAMES = {PUBLISHED: "PyTorch, model as published", LEAN: "lean PyTorch"}
ORT = "ONNX Runtime"
# Seconds of opening a peer and timing it beside ours, of BERT-base on an H200; a larger batch is compiled more slowly.
COMPILE_SECONDS = {"default": 20.0, "max-autotune": 35.0}
LARGER_BATCH = 1.8
PLAIN_SECONDS, EXPORT_SECONDS = 4.0, 12.0


@dataclass(frozen=True)
class Candidate:
    """A peer that can be opened for a batch size.

    smallest_only  what it does differently pays in small batches, or is known already
    spare          of less importance than what is measured after the peers
    seconds, cost  what opening and timing it takes: see `budget.Task`
    """

    name: str
    open: Callable[[int], Loop]
    smallest_only: bool = False
    spare: bool = False
    seconds: float = PLAIN_SECONDS
    cost: str = "peer"


def candidates(prepared: Prepared, plan: Plan, segments: Segments, work: Path) -> list[Candidate]:
    """The peers that the plan names, the most important first. Weights and sessions are made when one is opened, and
    kept."""
    lean = _torch_candidates(LEAN, prepared, plan, segments)
    published = _torch_candidates(PUBLISHED, prepared, plan, segments)
    return [*lean, *published, *_ort_candidates(prepared, plan, segments, work)]


def _torch_candidates(group: str, prepared: Prepared, plan: Plan, segments: Segments) -> list[Candidate]:
    from rmt_trt.benchmarks import peers
    from rmt_trt.benchmarks.lean import LeanStep
    from rmt_trt.benchmarks.published import PublishedStep

    @functools.cache
    def step() -> Any:
        return {LEAN: LeanStep, PUBLISHED: PublishedStep}[group](prepared.model, plan.dtype, plan.place)

    def opened(opener: peers.Opener, batch: int) -> Loop:
        return opener(step(), *on_device(prepared, plan, segments.by_batch[batch]), plan.compile_mode)

    found = []
    for way, peer in zip(WAYS, GROUPS[group], strict=True):
        variants = list(peers.TORCH_PEERS.get(way, {}).items())
        for number, (variant, opener) in enumerate(variants[: plan.variants(len(variants))]):
            name = f"{GROUP_NAMES[group]}: {variant.replace(peers.COMPILE, f'torch.compile {plan.compile_mode}')}"
            if peer in plan.peers:
                found.append(
                    Candidate(
                        name,
                        functools.partial(opened, opener),
                        smallest_only=number > 0 or (group == PUBLISHED and plan.quick),
                        spare=number > 0 or (group, way) == (LEAN, "eager"),
                        seconds=COMPILE_SECONDS[plan.compile_mode] if way == "compile" else PLAIN_SECONDS,
                        cost="compile" if way == "compile" else "peer",
                    )
                )
    return found


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
        memory, rows = on_device(prepared, plan, segments.by_batch[batch])
        loop = ort_peer.captured_loop if graph else ort_peer.bound_loop
        return loop(session(opset, graph), memory, rows)

    def opened_step(batch: int) -> Loop:
        """The bundle's own step.onnx, in fp32, with its mask and head."""
        import torch

        memory, rows = on_device(prepared, plan, segments.by_batch[batch], "fp32")
        config = prepared.model.config
        middle = () if config.form == "encoder" else (config.segment_length,)
        logits = torch.empty((batch, *middle, config.num_logits), device=plan.place)
        return ort_peer.bound_loop(step_session(), memory, rows, logits)

    variants = [(20, False), (23, False), (20, True)] if plan.gpu else [(20, False), (23, False)]
    found = [
        Candidate(
            f"{ORT}: opset {opset}" + (" + CUDA graph" if graph else ""),
            functools.partial(opened, opset, graph),
            smallest_only=graph,
            spare=number > 0,
            seconds=EXPORT_SECONDS,
            cost=f"opset {opset}",
        )
        for number, (opset, graph) in enumerate(variants[: plan.variants(len(variants))])
    ]
    if (prepared.bundle / "step.onnx").exists() and not plan.quick:
        name = f"{ORT}: step.onnx in fp32"
        found.append(Candidate(name, opened_step, True, True, EXPORT_SECONDS, "step.onnx"))
    return found
