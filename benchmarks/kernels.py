"""Where a step's time goes on the device: its kernels by name, recorded by the driver (CUPTI) whoever launched them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from rmt_trt.benchmarks.rows import Results, Row

NAME_LENGTH = 120


def kernels(name: str, run: Callable[[], object], batch: int, steps: int, results: Results) -> None:
    """Adds a row with the kernels of `run`, of so many steps, per step. Taken last: recording may slow what comes after."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it clears its events behind each cycle; there is one
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run()
            torch.cuda.synchronize()
    table = by_name(
        (event.name, float(event.device_time_total))
        for event in recorded.events() or ()
        if event.device_type.name == "CUDA"
    )
    total = sum(spent for _, _, spent in table)
    rows = [
        {
            "kernel": kernel,
            "calls": calls / steps,
            "microseconds": spent / steps,
            "share": spent / total if total else 0.0,
        }
        for kernel, calls, spent in table
    ]
    results.add(
        Row("kernels", name, batch, values={"steps": steps, "microseconds_per_step": total / steps, "table": rows})
    )


def by_name(events: Any) -> list[tuple[str, int, float]]:
    """(name, microseconds) of each call -> (name, calls, microseconds in all), the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for name, spent in events:
        calls, total = found.get(name[:NAME_LENGTH], (0, 0.0))
        found[name[:NAME_LENGTH]] = (calls + 1, total + spent)
    return sorted(((name, *counts) for name, counts in found.items()), key=lambda row: -row[2])
