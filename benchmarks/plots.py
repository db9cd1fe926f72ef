"""Plots of a run as SVG: time by length, memory by length, throughput by batch, drift. Matplotlib only when drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.benchmarks.ours import OURS
from rmt_trt.benchmarks.ratios import full_attention, ratios
from rmt_trt.benchmarks.rows import Row
from rmt_trt.errors import require


def draw(folder: Path, rows: Sequence[Row], title: str) -> list[str]:
    """Writes the plots that the rows have points for; their file names. Errors: EngineError without matplotlib."""
    matplotlib: Any = require("matplotlib", "bench", "plots")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawings: dict[str, Callable[[Any, Sequence[Row]], bool]] = {
        "time_by_length.svg": _time_by_length,
        "memory_by_length.svg": _memory_by_length,
        "throughput_by_batch.svg": _throughput,
        "drift.svg": _drift,
    }
    made = []
    for name, drawing in drawings.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        if drawing(axes, rows):
            axes.set_title(title, fontsize=10)
            axes.grid(True, which="both", alpha=0.25)
            axes.legend(fontsize=8)
            figure.savefig(folder / name)
            made.append(name)
        plt.close(figure)
    return made


def _time_by_length(axes: Any, rows: Sequence[Row]) -> bool:
    ours = [row for row in rows if row.kind == "length" and row.timing is not None]
    if not ours:
        return False
    lengths = np.array([row.tokens for row in ours])
    axes.loglog(lengths, [row.timing.median for row in ours if row.timing], "o-", label=OURS)
    for one in ratios(rows):
        if one.batch == 1 and one.seconds is not None:
            axes.loglog(lengths, [one.seconds * row.segments for row in ours], ":", label=f"{one.name} (by segments)")
    full = full_attention(rows)
    if full.lengths:
        (line,) = axes.loglog(full.lengths, full.seconds, "s-", label="full attention")
        if full.curve is not None and lengths.max() > full.curve.longest:
            beyond = np.geomspace(full.curve.longest, lengths.max(), 20)
            axes.loglog(beyond, [full.curve(n) for n in beyond], "--", color=line.get_color(), label="extrapolated")
    axes.set(xlabel="tokens of one document", ylabel="seconds")
    return True


def _memory_by_length(axes: Any, rows: Sequence[Row]) -> bool:
    ours = [row for row in rows if row.kind == "length" and row.values]
    full = [row for row in rows if row.kind == "full" and "device_bytes" in row.values]
    key = "device_bytes_in_use" if any("device_bytes_in_use" in row.values for row in ours) else "host_bytes"
    points = [(row.tokens, row.values[key] / 1e9) for row in ours if key in row.values]
    if not points:
        return False
    what = "device memory in use" if key != "host_bytes" else "host memory of the process"
    axes.loglog(*zip(*points, strict=True), "o-", label=f"{OURS}: {what}")
    if full:
        axes.loglog(
            [r.tokens for r in full], [r.values["device_bytes"] / 1e9 for r in full], "s-", label="full attention"
        )
    axes.set(xlabel="tokens of one document", ylabel="GB")
    return True


def _throughput(axes: Any, rows: Sequence[Row]) -> bool:
    steps = [row for row in rows if row.kind == "step" and row.tokens_per_second]
    names = list(dict.fromkeys(row.name for row in steps))
    for name in names:
        points = [(row.batch, row.tokens_per_second) for row in steps if row.name == name]
        axes.loglog(*zip(*points, strict=True), "o-" if name == OURS else "s:", label=name, base=2)
    axes.set(xlabel="batch", ylabel="tokens per second")
    return bool(names)


def _drift(axes: Any, rows: Sequence[Row]) -> bool:
    found = [row for row in rows if row.kind == "drift" and not row.failed]
    for row in found:
        table = [entry for entry in row.values["table"] if entry["memory"] > 0]
        axes.loglog([e["segments"] for e in table], [e["memory"] for e in table], "o-", label=row.name)
    axes.set(xlabel="segments", ylabel="relative L2 distance of the memory from fp32")
    return bool(found)
