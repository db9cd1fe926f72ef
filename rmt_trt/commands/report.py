"""How a verification report, and what a bundle holds for engines, are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from rmt_trt.bundle import Bundle, GraphEntry, Manifest
from rmt_trt.commands.app import printable
from rmt_trt.contract import QUANTIZED


def drift_table(report: Mapping[str, Any]) -> Table:
    """The errors in octaves of segments (1, 2 to 3, 4 to 7, ...), of a report as `Report.to_json` gives it."""
    against = f"engine {report['engine']} ({report['dtype']}) against the {report['reference']}"
    table = Table(
        title=printable(f"{against}, relative L2 error: median and largest of octaves of segments"),
        title_justify="left",
    )
    for name in ("segments", "memory", "largest", "logits", "largest", "1 - cosine", "answers"):
        table.add_column(name, justify="right")
    for octave in report.get("octaves") or _single(report["rows"]):
        first, last = octave["first"], octave["last"]
        table.add_row(
            printable(f"{first}" if first == last else f"{first}-{last}")[:40],
            *(_figure(octave[name]) for name in ("memory", "memory_largest", "logits", "logits_largest")),
            "" if octave.get("cosine") is None else f"{max(0.0, 1 - octave['cosine']):.0e}",
            _share(octave.get("agreement", "")),
        )  # fmt: skip
    table.add_row("batch", "", _figure(report["batch_memory"]), "", _figure(report["batch_logits"]), "", "")
    effect = report["memory_effect"]
    verdict = "passed" if report["passed"] else "FAILED"
    table.caption = (
        f"{verdict}: {_limits(report)}; resetting the memory changes the "
        f"last logits by {'an unknown share' if effect is None else format(effect, '.1%')}"
    )
    table.caption = "\n".join([table.caption, *trend_lines(report)])
    table.caption_justify = "left"
    return table


def trend_lines(report: Mapping[str, Any]) -> list[str]:
    """What becomes of memory and logits along the recurrence, in words. An error that grows is a warning."""
    trends = report.get("trend")
    told: dict[tuple[bool, str], list[str]] = {}
    for name in ("memory", "logits"):
        trend = trends.get(name) if isinstance(trends, dict) else None
        if isinstance(trend, dict):
            told.setdefault((trend.get("kind") == "grows", str(trend.get("words"))), []).append(name)
    return [
        printable(f"{'warning: ' if grows else ''}the error of the {' and the '.join(names)} {words}")[:400]
        for (grows, words), names in told.items()
    ]


def _single(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Segments 1, 2, 4, 8, ... and the last, of a report that an older version wrote."""
    shown = [row for row in rows if row["segment"] & (row["segment"] - 1) == 0 or row is rows[-1]]
    return [
        row
        | {
            "first": row["segment"],
            "last": row["segment"],
            "memory_largest": row["memory"],
            "logits_largest": row["logits"],
        }
        for row in shown
    ]


def graphs_table(bundle: Bundle) -> Table:
    """The graphs of a bundle by engine, dtype, role, head, and documents from which on each is taken, and what is recorded of each engine and dtype."""
    manifest = bundle.manifest
    table = Table(title="graphs", title_justify="left", caption=_records(manifest) or None, caption_justify="left")
    for name in ("engine", "dtype", "role", "head", "from", "needs", "opset"):
        table.add_column(name)
    table.add_column("MB", justify="right")
    table.add_column("and weights in")
    for graph in sorted(manifest.graphs, key=lambda g: (g.engine, g.dtype, g.role, g.head, g.min_batch, g.needs)):
        table.add_row(
            graph.engine, graph.dtype, graph.role, graph.head, str(graph.min_batch), ", ".join(graph.needs), str(graph.opset),
            f"{manifest.files[graph.file].size / 1e6:.2f}", ", ".join(map(printable, graph.data)),
        )  # fmt: skip
    return table


def _records(manifest: Manifest) -> str:
    """A line or two for each engine and dtype of which the manifest's `verification` records something."""
    uses = sorted({(graph.engine, graph.dtype) for graph in manifest.graphs})
    return "\n".join(line for use in uses for line in record_lines(*use, engine_record(manifest, *use)))


def engine_record(manifest: Manifest, engine: str, dtype: str) -> dict[str, Any]:
    """`verification.engines.ENGINE.DTYPE` of a manifest; {} where it is not there, or is not what it should be."""
    value: Any = manifest.verification
    for key in ("engines", engine, dtype):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


# What stands beside graphs that need nothing, by what it needs.
OWN = {"native": "native products", "hopper": "kernels for compute capability 9.0"}
# What stood for rmt-trt's own operators on the CPU.
TWINS = {"operators": "by the operators' kernels for the CPU", "nodes": "as the nodes that they stand for"}


def record_lines(engine: str, dtype: str, record: Mapping[str, Any]) -> list[str]:
    """What is fused, how it was checked and how it was verified, as lines. Values of another kind than ours are shown
    as they are: the record may come from a stranger's file."""
    if not record:
        return []
    fused, plain = record.get("fused"), record.get("plain")
    lines = [f"{engine} {dtype}: {'quantized' if dtype in QUANTIZED else 'exported plainly'}: {_value(plain)}"]
    if plain is None and isinstance(fused, dict):
        lines = [f"{engine} {dtype}: fused: {_counts(fused)}"]
    lines += _quantization_lines(record.get("quantization"))
    lines += _proof_lines(record)
    for need, what in OWN.items():
        own = record.get(need)
        if isinstance(own, dict) and isinstance(own.get("fused"), dict):
            lines.append(f"  beside them with {what}: {_counts(own['fused'])}")
            lines += [f"  {line}" for line in _proof_lines(own)]
    return lines


def _counts(fused: Mapping[Any, Any]) -> str:
    counts = sorted(fused.items(), key=lambda item: str(item[0]))
    return ", ".join(f"{_value(count)} {_value(name)}" for name, count in counts)


def _proof_lines(record: Mapping[str, Any]) -> list[str]:
    """How graphs were checked and verified."""
    lines, check, verdict = [], record.get("check"), record.get("verification")
    if isinstance(check, dict):
        by = TWINS.get(str(check.get("by")), "")
        lines.append(
            f"  checked on the CPU provider in {_value(check.get('dtype'))}: largest error {_value(check.get('worst'))} "
            f"over {_value(check.get('segments'))} segments{by and f', {by}'}"
        )
    if isinstance(verdict, dict):
        passed = "verified" if verdict.get("passed") is True else "DRIFTS"
        lines.append(
            f"  {passed} along {_value(verdict.get('segments'))} segments: worst {_value(verdict.get('worst'))}, "
            + (
                f"tolerance {_value(verdict.get('tolerance'))}"
                if verdict.get("needed") is None
                else f"agreement of the answers {_share(verdict.get('agreement'))}, needed {_share(verdict.get('needed'))}"
            )
        )
        if record.get("verified_on") is not None:
            lines.append(
                f"  that was engine {_value(record['verified_on'])}; not on its own: {_value(record.get('unverified'))}"
            )
    else:
        lines.append(f"  not verified on its engine: {_value(record.get('unverified'))}")
    return lines


def _quantization_lines(value: object) -> list[str]:
    """What a quantized graph keeps in float, and what else its record says."""
    if not isinstance(value, dict):
        return []
    lists = {name: items for name, items in value.items() if isinstance(items, list) and items}
    plain = {name: item for name, item in value.items() if name != "method" and isinstance(item, (str, int, float))}
    lines = ["  " + ", ".join(f"{_value(name)} {_value(item)}" for name, item in plain.items())] if plain else []
    for name, items in lists.items():
        lines.append(
            f"  {_value(name)}, {len(items)}: {', '.join(map(_value, items[:6]))}{', ...' if items[6:] else ''}"
        )
    return lines


def added_line(bundle: Bundle, entries: tuple[GraphEntry, ...]) -> str:
    """How many graphs were added, and their size with their weights."""
    files = {name for entry in entries for name in (entry.file, *entry.data)}
    size = sum(bundle.manifest.files[name].size for name in files)
    return f"{len(entries)} graph{'' if len(entries) == 1 else 's'}, {size / 1e6:.1f} MB with their weights"


def _value(value: object) -> str:
    """A value of a record, short."""
    return f"{value:.1e}" if isinstance(value, float) else printable(value)[:300]


def _limits(report: Mapping[str, Any]) -> str:
    """What a report found at worst, and what it was held to."""
    worst = f"worst {_figure(report['worst'])}"
    if report.get("needed") is None:
        return f"{worst}, tolerance {report['tolerance']:.1e}"
    return f"{worst}, agreement of the answers {_share(report['agreement'])}, needed {_share(report['needed'])}"


def _share(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, float) else printable(value)[:300]


def _figure(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"
