"""The report of an evaluation: the same sections as tables on the screen and as `results.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rmt_trt.benchmarks.tables import Section, in_s, markdown_table
from rmt_trt.evaluation.cases import in_segments
from rmt_trt.evaluation.rows import Row

NOTE = "The interval is Wilson's score interval (1927) at 95 % confidence."
MEMORY_NOTE = (
    "Bytes in use, in units of 10^6: host is what this process has resident, device what the whole GPU has in use. The tenth "
    "is that of the row's tokens; constant memory shows between it and the end."
)


def sections(rows: Sequence[Row]) -> list[Section]:
    """All that the rows say, sections without rows left out."""
    measured = [row for row in rows if not row.left_out]
    made = [_accuracy(measured), _by_position(measured), _time(measured), _memory(measured), _left_out(rows)]
    return [section for section in made if section.rows]


def markdown(head: Mapping[str, Any], rows: Sequence[Row], plots: Sequence[str] = ()) -> str:
    """The whole report."""
    model, machine = head["model"], head.get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"# {model['name']}: {', '.join(head['tasks'])} on {model['engine']} {model['dtype']}", "",
        f"    {head.get('command', '')}", "",
        f"{_where(machine)}; rmt-trt {machine.get('rmt-trt')}, Python {machine.get('python')}, {versions}. Fingerprint of the "
        f"model: {model['fingerprint'] or 'none'}. A segment holds {model['segment_length']} tokens. Seed {head['seed']}.", "",
        *(f"- {name}: {_listed(about)}" for name, about in head["tasks"].items()), "",
    ]  # fmt: skip
    for section in sections(rows):
        lines += markdown_table(section)
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines).rstrip() + "\n"


def place_of(row: Row) -> str:
    """Where the facts of a row stand, for people."""
    if row.position is None:
        return "start" if row.task == "memorize" else "random"
    return f"{row.position} %"


def _where(machine: Mapping[str, Any]) -> str:
    gpu = machine.get("gpu")
    if gpu:
        return ", ".join([gpu["name"], *(f"{name} {gpu[name]}" for name in ("driver", "cuda") if gpu.get(name))])
    return f"{machine.get('cpu')}, {machine.get('cores')} cores"


def _listed(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in about.items() if name != "task" and value is not None)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(_value, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _accuracy(rows: Sequence[Row]) -> Section:
    told = list(dict.fromkeys(name for row in rows for name in row.text))
    found = []
    for row in rows:
        low, high = row.interval
        about = [_value(row.text[name]) if name in row.text else "" for name in told]
        found.append(
            (
                row.task, f"{row.segments:,}", f"{row.longest:,}", place_of(row), f"{row.right} of {row.count}",
                f"{row.accuracy:.1%}", f"{low:.1%} to {high:.1%}", *about,
            )
        )  # fmt: skip
    columns = ("task", "segments", "tokens, up to", "fact at", "right", "accuracy", "95 % interval", *told)
    return Section("Accuracy", columns, found, NOTE)


def _by_position(rows: Sequence[Row]) -> Section:
    placed = {(row.task, row.segments, row.position): row for row in rows if row.position is not None}
    series = list(dict.fromkeys((task, segments) for task, segments, _ in placed))
    body = []
    for position in sorted({position for _, _, position in placed if position is not None}):
        cells = [placed.get((task, segments, position)) for task, segments in series]
        body.append((f"{position} %", *("" if row is None else f"{row.accuracy:.1%}" for row in cells)))
    columns = ("fact at", *(f"{task}, {in_segments(segments)}" for task, segments in series))
    return Section("Accuracy by the place of the fact", columns, body if len(body) > 1 else [])


def _time(rows: Sequence[Row]) -> Section:
    found = [
        (
            row.task, f"{row.segments:,}", place_of(row), f"{row.count:,}", str(row.slots), f"{row.tokens:,}",
            in_s(row.seconds), f"{row.tokens_per_second:,.0f}", f"{row.idle_share:.1%}",
        )
        for row in rows
    ]  # fmt: skip
    columns = ("task", "segments", "fact at", "documents", "slots", "tokens", "s", "tokens/s", "idle slots")
    return Section("Time", columns, found)


def _memory(rows: Sequence[Row]) -> Section:
    kinds = [kind for kind in ("host", "device") if any(_bytes(row, "end", kind) for row in rows)]
    marks = [(kind, mark) for kind in kinds for mark in ("start", "tenth", "end")]
    found = [(row.task, f"{row.segments:,}", place_of(row), *(_bytes(row, mark, kind) for kind, mark in marks)) for row in rows]  # fmt: skip
    columns = ("task", "segments", "fact at", *(f"{kind}, {mark}" for kind, mark in marks))
    return Section("Memory", columns, found if kinds else [], MEMORY_NOTE)


def _bytes(row: Row, mark: str, kind: str) -> str:
    count = row.memory.get(mark, {}).get(kind)
    return "" if count is None else f"{count / 1e6:,.1f}"


def _left_out(rows: Sequence[Row]) -> Section:
    found = [(row.task, f"{row.segments:,}", place_of(row), row.left_out) for row in rows if row.left_out]
    return Section("Not measured", ("task", "segments", "fact at", "reason"), found)
