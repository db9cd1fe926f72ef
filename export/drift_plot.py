"""The plot of verifications: errors of memory and logits, and the answers, by segment. Matplotlib only when drawing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rmt_trt.errors import require
from rmt_trt.export.drift_report import Report
from rmt_trt.files import atomic_file

DPI = 120
WIDE = 120  # characters of a line of the legend
MARKS = {"memory": "o-", "logits": "s--"}


def draw(path: Path, reports: Sequence[Report]) -> None:
    """Writes a PNG. Faint: single segments; marked: medians of octaves; dotted: what the dtype is held to.

    Errors: EngineError without matplotlib, FormatError when the file cannot be written.
    """
    matplotlib: Any = require("matplotlib", "analyze", "the plot of drift")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (errors, answers) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, layout="constrained", height_ratios=(3, 1)
    )
    for number, report in enumerate(reports):
        for of in ("memory", "logits"):
            _errors(errors, report, of, f"C{number}")
        if report.tolerance is not None:
            errors.axhline(report.tolerance, color=f"C{number}", linestyle=":", label=f"{report.dtype}: tolerance")
        _answers(answers, report, f"C{number}")
    errors.set_xscale("log", base=2)
    errors.set_yscale("log")
    errors.set_ylabel("relative L2 error")
    errors.grid(True, which="major", alpha=0.25)
    errors.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.03))
    first = reports[0]
    errors.set_title(f"against the {first.reference}; {_plain(first.document)}", fontsize=9)
    answers.set_xlabel("segment, logarithmic")
    answers.set_ylabel("answers that are\nthe reference's, %")
    answers.grid(True, which="major", alpha=0.25)
    answers.legend(fontsize=7, loc="lower left")
    places = [1 << power for power in range(max(report.segments for report in reports).bit_length())]
    answers.set_xticks(places, [f"{place:,}" for place in places])
    answers.minorticks_off()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    plt.close(figure)


def _errors(axes: Any, report: Report, of: Literal["memory", "logits"], color: str) -> None:
    """An error of 0 or one that is not finite has no place on a logarithmic axis, and is left out."""
    axes.plot([row.segment for row in report.rows], [_positive(getattr(row, of)) for row in report.rows],
              MARKS[of][1:], color=color, alpha=0.25, linewidth=0.8)  # fmt: skip
    levels = [octave.level(of) for octave in report.octaves]
    label = textwrap.fill(f"{report.engine} {report.dtype}, {of} {report.trend(of).words}", WIDE)
    axes.plot([(one.first + one.last) / 2 for one in levels], [_positive(one.median) for one in levels], MARKS[of],
              color=color, markersize=4, label=label)  # fmt: skip


def _answers(axes: Any, report: Report, color: str) -> None:
    axes.plot([row.segment for row in report.rows], [100 * row.agreed for row in report.rows], color=color,
              label=f"{report.engine} {report.dtype}, so far")  # fmt: skip
    if report.needed is not None:
        axes.axhline(100 * report.needed, color=color, linestyle=":", label=f"{report.dtype}: needed")


def _positive(error: float) -> float:
    return error if 0 < error < float("inf") else float("nan")


def _plain(name: str) -> str:
    """A name as it is: what stands between two dollar signs would be set as a formula."""
    return name.replace("$", r"\$")
