"""Plots of results as PNG: accuracy by number of segments, and by the place of the fact. Matplotlib only when drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rmt_trt.errors import require
from rmt_trt.evaluation.cases import in_segments
from rmt_trt.evaluation.rows import Results, Row
from rmt_trt.files import atomic_file

BY_SEGMENTS, BY_POSITION = "accuracy_by_segments.png", "accuracy_by_position.png"
DPI = 120
MARKS = "osD^vP*Xhd"
ABOUT = ("name", "engine", "dtype")  # of a model


def draw(folder: Path, results: Sequence[Results]) -> list[str]:
    """Writes the plots that the rows have points for, all results in one picture; their file names.

    Errors: EngineError without matplotlib, FormatError when the folder cannot be written.
    """
    matplotlib: Any = require("matplotlib", "analyze", "plots")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Each draws its lines and tells which results they are of, one for each line.
    drawings: dict[str, Callable[[Any, Sequence[Results]], list[Results]]] = {
        BY_SEGMENTS: _by_segments,
        BY_POSITION: _by_position,
    }
    made = []
    for name, drawing in drawings.items():
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        if shown := drawing(axes, results):
            _finish(axes, shown)
            with atomic_file(folder / name) as temporary:
                figure.savefig(temporary, format="png", dpi=DPI)
            made.append(name)
        plt.close(figure)
    return made


def _by_segments(axes: Any, results: Sequence[Results]) -> list[Results]:
    series = [(one, task, rows) for one in results for (task, _), rows in _series(one, placed=False).items()]
    names = _names([(one, task) for one, task, _ in series])
    for number, (_, _, rows) in enumerate(series):
        aside = 2 ** (0.12 * (number - (len(series) - 1) / 2))
        _line(axes, number, [row.segments * aside for row in rows], rows, names[number])
    if series:
        axes.set_xscale("log", base=2)
        ticks = sorted({row.segments for _, _, rows in series for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        sizes = sorted({one.head["model"]["segment_length"] for one, _, _ in series})
        axes.set_xlabel(f"number of segments (of {' or '.join(map(str, sizes))} tokens each), logarithmic")
    return [one for one, _, _ in series]


def _by_position(axes: Any, results: Sequence[Results]) -> list[Results]:
    series = [(one, key, rows) for one in results for key, rows in _series(one, placed=True).items()]
    names = _names([(one, task) for one, (task, _), _ in series])
    for number, (_, (_, segments), rows) in enumerate(series):
        aside = 2 * (number - (len(series) - 1) / 2) / len(series)
        name = f"{names[number]}, {in_segments(segments or 0)}"
        _line(axes, number, [(row.position or 0) + aside for row in rows], rows, name)
    axes.set_xlim(-4, 104)
    axes.set_xticks(range(0, 101, 10))
    axes.set_xlabel("place of the fact, % of the text before the question")
    return [one for one, _, _ in series]


def _series(results: Results, placed: bool) -> dict[tuple[str, int | None], list[Row]]:
    """Measured rows at random places by task, in order of length; or those at given places by task and length."""
    found: dict[tuple[str, int | None], list[Row]] = {}
    for row in sorted(results.rows, key=lambda row: row.segments if row.position is None else row.position):
        if not row.left_out and placed == (row.position is not None):
            found.setdefault((row.task, row.segments if placed else None), []).append(row)
    return found


def _line(axes: Any, number: int, places: Sequence[float], rows: Sequence[Row], name: str) -> None:
    """A series with its intervals. The caller moves the points of several series apart, so that the bars can be told."""
    y = [100 * row.accuracy for row in rows]
    below = [max(0.0, value - 100 * row.interval[0]) for value, row in zip(y, rows, strict=True)]
    above = [max(0.0, 100 * row.interval[1] - value) for value, row in zip(y, rows, strict=True)]
    mark = MARKS[number % len(MARKS)]
    axes.errorbar(places, y, yerr=[below, above], marker=mark, markersize=5, capsize=3, linewidth=1.4, label=name)


def _finish(axes: Any, shown: Sequence[Results]) -> None:
    """What both plots have: the level of chance, the other axis, a title, a grid and a legend."""
    for classes in sorted({len(one.head["labels"]) for one in shown}):
        chance = 100 / classes
        axes.axhline(chance, color="black", linestyle=":", linewidth=1.2, label=f"chance, {chance:.1f} %")
    axes.set_ylim(-3, 104)
    axes.set_yticks(range(0, 101, 10))
    axes.set_ylabel("questions answered right, %\n(bars: 95 % Wilson intervals)")
    axes.set_title(_plain(", ".join(_common([one.head["model"] for one in shown]))), fontsize=10)
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=8 if len(shown) < 10 else 6, ncols=1 + len(shown) // 5)


def _common(models: Sequence[dict[str, Any]]) -> list[str]:
    """What all models have in common of what is said about them."""
    return [str(models[0][key]) for key in ABOUT if len({model[key] for model in models}) == 1]


def _names(series: Sequence[tuple[Results, str]]) -> list[str]:
    """Names of lines: the task, and where other results have a line of the same task what tells them apart."""
    made = []
    for one, task in series:
        rivals = [other.head["model"] for other, name in series if name == task]
        differing = [key for key in ABOUT if len({model[key] for model in rivals}) > 1]
        made.append(_plain(", ".join([task, *(str(one.head["model"][key]) for key in differing)])))
    return made


def _plain(name: str) -> str:
    """A name as it is: what stands between two dollar signs would be set as a formula."""
    return name.replace("$", r"\$")
