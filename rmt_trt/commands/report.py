"""How a verification report is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def drift_table(report: Mapping[str, Any]) -> Table:
    """The errors after 1, 2, 4, 8, ... segments, of a report as `Report.to_json` gives it."""
    table = Table(
        title=f"engine {report['engine']} ({report['dtype']}) against the {report['reference']}, relative L2 error",
        title_justify="left",
    )
    for name in ("segment", "tokens", "memory", "logits"):
        table.add_column(name, justify="right")
    rows = report["rows"]
    for row in rows:
        number = row["segment"]
        if number & (number - 1) == 0 or row is rows[-1]:
            table.add_row(str(number), str(row["tokens"]), _figure(row["memory"]), _figure(row["logits"]))
    table.add_row("batch", "", _figure(report["batch_memory"]), _figure(report["batch_logits"]))
    effect = report["memory_effect"]
    verdict = "passed" if report["passed"] else "FAILED"
    table.caption = (
        f"{verdict}: worst {_figure(report['worst'])}, tolerance {report['tolerance']:.1e}; resetting the memory changes the "
        f"last logits by {'an unknown share' if effect is None else format(effect, '.1%')}"
    )
    table.caption_justify = "left"
    return table


def _figure(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"
