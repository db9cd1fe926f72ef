"""The report of a run: the same sections as tables on the screen and as `results.md`, ratios first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rmt_trt.benchmarks import comparisons
from rmt_trt.benchmarks.ours import OURS
from rmt_trt.benchmarks.rows import Row
from rmt_trt.benchmarks.tables import Section, in_ms, in_s, markdown_table

KERNEL_ROWS = 14


def sections(head: dict[str, Any], rows: Sequence[Row]) -> list[Section]:
    """All that the rows say, sections without rows left out."""
    made = [
        comparisons.best(rows), comparisons.peers(rows), comparisons.steps(head, rows), comparisons.by_length(rows),
        comparisons.full_passes(rows), _latencies(rows), _energy(rows), _many(rows), _limits(rows), _drift(rows),
        _recall(rows), _growth(rows), *_kernels(rows), _missing(rows),
    ]  # fmt: skip
    return [section for section in made if section.rows]


def markdown(head: dict[str, Any], rows: Sequence[Row], plots: Sequence[str] = ()) -> str:
    """The whole report."""
    machine, model = head.get("machine", {}), head.get("model", {})
    gpu = machine.get("gpu") or {}
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    where = (
        f"{gpu['name']}, driver {gpu.get('driver')}, CUDA {gpu.get('cuda')}" if gpu else f"{machine.get('cpu')}, "
        f"{machine.get('cores')} cores"
    )  # fmt: skip
    lines = [
        f"# {model.get('name', 'model')}: {model.get('engine')} {model.get('dtype')}", "",
        f"    {head.get('command', '')}", "",
        f"{where}; rmt-trt {machine.get('rmt-trt')}, Python {machine.get('python')}, {versions}. Weights: "
        f"{model.get('weights')}. A segment holds {model.get('segment_length')} tokens.", "",
    ]  # fmt: skip
    for section in sections(head, rows):
        lines += markdown_table(section)
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines).rstrip() + "\n"


def _latencies(rows: Sequence[Row]) -> Section:
    found = []
    for row in rows:
        if row.kind == "load" and not row.failed:
            found.append(("load, to the first answer", in_ms(row.values["first_answer_seconds"]), "", "", ""))
        if row.kind == "latency" and row.timing is not None:
            t = row.timing
            found.append((row.name, in_ms(t.median), in_ms(t.p90), in_ms(t.p99), str(t.repeats)))
    return Section("Latency", ("", "median, ms", "p90", "p99", "repeats"), found)


def _energy(rows: Sequence[Row]) -> Section:
    per_million = "joules_per_million_tokens"
    ours = {row.batch: row.values[per_million] for row in rows if _ok(row, "energy") and row.name == OURS}
    found = [
        (
            row.name, str(row.batch), f"{row.values[per_million]:.2f}", f"{row.values['watts']:.0f}",
            f"{row.values[per_million] / ours[row.batch]:.2f}" if ours.get(row.batch) else "",
        )
        for row in rows
        if _ok(row, "energy")
    ]  # fmt: skip
    return Section("Energy of the device", ("", "batch", "J per million tokens", "W", "by ours"), found)


def _many(rows: Sequence[Row]) -> Section:
    full = next((row.tokens_per_second for row in rows if row.kind == "many" and row.tokens_per_second), None)
    found = []
    for row in rows:
        if row.kind != "many" or row.failed:
            continue
        rate = row.tokens_per_second or row.values["tokens_per_second"]
        idle = row.values.get("idle_share")
        found.append(
            (row.name, f"{rate:,.0f}", f"{rate / full:.1%}" if full else "", "" if idle is None else f"{idle:.1%}")
        )
    return Section("Many documents", ("", "tokens/s", "of full batches", "idle slots"), found)


def _limits(rows: Sequence[Row]) -> Section:
    found = []
    for row in rows:
        if row.kind == "limit" and not row.failed:
            speed = row.values.get("bytes_per_second")
            rate = f"{row.values.get('flops_per_second', 0) / 1e12:,.1f} TFLOP/s"
            found.append((row.name, f"{speed / 1e9:,.0f} GB/s" if speed else rate))
    return Section("What the machine can do", ("", "measured"), found)


def _drift(rows: Sequence[Row]) -> Section:
    found = {row.name: {e["segments"]: e["memory"] for e in row.values["table"]} for row in rows if _ok(row, "drift")}
    marks = sorted({mark for table in found.values() for mark in table})
    body = [(f"{mark:,}", *(f"{table.get(mark, float('nan')):.1e}" for table in found.values())) for mark in marks]
    return Section("Drift of the memory from fp32", ("segments", *found), body if found else [])


def _recall(rows: Sequence[Row]) -> Section:
    found = {(row.segments, row.name): row.values for row in rows if _ok(row, "recall")}
    dtypes = list(dict.fromkeys(dtype for _, dtype in found))
    body = []
    for segments in sorted({segments for segments, _ in found}):
        cells = [f"{segments:,}"]
        for dtype in dtypes:
            values = found.get((segments, dtype))
            cells += (
                ["", ""] if values is None else [f"{values['right']} of {values['count']}", in_s(values["seconds"])]
            )
        body.append(tuple(cells))
    columns = ("segments", *(name for dtype in dtypes for name in (dtype, f"{dtype}, s")))
    return Section("Questions answered right", columns, body)


def _growth(rows: Sequence[Row]) -> Section:
    found: list[tuple[str, ...]] = []
    for row in rows:
        if _ok(row, "growth"):
            for entry in row.values["table"]:
                device = entry["device_bytes"]
                found.append(
                    (
                        f"{entry['tokens']:,}", in_ms(entry["seconds_per_segment"]),
                        "" if device is None else f"{device:,}", f"{entry['host_bytes']:,}",
                    )
                )  # fmt: skip
    return Section("Growth", ("tokens", "ms per segment", "device bytes in use", "host bytes"), found)


def _kernels(rows: Sequence[Row]) -> list[Section]:
    made = []
    for row in rows:
        if _ok(row, "kernels"):
            table = row.values["table"][:KERNEL_ROWS]
            body = [(e["kernel"], f"{e['calls']:.1f}", f"{e['microseconds']:.1f}", f"{e['share']:.1%}") for e in table]
            title = f"Kernels of {row.name}, batch {row.batch}: {row.values['microseconds_per_step']:,.0f} us a step"
            made.append(Section(title, ("kernel", "calls", "us", "share"), body))
    return made


def _missing(rows: Sequence[Row]) -> Section:
    found = [(row.name, row.kind, str(row.batch), row.failed) for row in rows if row.failed]
    return Section("What failed or was left out", ("", "measurement", "batch", "reason"), found)


def _ok(row: Row, kind: str) -> bool:
    return row.kind == kind and not row.failed
