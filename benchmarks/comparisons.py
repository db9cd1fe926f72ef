"""The tables that set ours beside its peers: ratios, steps, lengths, full attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rmt_trt.benchmarks.limits import MATRIX
from rmt_trt.benchmarks.ours import OURS
from rmt_trt.benchmarks.ratios import best_of_groups, full_attention, ratios
from rmt_trt.benchmarks.rows import LEFT_OUT, Row
from rmt_trt.benchmarks.tables import Section, in_mb, in_ms, in_s

PER_STEP = "ms per step of the whole batch, full segments, medians; ours end to end through RMTRuntime.run."
GROUPS = (
    "PyTorch, model as published: the research code's step with transformers' own attention, its mask, the head in every "
    "segment. Lean PyTorch: that step rewritten by us for speed, without mask and head. ONNX Runtime: a plain export of the "
    "lean step."
)


def best(rows: Sequence[Row]) -> Section:
    """Beside the best variant of each group of peers, which is what a user would take."""
    found = [
        (
            f"{one.times:.2f} times as fast as {one.group}, best variant",
            str(batch),
            in_ms(one.ours_seconds),
            in_ms(one.seconds),
            one.variant,
        )
        for batch in sorted({row.batch for row in rows if row.kind == "step"})
        for one in best_of_groups(rows, batch)
        if one.times is not None
    ]
    columns = (OURS, "batch", "ours, ms", "peer, ms", "its best variant")
    return Section("Beside the best of each kind", columns, found, f"{PER_STEP} {GROUPS}")


def peers(rows: Sequence[Row]) -> Section:
    """Beside every peer."""
    found = [
        (
            f"{one.times:.2f} times as fast as {one.name}"
            if one.times is not None
            else f"{one.name}: {'left out' if one.failed == LEFT_OUT else 'failed'}",
            str(one.batch),
            in_ms(one.ours_seconds),
            in_ms(one.seconds),
        )
        for one in ratios(rows)
    ]
    return Section("Beside every peer", (OURS, "batch", "ours, ms", "peer, ms"), found, PER_STEP)


def steps(head: dict[str, Any], rows: Sequence[Row]) -> Section:
    """Every step that ran, with its spread, and shares of what the machine can do."""
    model = head.get("model", {})
    flops = model.get("needed_flops_per_segment", model.get("flops_per_segment", 0))  # the second: older results
    dtype = model.get("dtype")
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
        once = in_ms(row.values.get("once_seconds"))
        spread = f"{1e3 * row.timing.p10 / row.segments:.3f} to {1e3 * row.timing.p90 / row.segments:.3f}"
        found.append(
            (
                row.name, str(row.batch), in_ms(each), spread, in_ms(row.timing.p99 / row.segments),
                f"{row.tokens_per_second or 0:,.0f}", share, over, once, f"{row.values.get('error', float('nan')):.1e}",
            )
        )  # fmt: skip
    columns = (
        "step", "batch", "ms, median", "p10 to p90", "p99", "tokens/s", "of matrix rate", "run / bare replay",
        "once a run, ms", "error",
    )  # fmt: skip
    note = (
        "error: relative L2 distance of the memory after 4 segments from the fp32 step's. Once a run: what a run of one segment "
        "takes beyond a step, its answer's head included. Of matrix rate: the arithmetic that the new memory needs, the same for "
        "ours and peers, by the step's time and the rate of a large matrix product; of the last layer that is keys and values, "
        "and the memory's rows. Peers compute all of its rows."
    )
    return Section("Steps", columns, found, note)


def by_length(rows: Sequence[Row]) -> Section:
    """One document of each length; the best of each group of peers by the number of segments, and full attention."""
    groups, full, found = best_of_groups(rows, 1), full_attention(rows), []
    for row in rows:
        if row.kind != "length" or row.timing is None:
            continue
        theirs = [in_s(one.seconds * row.segments) for one in groups if one.seconds is not None]
        whole = full.at(row.tokens)
        text = "" if whole is None else f"{in_s(whole[0])}{' (extrapolated)' if whole[1] else ''}"
        found.append(
            (
                f"{row.tokens:,}", in_s(row.timing.median), f"{in_s(row.timing.p10)} to {in_s(row.timing.p90)}",
                f"{row.tokens_per_second or 0:,.0f}", *theirs, text,
                f"{whole[0] / row.timing.median:,.2f}" if whole is not None else "",
                in_mb(row.values.get("device_bytes_in_use")), in_mb(row.values.get("host_bytes")),
            )
        )  # fmt: skip
    columns = (
        "tokens", "ours, s", "p10 to p90", "tokens/s", *(f"{one.name}, s" for one in groups), "full attention, s",
        "full / ours", "device in use", "host",
    )  # fmt: skip
    note = "Peers: their time per segment at batch 1, times the segments." if groups else ""
    return Section("One document, batch 1", columns, found, note)


def full_passes(rows: Sequence[Row]) -> Section:
    """Full attention at each length that was tried."""
    full = full_attention(rows)
    found = [
        (
            f"{row.tokens:,}",
            in_s(row.timing.median if row.timing else None),
            in_mb(row.values.get("device_bytes")),
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
