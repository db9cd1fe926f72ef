"""The table of docs/precision.md: a model's dtypes by size, speed, drift and recall, out of what other commands measured.

    python -m rmt_trt.benchmarks.precision_table FOLDER > table.md

FOLDER holds a folder for each model, and that what was measured of it: `speed-*/results.json` by
`python -m rmt_trt.benchmarks.precision`, `drift-*.json` by rmt-verify, `recall-*/results.json` by rmt-eval. What is missing
stays empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from rmt_trt.benchmarks.precision import instructions
from rmt_trt.benchmarks.tables import Section, in_mb, markdown_table
from rmt_trt.commands.app import new_app, printable, run_command
from rmt_trt.contract import DTYPES, ENGINES
from rmt_trt.errors import FormatError
from rmt_trt.files import read_json

app = new_app()

LIMIT = 64 << 20
MOST, LONGEST_NAME = 1 << 62, 300
DRIFT_AT = (16, 256, 4096)
RECALL_AT = (1, 16, 64, 1024, 4096)


@dataclass
class Line:
    """What was measured of an engine and dtype. recall: by segments, right and asked of each task together."""

    disk: int | None = None
    host: int | None = None
    device: int | None = None
    ratios: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    drift: dict[int, float] = field(default_factory=dict)
    recall: dict[int, tuple[int, int]] = field(default_factory=dict)
    machines: set[str] = field(default_factory=set)


@app.command()
def main(folder: Annotated[Path, typer.Argument(help="A folder with one for each model.")]) -> None:
    """Prints a Markdown table for each model."""
    models = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    sections = [table(path.name, lines) for path in models if (lines := lines_of(path))]
    if not sections:
        raise FormatError(
            f"{folder} holds no folder with results of a model; expected speed-*, drift-* or recall-* in one"
        )
    for section in sections:
        print("\n".join(markdown_table(section)))


def lines_of(folder: Path) -> dict[tuple[str, str], Line]:
    """(engine, dtype) -> what the folder holds of it. Errors: FormatError, naming a file that is no such result."""
    lines: dict[tuple[str, str], Line] = {}
    readers = (("speed-*/results.json", _speed), ("drift-*.json", _drift), ("recall-*/results.json", _recall))
    for pattern, read in readers:
        for path in sorted(folder.glob(pattern)):
            try:
                read(read_json(path, LIMIT, "results of a measurement"), lines)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
                raise FormatError(f"{path} is no such result, or is damaged: {err!r:.200}") from err
    return lines


def _speed(value: dict[str, Any], lines: dict[tuple[str, str], Line]) -> None:
    for row in value["rows"]:
        line = lines.setdefault(_use(value["model"]["engine"], row["name"]), Line())
        known = row.get("values", {})
        if row["kind"] == "load" and known:
            held = [known.get(f"{key}_bytes") for key in ("disk", "host", "device")]
            line.disk, line.host, line.device = (None if one is None else _whole(one) for one in held)
        if row["kind"] == "step" and "speed_ratio" in known:
            middle, low, high = (_number(known[f"speed_ratio{end}"]) for end in ("", "_p10", "_p90"))
            line.ratios[_whole(row.get("batch", 1))] = middle, low, high
            line.machines.add(machine_name(value["machine"], value["model"]["engine"]))


def _drift(value: dict[str, Any], lines: dict[tuple[str, str], Line]) -> None:
    for report in value.get("reports", [value]):
        line = lines.setdefault(_use(report["engine"], report["dtype"]), Line())
        found = ((_whole(octave["first"]), octave["memory"]) for octave in report["octaves"])
        line.drift |= {first: math.inf if error is None else _number(error) for first, error in found}


def _recall(value: dict[str, Any], lines: dict[tuple[str, str], Line]) -> None:
    model = value["model"]
    line = lines.setdefault(_use(model["engine"], model["dtype"]), Line())
    for row in value["rows"]:
        if row.get("count"):
            segments = _whole(row["segments"])
            right, asked = line.recall.get(segments, (0, 0))
            line.recall[segments] = (right + _whole(row["right"]), asked + _whole(row["count"]))
            line.machines.add(machine_name(value["machine"], model["engine"]))


def _use(engine: Any, dtype: Any) -> tuple[str, str]:
    if engine not in ENGINES or dtype not in DTYPES:
        raise ValueError(f"engine and dtype are {engine!r:.40} and {dtype!r:.40}")
    return engine, dtype


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) > MOST:
        raise ValueError(f"{value!r:.40} is no whole number of a measurement")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no number of a measurement")
    return float(value)


def machine_name(machine: dict[str, Any], engine: str) -> str:
    """The GPU, or the processor with its cores and what it has for products in 8 bits."""
    if engine != "cpu" and "gpu" in machine:
        return _named(machine["gpu"]["name"])
    return _named(f"{machine['cpu']}, {machine['cores']} cores ({instructions(machine)})")


def _named(text: object) -> str:
    """A name out of a file, which must neither steer a terminal nor break a table."""
    return printable(text).replace("|", "/")[:LONGEST_NAME]


def table(name: str, lines: dict[tuple[str, str], Line]) -> Section:
    """One line for each engine and dtype; machines are told below by number."""
    machines = sorted({machine for line in lines.values() for machine in line.machines})
    batches = sorted({batch for line in lines.values() for batch in line.ratios})
    asked = [at for at in RECALL_AT if any(at in line.recall for line in lines.values())]
    columns = ("engine, dtype", "on disk", "memory", *(f"speed, batch {b}" for b in batches))
    columns += tuple(f"drift at {at:,}" for at in DRIFT_AT) + tuple(f"right at {at:,}" for at in asked) + ("machine",)
    rows = []
    for (engine, dtype), line in sorted(lines.items(), key=lambda item: (item[0][0], DTYPES.index(item[0][1]))):
        held = (in_mb(line.disk), in_mb(line.host if engine == "cpu" else line.device))
        speed = (f"{line.ratios[b][0]:.2f}" if b in line.ratios else "" for b in batches)
        drift = (f"{line.drift[at]:.1e}" if at in line.drift else "" for at in DRIFT_AT)
        right = (f"{line.recall[at][0]}/{line.recall[at][1]}" if at in line.recall else "" for at in asked)
        where = ", ".join(str(machines.index(machine) + 1) for machine in sorted(line.machines))
        rows.append((f"{engine} {dtype}", *held, *speed, *drift, *right, where))
    return Section(_named(name), columns, rows, _numbered(machines))


def _numbered(machines: Iterable[str]) -> str:
    return "Machines: " + "; ".join(f"{number}: {machine}" for number, machine in enumerate(machines, 1))


if __name__ == "__main__":
    run_command("precision_table", app)
