"""The pictures: curves of the memory's figures over segments, and attention maps. Matplotlib only when drawing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmt_trt.analysis.cells import Cells, cells_of, pooled
from rmt_trt.analysis.layout import MEMORIES, SPECIAL, places, rows_of
from rmt_trt.analysis.summary import Marks
from rmt_trt.analysis.trajectory import Trajectory
from rmt_trt.errors import require
from rmt_trt.files import write_file

if TYPE_CHECKING:
    from rmt_trt.analysis.attention import Finding

DPI = 100
FRAME = "#00a6d6"
MOST_HEADS = 16  # up to which each share is written into its cell
NARROWEST = 0.02  # of a norm: the least range of its axis
MOST_TICKS = 400  # facts that are marked one by one; of more, evenly chosen ones
COLOURS = {"fact": "#d95f02", "question": "#1b9e77", "noise": "#999999", "special": "#444444", "memory": "#7570b3"}

# A panel: its title, the name of its axis, and its curves (figure, colour, what the legend says).
PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    ("Cosine with the memory one segment earlier", "cosine similarity", (("previous", "C0", ""),)),
    ("Cosine with earlier memories", "cosine similarity",
     (("first", "C0", "with segment 1"), ("initial", "C1", "with the initial memory"))),
    ("Relative change in a segment", "|X - Y| / |Y| (log scale)", (("change", "C0", ""),)),
    ("Norm", "L2 norm, mean over the vectors", (("norm", "C0", ""),)),
    ("Entropy of normalised energies", "share of log d", (("entropy_share", "C0", ""),)),
    ("Effective rank of the memory", "effective rank", (("effective_rank", "C0", ""),)),
)  # fmt: skip


def _pyplot() -> Any:
    matplotlib: Any = require("matplotlib", "analyze", "rmt-analyze's pictures")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    _pyplot().close(figure)
    write_file(path, buffer.getvalue())


def draw_trajectories(path: Path, trajectories: Sequence[Trajectory], marks: Sequence[Marks], title: str) -> None:
    """Median and quartiles of the documents over segments; ticks below stand where a fact stands.

    Errors: EngineError without matplotlib, FormatError when the file cannot be written.
    """
    plt = _pyplot()
    series = [one.series() for one in trajectories]
    longest = max(len(one.figures) for one in trajectories)
    figure, grid = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex=True)
    for axes, (name, unit, curves) in zip(grid.flat, PANELS, strict=True):
        for key, colour, label in curves:
            _band(axes, [one[key] for one in series], longest, colour, label)
        if len(curves) > 1:
            axes.legend(fontsize=7)
        _facts(axes, marks)
        axes.set_title(name, fontsize=10)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xlim(1 / 1.15, longest * 1.15)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(which="both", labelsize=8)
        axes.grid(True, alpha=0.25)
        if curves[0][0] == "change":
            axes.set_yscale("log")
        elif curves[0][0] == "norm":
            _widen(axes)
    for axes in grid[1]:
        axes.set_xlabel("segments read (log scale)", fontsize=8)
    spread = f"median and quartiles of {len(trajectories)} documents" if len(trajectories) > 1 else "one document"
    facts = "; orange ticks: segments with a fact" if any(mark.facts for mark in marks) else ""
    plain = title.replace("$", r"\$")  # what stands between two of them would be set as a formula
    figure.suptitle(f"{plain}: {spread}{facts}", fontsize=10)
    _save(figure, path)


def _band(axes: Any, curves: Sequence[np.ndarray], longest: int, colour: str, label: str) -> None:
    values = np.full((len(curves), longest), np.nan)
    for row, curve in zip(values, curves, strict=True):
        row[: len(curve)] = curve
    numbers = np.arange(1, longest + 1)
    low, median, high = np.nanquantile(values, (0.25, 0.5, 0.75), axis=0)
    axes.plot(numbers, median, color=colour, label=label, linewidth=1.2, marker="." if longest < 40 else "")
    if len(curves) > 1:
        axes.fill_between(numbers, low, high, color=colour, alpha=0.25, linewidth=0)


def _widen(axes: Any) -> None:
    """A norm that hardly moves is shown as one that hardly moves."""
    low, high = axes.get_ylim()
    margin = max(0.0, NARROWEST * abs(high) - (high - low)) / 2
    axes.set_ylim(low - margin, high + margin)


def _facts(axes: Any, marks: Sequence[Marks]) -> None:
    numbers = sorted({segment + 1 for mark in marks for segment in mark.facts})
    if len(numbers) > MOST_TICKS:
        numbers = numbers[:: -(-len(numbers) // MOST_TICKS)]
    across = axes.get_xaxis_transform()  # segments along, and shares of the height up
    axes.vlines(numbers, 0.0, 0.05, color=COLOURS["fact"], transform=across, linewidth=1.2, zorder=3)
    if len(numbers) == 1:
        axes.vlines(numbers, 0.05, 1.0, color=COLOURS["fact"], transform=across, linewidth=0.8, linestyle=":")


def draw_attention(path: Path, finding: Finding, form: str, words: Sequence[str] | None, size: tuple[int, int]) -> None:
    """The map of an operation's layer and head, and beside it the shares of all layers and heads.

    `words` is the segment's text by token, `size` (segments, documents) of the run.
    Errors: as `draw_trajectories`.
    """
    plt = _pyplot()
    drawn, operation = finding.drawn, finding.operation
    cells = cells_of(drawn.regions, words)
    figure, (axes, side) = plt.subplots(
        1, 2, figsize=(10, 6.6), layout="constrained", gridspec_kw={"width_ratios": (3.4, 1)}
    )
    shown = np.sqrt(pooled(drawn.map, cells))
    edges = np.array(cells.edges)
    image = axes.pcolormesh(edges, edges, shown, cmap="magma_r", vmin=0.0, vmax=max(float(shown.max()), 1e-9))
    axes.invert_yaxis()
    axes.set_aspect("equal")
    _mark_regions(axes, cells)
    columns = places(drawn.regions, operation.columns)
    rows = rows_of(operation, drawn.regions, form == "decoder")
    _frames(axes, cells, rows, columns)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
    ticks = np.linspace(0.0, float(shown.max()), 5)
    bar.set_ticks(ticks, labels=[f"{tick**2:.2g}" for tick in ticks], fontsize=7)
    bar.set_label("attention of a row to a column (root scale)", fontsize=8)
    axes.set_title(
        f"document {drawn.seed}, segment {drawn.segment + 1} of {size[0]}, layer {finding.layer + 1}, "
        f"head {finding.head + 1}: the frame holds {drawn.share:.0%} of its rows' attention",
        fontsize=9,
    )
    _shares(side, finding)
    figure.suptitle(f"{operation.name}: {operation.meaning}", fontsize=11)
    below = (
        f"Rows attend to columns. Noise is pooled: a cell is the mean over {cells.pool} tokens each way."
        if (cells.pool > 1)
        else "Rows attend to columns."
    )
    figure.supxlabel(f"{below} Right: means of {size[1]} documents.", fontsize=8)
    _save(figure, path)


def _mark_regions(axes: Any, cells: Cells) -> None:
    """Names and borders of the regions on both axes, words at the cells that have one."""
    borders = sorted({edge for _, start, stop in cells.bands for edge in (start, stop)})
    for edge in borders[1:-1]:
        axes.axhline(edge, color="#666666", linewidth=0.4)
        axes.axvline(edge, color="#666666", linewidth=0.4)
    middles = [(start + stop) / 2 for _, start, stop in cells.bands]
    labels = [cells.label(name) for name, _, _ in cells.bands]
    axes.set_yticks(middles, labels, fontsize=8)
    axes.set_xticks(middles, labels, fontsize=8, rotation=90)
    axes.tick_params(length=0)
    for ticks in (axes.get_yticklabels(), axes.get_xticklabels()):
        for tick, (name, _, _) in zip(ticks, cells.bands, strict=True):
            tick.set_color(COLOURS["memory" if name in MEMORIES else "special" if name in SPECIAL else name])
    other = axes.secondary_xaxis("top")
    other.set_xticks([place for place, _ in cells.words], [word for _, word in cells.words], fontsize=6, rotation=90)
    other.tick_params(length=0)


def _frames(axes: Any, cells: Cells, rows: np.ndarray, columns: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for top, bottom in cells.runs(rows):
        for left, right in cells.runs(columns):
            frame = Rectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=FRAME, linewidth=1.6, zorder=4
            )
            axes.add_patch(frame)


def _shares(axes: Any, finding: Finding) -> None:
    layers, heads = finding.shares.shape
    axes.imshow(finding.shares, cmap="magma_r", vmin=0.0, vmax=1.0, aspect="auto")
    if heads <= MOST_HEADS and layers <= MOST_HEADS:
        for layer in range(layers):
            for head in range(heads):
                value = finding.shares[layer, head]
                colour = "white" if value > 0.5 else "black"
                axes.text(head, layer, f"{value:.0%}"[:-1], ha="center", va="center", fontsize=6, color=colour)
    axes.plot(finding.head, finding.layer, "s", markersize=13, markerfacecolor="none", markeredgecolor=FRAME)
    axes.set_xticks(range(heads), [str(head + 1) for head in range(heads)], fontsize=7)
    axes.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)], fontsize=7)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_title(f"share by layer and head, %\neven attention: {finding.even:.1%}", fontsize=9)
