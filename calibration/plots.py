"""The plot of how ranges move along the recurrence. Matplotlib only when drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmt_trt.calibration.ranges import Ranges, TensorRange
from rmt_trt.errors import require
from rmt_trt.files import atomic_file

DPI = 120
NAMED = 6  # tensors that are told apart: those that move the most
MARKS = "osD^vP*X"


def draw(path: Path, ranges: Ranges) -> None:
    """Writes a PNG: the states' bounds, and how far each quantized tensor reaches, by segment on a logarithmic axis.

    Errors: EngineError without matplotlib, FormatError when the file cannot be written.
    """
    matplotlib: Any = require("matplotlib", "analyze", "the plot of ranges")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _states(left, ranges)
    _tensors(right, ranges)
    starts = sorted({start for tensor in ranges.states.values() for start, _, _ in tensor.along})
    for axes in (left, right):
        axes.set_xticks(_places(starts), [_octave(start) for start in starts], rotation=45, ha="right", fontsize=8)
        axes.set_xlabel("segments gone before, logarithmic")
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=7, loc="best" if axes is left else "lower left")
    figure.suptitle(f"{ranges.segments} segments of {len(ranges.documents)} documents, {ranges.method}", fontsize=10)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    plt.close(figure)


def _states(axes: Any, ranges: Ranges) -> None:
    """Lowest and highest value of each state."""
    for number, (name, tensor) in enumerate(ranges.states.items()):
        starts = _places([start for start, _, _ in tensor.along])
        for column, style in ((1, "--"), (2, "-")):
            label = f"{_plain(name)}, {'lowest' if column == 1 else 'highest'}"
            values = [row[column] for row in tensor.along]
            axes.plot(starts, values, style, marker=MARKS[number % len(MARKS)], color=f"C{number}", label=label)
    axes.set_ylabel("value")
    axes.set_title("what the memory holds before a segment", fontsize=10)


def _tensors(axes: Any, ranges: Ranges) -> None:
    """How far each tensor reaches, as a share of what it is quantized with."""
    moving = sorted(ranges.tensors, key=lambda name: -_movement(ranges.tensors[name]))
    for number, name in reversed(list(enumerate(moving))):
        tensor = ranges.tensors[name]
        starts = _places([start for start, _, _ in tensor.along])
        look: dict[str, Any] = {"color": "0.75", "linewidth": 0.8}
        if number < NAMED:
            look = {"color": f"C{number}", "marker": MARKS[number], "markersize": 4, "label": _plain(name)}
        axes.plot(starts, [reach / tensor.threshold for reach in _reach(tensor)], **look)
    axes.axhline(1, color="black", linestyle=":", linewidth=1.2, label="quantized up to here")
    axes.set_ylim(0, 1.05 * max(1.0, *(max(_reach(one)) / one.threshold for one in ranges.tensors.values())))
    axes.set_ylabel("largest magnitude / threshold")
    axes.set_title(f"inputs of the products; named: the {min(NAMED, len(moving))} that move the most", fontsize=10)


def _reach(tensor: TensorRange) -> list[float]:
    return [max(abs(low), abs(high)) for _, low, high in tensor.along]


def _movement(tensor: TensorRange) -> float:
    reach = _reach(tensor)
    return (max(reach) - min(reach)) / tensor.threshold


def _places(starts: list[int]) -> list[int]:
    """Where octaves stand on the axis, one behind the other."""
    return [start.bit_length() for start in starts]


def _octave(start: int) -> str:
    return f"{start:,}" if start < 2 else f"{start:,}\N{EN DASH}{2 * start - 1:,}"


def _plain(name: str) -> str:
    """A name as it is: what stands between two dollar signs would be set as a formula."""
    return name.replace("$", r"\$")
