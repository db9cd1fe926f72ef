"""What a run leaves beside its model: metrics.csv, one row per evaluation, and train.log, one line per event."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path

from rmt_trt.errors import FormatError
from rmt_trt.files import read_bounded, write_file
from rmt_trt.training.loop import Report

MAX_BYTES = 1 << 28
COLUMNS = [field.name for field in fields(Report)]


def start_metrics(path: Path, step: int) -> None:
    """Begins metrics.csv; of one that is there, the rows up to `step` are kept: the later ones come again."""
    rows: list[dict[str, str]] = []
    if step and path.is_file():
        rows = [row for row in read_metrics(path) if int(row["step"]) <= step]
    write_file(path, _lines([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]).encode())


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, as text; a last line that was broken off is left out. Errors: FormatError."""
    data = read_bounded(path, MAX_BYTES, "the metrics.csv of rmt-train")
    try:
        table = csv.DictReader(io.StringIO(data[: data.rfind(b"\n") + 1].decode("utf-8")))
        rows = list(table)
        [int(row[name]) for row in rows for name in ("step", "stage", "segments")]
        # Of an empty file there are no names; a row that lacks values has None among them, one with more under None.
        if table.fieldnames not in (None, COLUMNS) or any(None in {*row, *row.values()} for row in rows):
            raise ValueError(f"its columns are not {','.join(COLUMNS)}")
    except (KeyError, TypeError, ValueError, csv.Error) as err:
        raise FormatError(f"{path} is no metrics.csv of rmt-train ({err!r}); move it away and resume again") from err
    return rows


def add_metrics(path: Path, report: Report) -> None:
    """Appends an evaluation."""
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(_lines([[f"{v:.6g}" if isinstance(v, float) else str(v) for v in asdict(report).values()]]))


def line_of(report: Report, stages: int) -> str:
    """An evaluation as a line for people."""
    stage = f"stage {report.stage + 1} of {stages}" if report.stage < stages else "all stages passed"
    return (
        f"step {report.step:6d}  {stage:18s} segments {report.segments:3d}  loss {report.loss:.4f}  "
        f"accuracy {report.accuracy:7.2%}  lr {report.learning_rate:.2e}  {report.seconds:7.1f} s"
    )


def _lines(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
