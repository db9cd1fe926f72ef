"""What the tables of a report are made of: a section, how it is shown, and how figures are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Section:
    """A table: title, names of columns, rows of text, and a line below it."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def screen_table(section: Section) -> Table:
    """A section for the terminal."""
    table = Table(title=section.title, title_justify="left", caption=section.note or None, caption_justify="left")
    for number, name in enumerate(section.columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in section.rows:
        table.add_row(*row)
    return table


def markdown_table(section: Section) -> list[str]:
    """The lines of a section."""
    lines = [f"## {section.title}", "", "| " + " | ".join(section.columns) + " |"]
    lines.append("|---|" + "---:|" * (len(section.columns) - 1))
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in section.rows]
    return [*lines, "", *([section.note, ""] if section.note else [])]


def in_ms(seconds: float | None) -> str:
    """Milliseconds of a step or call; nothing for None, like the others."""
    return "" if seconds is None else f"{1e3 * seconds:,.3f}"


def in_s(seconds: float | None) -> str:
    """Seconds of a whole document."""
    return "" if seconds is None else f"{seconds:,.4g}"


def in_mb(count: float | None) -> str:
    """Bytes as megabytes."""
    return "" if count is None else f"{count / 1e6:,.1f} MB"
