"""The plot of sensitivities: what each unit, quantized alone, does to the memory. Matplotlib only when drawing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rmt_trt.calibration.sensitivity import UnitDrift
from rmt_trt.errors import require
from rmt_trt.files import atomic_file

DPI = 120
MOST_UNITS = 60  # those with the largest errors; a picture of more could not be read
LEAST = 1e-7  # errors below stand here
NAME = 48  # characters


def draw_sensitivity(path: Path, found: Sequence[UnitDrift], kept: Collection[str] = ()) -> None:
    """Writes a PNG: a row for each unit, worst on top, with the memory's error after 1, 2, 4, ... segments and the logits'
    largest. kept: names of the units that a mix keeps in float32.

    Errors: EngineError without matplotlib, FormatError when the file cannot be written.
    """
    matplotlib: Any = require("matplotlib", "analyze", "the plot of sensitivities")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(found, key=lambda one: -max(one.drifted.drift, one.drifted.logits))[:MOST_UNITS]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.22 * len(rows)), layout="constrained")
    segments = [at.segment for at in rows[0].drifted.along]
    colours = plt.get_cmap("viridis")([0.9 * place / max(1, len(segments) - 1) for place in range(len(segments))])
    for place, (segment, colour) in enumerate(zip(segments, colours, strict=True)):
        values = [max(one.drifted.along[place].memory, LEAST) for one in rows]
        label = f"memory after {segment:,} segment{'s' if segment > 1 else ''}"
        axes.scatter(values, range(len(rows)), color=colour, s=22, label=label, zorder=3)
    worst = [max(one.drifted.logits, LEAST) for one in rows]
    axes.scatter(worst, range(len(rows)), marker="x", color="C3", s=20, label="logits, largest", zorder=2)
    axes.set_yticks(range(len(rows)), [_shown(one) for one in rows], fontsize=7)
    for tick, one in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if one.unit.name in kept else "normal")
        tick.set_color("C0" if one.unit.way else "black")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("relative L2 error when this alone is quantized")
    axes.grid(True, axis="both", alpha=0.25)
    axes.legend(fontsize=7, loc="lower right")
    said = ["blue: ways of the memory, never quantized"] + (["bold: kept in float32"] if kept else [])
    axes.set_title("; ".join(said), fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    plt.close(figure)


def _shown(one: UnitDrift) -> str:
    """A name's end, which tells more than its beginning; as it is, even where it has dollar signs."""
    name = one.unit.name
    return (name if len(name) <= NAME else f"...{name[3 - NAME :]}").replace("$", r"\$")
