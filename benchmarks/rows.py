"""What a benchmark finds: rows, kept in `results.json` after each measurement, so that an interrupted run has what it had."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rmt_trt.benchmarks.timing import Timing
from rmt_trt.errors import FormatError
from rmt_trt.files import write_file

Kind = Literal[
    "load",
    "step",
    "length",
    "latency",
    "bare",
    "full",
    "limit",
    "many",
    "energy",
    "kernels",
    "drift",
    "growth",
    "recall",
]
LEFT_OUT = "left out: budget"  # the reason of a row that was not measured for want of time


@dataclass(frozen=True)
class Row:
    """One measurement.

    kind      what was measured, `name` of what: "rmt-trt", "lean PyTorch: eager", ..., "GROUP: VARIANT" of a peer
    batch     documents stepped together
    tokens    of one document; `segments`: steps of the whole batch that `timing` covers
    values    further figures, by name with their unit at its end: "device_bytes", "error", ...
    failed    why there is no figure
    """

    kind: Kind
    name: str
    batch: int = 1
    tokens: int = 0
    segments: int = 0
    timing: Timing | None = None
    values: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    note: str = ""

    @property
    def per_segment(self) -> float | None:
        """Median seconds of a step of the whole batch, or None."""
        return self.timing.median / self.segments if self.timing is not None and self.segments else None

    @property
    def tokens_per_second(self) -> float | None:
        """Text tokens of all documents together by the median, or None."""
        return self.batch * self.tokens / self.timing.median if self.timing is not None and self.tokens else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, what is empty left out."""
        value = {
            "kind": self.kind,
            "name": self.name,
            "batch": self.batch,
            "tokens": self.tokens,
            "segments": self.segments,
            "seconds": None if self.timing is None else self.timing.to_json(),
            "ms_per_segment": None if self.per_segment is None else 1e3 * self.per_segment,
            "tokens_per_second": self.tokens_per_second,
            "values": self.values,
            "failed": self.failed,
            "note": self.note,
        }
        return {key: item for key, item in value.items() if item not in (None, "", 0, {})}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """Reads what `to_json` wrote."""
        given = {
            key: value[key]
            for key in ("kind", "name", "batch", "tokens", "segments", "values", "failed", "note")
            if key in value
        }
        return cls(**given, timing=Timing(**value["seconds"]) if "seconds" in value else None)


class Results:
    """The rows of a run, in `folder/results.json` after each that is added; without a folder they are kept alone.

    head  what the rows were measured with: machine, model, options
    """

    def __init__(self, folder: Path | None, head: dict[str, Any]) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.head = folder, head
        self.rows: list[Row] = []

    def add(self, *rows: Row) -> None:
        """Adds rows and writes the file."""
        self.rows += rows
        self.save()

    def save(self) -> None:
        """Writes `results.json` whole. Errors: FormatError, when the folder cannot be written."""
        if self.folder is None:
            return
        value = self.head | {"rows": [row.to_json() for row in self.rows]}
        write_file(self.folder / "results.json", (json.dumps(_plain(value), indent=1) + "\n").encode())

    def of(self, kind: Kind, name: str | None = None) -> list[Row]:
        """Rows of a kind, and of a name."""
        return [row for row in self.rows if row.kind == kind and name in (None, row.name)]

    @contextlib.contextmanager
    def attempt(self, kind: Kind, name: str, batch: int = 1, tokens: int = 0) -> Iterator[None]:
        """A measurement that may fail: its reason becomes a row, and the run goes on."""
        try:
            yield
        except Exception as err:  # any library's, of any kind: a missing compiler, memory that does not suffice
            self.add(Row(kind, name, batch, tokens, failed=reason(err)))


def read_results(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """(head, rows) of `folder/results.json`; nothing where there is none. Errors: FormatError for another file."""
    path = folder / "results.json"
    if not path.is_file():
        return {}, []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value, [Row.from_json(row) for row in value.pop("rows")]
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise FormatError(f"{path} is no results file of rmt-bench: {reason(err)}") from err


def reason(err: BaseException) -> str:
    """An error as one short line."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0] if lines else 'without a message'}"[:300]


def _plain(value: Any) -> Any:
    """Numbers that JSON does not have become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
