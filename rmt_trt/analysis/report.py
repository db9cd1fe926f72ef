"""The results of an analysis: all figures as CSV, what they come to as JSON and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmt_trt.analysis.layout import rows_of, shares_by_region
from rmt_trt.analysis.summary import Marks, Spread, at_segments, by_kind
from rmt_trt.analysis.trajectory import FIGURES, Trajectory
from rmt_trt.files import write_file

if TYPE_CHECKING:
    from rmt_trt.analysis.attention import Finding

DIGITS = 7  # significant ones of a figure: more than float32 memories have
CSV, JSON, MARKDOWN = "trajectory.csv", "analysis.json", "analysis.md"
TRAJECTORY_PICTURE = "trajectory.png"
SHOWN = ("previous", "first", "initial", "change", "norm", "entropy_share", "effective_rank")
KINDS = {
    "first": "first segment, no fact in it",
    "fact": "with a fact or a part of one",
    "noise": "noise alone",
    "question": "with the question",
}


def picture_of(operation: str) -> str:
    """The file name of an operation's attention map."""
    return f"attention_{operation}.png"


def write_csv(path: Path, trajectories: Sequence[Trajectory], marks: Sequence[Marks]) -> None:
    """A row per document and segment, numbered from 1: its kind, the token at which it stops, all figures, and the cosine
    with the memory one segment earlier of each vector. Figures that are no numbers are empty. Errors: FormatError."""
    vectors = len(trajectories[0].figures[0].previous)
    columns = ["document", "segment", "stop", "kind", *FIGURES, *(f"previous_{i + 1}" for i in range(vectors))]
    lines = [",".join(columns)]
    for number, (trajectory, mark) in enumerate(zip(trajectories, marks, strict=True), 1):
        for segment, (one, stop) in enumerate(zip(trajectory.figures, trajectory.stops, strict=True)):
            values = [*one.summary().values(), *one.previous.tolist()]
            written = [f"{value:.{DIGITS}g}" if math.isfinite(value) else "" for value in values]
            lines.append(",".join([str(number), str(segment + 1), str(stop), mark.kind(segment), *written]))
    write_file(path, ("\n".join(lines) + "\n").encode())


def trajectory_facts(trajectories: Sequence[Trajectory], marks: Sequence[Marks]) -> dict[str, Any]:
    """Plain values: median and quartiles at 1, 2, 4, ... segments, and by what stands in a segment."""
    return {
        "definitions": FIGURES,
        "picture": TRAJECTORY_PICTURE,
        "all_figures": CSV,
        "at_segments": [{"segments": n} | _spreads(row) for n, row in at_segments(trajectories).items()],
        "by_kind": {kind: _spreads(row) for kind, row in by_kind(trajectories, marks).items()},
    }


def operation_facts(finding: Finding, form: str, words: Sequence[str] | None, labels: Sequence[str]) -> dict[str, Any]:
    """Plain values of an operation: shares by layer and head, and what its picture shows. Layers, heads from 1.

    `words` are the tokens of the segment that is drawn as text, `labels` the names of the answers.
    """
    operation, drawn = finding.operation, finding.drawn
    rows = rows_of(operation, drawn.regions, form == "decoder")
    return {
        "name": operation.name,
        "meaning": operation.meaning,
        "rows": [name for name in operation.rows if any(region.name == name for region in drawn.regions)],
        "columns": [name for name in operation.columns if any(region.name == name for region in drawn.regions)],
        "maps": len(finding.each),
        "share_by_layer_and_head": [[_rounded(value) for value in layer] for layer in finding.shares.tolist()],
        "even_attention": _rounded(finding.even),
        "layer": finding.layer + 1,
        "head": finding.head + 1,
        "share": _rounded(float(finding.shares[finding.layer, finding.head])),
        "share_of_each_map": [_rounded(value) for value in finding.each],
        "share_by_answer": {
            name: _rounded(float(np.mean([a for a, b in zip(finding.each, finding.labels, strict=True) if b == label])))
            for label, name in enumerate(labels)
            if label in finding.labels
        },
        "drawn": {
            "picture": picture_of(operation.name),
            "seed": drawn.seed,
            "segment": drawn.segment + 1,
            "share": _rounded(drawn.share),
            "share_by_region": {
                name: _rounded(value) for name, value in shares_by_region(drawn.map, rows, drawn.regions).items()
            },
            "regions": [{"name": one.name, "start": one.start, "stop": one.stop} for one in drawn.regions],
            "ids": list(drawn.ids),
            **({} if words is None else {"words": list(words)}),
        },
    }


def write_report(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `analysis.json` and `analysis.md`, each whole. Errors: FormatError."""
    write_file(folder / JSON, (json.dumps(facts, indent=1) + "\n").encode())
    write_file(folder / MARKDOWN, markdown(facts).encode())


def markdown(facts: Mapping[str, Any]) -> str:
    """The report: where it was measured, tables, pictures."""
    model, documents, trajectory = facts["model"], facts["documents"], facts["trajectory"]
    right = [one["right"] for one in documents if one.get("right") is not None]
    lines = [
        f"# The memory of {model['name']}", "", f"    {facts['command']}", "",
        f"{model['form']}, {model['memory'][0]} memory vectors of width {model['memory'][1]}, {model['segment_length']} "
        f"tokens a segment; engine {facts['engine']} ({facts['dtype']}), rmt-trt {facts['rmt-trt']}. "
        f"{len(documents)} document{'s' * (len(documents) != 1)}{_source(facts.get('task'))}"
        + (f"; {sum(right)} of {len(right)} answered right." if right else "."), "",
        "## By number of segments", "",
        "Median, and quartiles in brackets where there are several documents.", "",
        *_table("segments", [(f"{row['segments']:,}", row) for row in trajectory["at_segments"]]), "",
    ]  # fmt: skip
    kinds = trajectory["by_kind"]
    if "fact" in kinds:
        rows = [(f"{KINDS[kind]} ({kinds[kind]['change']['count']:,})", row) for kind, row in kinds.items()]
        lines += ["## By what stands in the segment", "", *_table("segment (how many)", rows), ""]
    lines += [f"![The memory over segments]({trajectory['picture']})", "", *_definitions()]
    if facts.get("attention"):
        lines += _attention(facts["attention"])
    return "\n".join(lines).rstrip() + "\n"


def _attention(attention: Mapping[str, Any]) -> list[str]:
    found = attention["operations"]
    lines = [
        "## Attention", "",
        f"{attention['documents']} documents of {attention['segments']} segments, from the PyTorch recurrence. Share: of the "
        f"rows' attention what goes to the columns, in the layer and head where its mean over the maps is largest, with the "
        f"lowest, middle and highest of the maps. Even: what it would be if each row attended evenly to all that it sees. The map "
        f"that is drawn is the middle one by its share.", "",
        "| | rows | columns | layer, head | mean share | lowest, middle, highest | middle of all heads | even | maps |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for one in found:
        each = one["share_of_each_map"]
        spread = ", ".join(f"{value:.1%}" for value in (min(each), float(np.median(each)), max(each)))
        heads = float(np.median(one["share_by_layer_and_head"]))
        lines.append(
            f"| {one['name']} | {', '.join(one['rows'])} | {', '.join(one['columns'])} | {one['layer']}, {one['head']} | "
            f"{one['share']:.1%} | {spread} | {heads:.1%} | {one['even_attention']:.1%} | {one['maps']} |"
        )
    answers = list(dict.fromkeys(name for one in found for name in one["share_by_answer"]))
    lines += ["", "The same mean share, by the answer to the document's question.", ""]
    lines += ["| | " + " | ".join(answers) + " |", "|---|" + "---:|" * len(answers)]
    for one in found:
        shares = [one["share_by_answer"].get(name) for name in answers]
        lines.append(f"| {one['name']} | " + " | ".join("" if s is None else f"{s:.0%}" for s in shares) + " |")
    lines.append("")
    for one in found:
        lines += [f"![{one['name']}: {one['meaning']}]({one['drawn']['picture']})", ""]
    return lines


def _table(first: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    names = {"previous": "cosine: one earlier", "first": "segment 1", "initial": "initial", "norm": "norm",
             "change": "change", "entropy_share": "entropy / log d", "effective_rank": "effective rank"}  # fmt: skip
    lines = [f"| {first} | " + " | ".join(names[name] for name in SHOWN) + " |", "|---|" + "---:|" * len(SHOWN)]
    lines += [f"| {name} | " + " | ".join(_cell(row[key]) for key in SHOWN) + " |" for name, row in rows]
    return lines


def _cell(spread: Mapping[str, Any]) -> str:
    if spread["median"] is None:
        return ""
    median = f"{spread['median']:.4g}"
    return median if spread["count"] < 2 else f"{median} ({spread['low']:.3g}, {spread['high']:.3g})"


def _definitions() -> list[str]:
    return [
        "Cosine, norm and entropy are means over the memory vectors. Change: |X - Y| / |Y|, Y the memory one segment "
        "earlier, Frobenius norms. Entropy: of p_i = x_i^2 / sum x^2 over a vector's d components (Coifman & Wickerhauser "
        "1992). Effective rank: the exponential of the entropy of the memory's singular values, made to sum to 1 (Roy & "
        "Vetterli 2007).",
        "",
    ]


def _source(task: Mapping[str, Any] | None) -> str:
    if task is None:
        return ""
    text = f" in {task['text']}" if isinstance(task.get("text"), str) else ""
    return f" of {task.get('task', 'a task')}{text}"


def _spreads(row: Mapping[str, Spread]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "median": _rounded(spread.median), "low": _rounded(spread.low), "high": _rounded(spread.high),
            "count": spread.count,
        }
        for name, spread in row.items()
    }  # fmt: skip


def _rounded(value: float) -> float | None:
    """JSON has no nan."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
