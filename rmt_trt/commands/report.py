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
            table.add_row(str(number), str(row["tokens"]), f"{row['memory']:.1e}", f"{row['logits']:.1e}")
    table.add_row("batch", "", f"{report['batch_memory']:.1e}", f"{report['batch_logits']:.1e}")
    verdict = "passed" if report["passed"] else "FAILED"
    table.caption = (
        f"{verdict}: worst {report['worst']:.1e}, tolerance {report['tolerance']:.1e}; resetting the memory changes the "
        f"last logits by {report['memory_effect']:.1%}"
    )
    table.caption_justify = "left"
    return table
