"""The report of a run: the same sections as tables on the screen and as `results.md`, ratios first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from rmt_trt.benchmarks.limits import MATRIX
from rmt_trt.benchmarks.ours import OURS
from rmt_trt.benchmarks.ratios import best_peer, full_attention, ratios
from rmt_trt.benchmarks.rows import Row

KERNEL_ROWS = 14


@dataclass(frozen=True)
class Section:
    """A table: title, names of columns, rows of text, and a line below it."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def sections(head: dict[str, Any], rows: Sequence[Row]) -> list[Section]:
    """All that the rows say, sections without rows left out."""
    made = [
        _ratios(rows), _ours(head, rows), _lengths(rows), _full(rows), _latencies(rows), _energy(rows), _many(rows), _limits(rows),
        _drift(rows), _growth(rows), *_kernels(rows), _failures(rows),
    ]  # fmt: skip
    return [section for section in made if section.rows]


def screen_table(section: Section) -> Table:
    """A section for the terminal."""
    table = Table(title=section.title, title_justify="left", caption=section.note or None, caption_justify="left")
    for number, name in enumerate(section.columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in section.rows:
        table.add_row(*row)
    return table


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
        lines += [f"## {section.title}", "", "| " + " | ".join(section.columns) + " |"]
        lines.append("|---|" + "---:|" * (len(section.columns) - 1))
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in section.rows]
        lines += ["", *([section.note, ""] if section.note else [])]
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines).rstrip() + "\n"


def _ratios(rows: Sequence[Row]) -> Section:
    found = [
        (
            f"{one.times:.2f} times as fast as {one.name}" if one.times else f"{one.name}: failed",
            str(one.batch),
            _ms(one.ours_seconds),
            _ms(one.seconds),
        )
        for one in ratios(rows)
    ]
    note = "ms per step of the whole batch, full segments, medians; ours end to end through RMTRuntime.run."
    return Section("Beside its peers", (OURS, "batch", "ours, ms", "peer, ms"), found, note)


def _ours(head: dict[str, Any], rows: Sequence[Row]) -> Section:
    """Every step that ran, with its spread, and shares of what the machine can do."""
    flops = head.get("model", {}).get("flops_per_segment", 0)
    dtype = head.get("model", {}).get("dtype")
    peak = next(
        (row.values["flops_per_second"] for row in rows if row.name == f"{MATRIX} {dtype}" and not row.failed), None
    )
    bare = {row.batch: row.per_segment for row in rows if row.kind == "bare" and row.per_segment}
    found = []
    for row in rows:
        each = row.per_segment
        if row.kind != "step" or each is None or row.timing is None:
            continue
        share = f"{row.batch * flops / each / peak:.1%}" if peak else ""
        over = f"{each / bare[row.batch]:.3f}" if row.name == OURS and row.batch in bare else ""
        spread = f"{1e3 * row.timing.p10 / row.segments:.3f} to {1e3 * row.timing.p90 / row.segments:.3f}"
        found.append(
            (
                row.name, str(row.batch), _ms(each), spread, _ms(row.timing.p99 / row.segments),
                f"{row.tokens_per_second or 0:,.0f}", share, over, f"{row.values.get('error', float('nan')):.1e}",
            )
        )  # fmt: skip
    columns = (
        "step", "batch", "ms, median", "p10 to p90", "p99", "tokens/s", "of matrix rate", "run / bare replay", "error"
    )  # fmt: skip
    note = "error: relative L2 distance of the memory after 4 segments from the fp32 step's."
    return Section("Steps", columns, found, note)


def _lengths(rows: Sequence[Row]) -> Section:
    peer, full, found = best_peer(rows, 1), full_attention(rows), []
    for row in rows:
        if row.kind != "length" or row.timing is None:
            continue
        theirs = peer.seconds * row.segments if peer is not None and peer.seconds is not None else None
        whole = full.at(row.tokens)
        text = "" if whole is None else f"{_s(whole[0])}{' (extrapolated)' if whole[1] else ''}"
        found.append(
            (
                f"{row.tokens:,}", _s(row.timing.median), f"{_s(row.timing.p10)} to {_s(row.timing.p90)}",
                f"{row.tokens_per_second or 0:,.0f}", _s(theirs), text,
                f"{whole[0] / row.timing.median:,.2f}" if whole is not None else "",
                _bytes(row.values.get("device_bytes_in_use")), _bytes(row.values.get("host_bytes")),
            )
        )  # fmt: skip
    name = "best peer" if peer is None else peer.name
    columns = (
        "tokens", "ours, s", "p10 to p90", "tokens/s", f"{name}, s (by segments)", "full attention, s", "full / ours",
        "device in use", "host",
    )  # fmt: skip
    return Section("One document, batch 1", columns, found)


def _full(rows: Sequence[Row]) -> Section:
    full = full_attention(rows)
    found = [
        (
            f"{row.tokens:,}",
            _s(row.timing.median if row.timing else None),
            _bytes(row.values.get("device_bytes")),
            row.failed,
        )
        for row in rows
        if row.kind == "full" and row.tokens
    ]
    where = "" if full.crossing is None else f"Ours is faster from {full.crossing:,.0f} tokens on. "
    if full.crossing is not None and full.lengths and full.crossing <= min(full.lengths):
        where = f"Ours is faster at every length that was measured, from {min(full.lengths):,} on. "
    fitted = ""
    if full.curve is not None:
        fitted = (
            f"Beyond the measured lengths: {full.curve.a:.3g} + {full.curve.b:.3g} n + {full.curve.c:.3g} n^2 seconds. "
        )
    note = f"{where}{fitted}The same backbone in one pass, FlashAttention, its table of positions tiled to the length."
    return Section("Full attention", ("tokens", "seconds", "peak device memory", ""), found, note)


def _latencies(rows: Sequence[Row]) -> Section:
    found = []
    for row in rows:
        if row.kind == "load" and not row.failed:
            found.append(("load, to the first answer", _ms(row.values["first_answer_seconds"]), "", "", ""))
        if row.kind == "latency" and row.timing is not None:
            t = row.timing
            found.append((row.name, _ms(t.median), _ms(t.p90), _ms(t.p99), str(t.repeats)))
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


def _growth(rows: Sequence[Row]) -> Section:
    found: list[tuple[str, ...]] = []
    for row in rows:
        if _ok(row, "growth"):
            for entry in row.values["table"]:
                device = entry["device_bytes"]
                found.append(
                    (
                        f"{entry['tokens']:,}", _ms(entry["seconds_per_segment"]),
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


def _failures(rows: Sequence[Row]) -> Section:
    found = [(row.name, row.kind, str(row.batch), row.failed) for row in rows if row.failed]
    return Section("What failed", ("", "measurement", "batch", "reason"), found)


def _ok(row: Row, kind: str) -> bool:
    return row.kind == kind and not row.failed


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.3f}"


def _s(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.4g}"


def _bytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f} MB"
