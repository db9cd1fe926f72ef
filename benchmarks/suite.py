"""Everything that the page on performance needs, in one go: each model in a process of its own, and a summary."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rmt_trt.benchmarks.ours import OURS
from rmt_trt.benchmarks.presets import EXAMPLE
from rmt_trt.benchmarks.ratios import best_of_groups, full_attention
from rmt_trt.benchmarks.rows import LEFT_OUT, Row, read_results
from rmt_trt.benchmarks.tables import Section, in_ms, markdown_table

SUMMARY = "summary.md"
SECONDS_TO_END = 15  # what an interrupted part has to write its report
BENCH, RECALL = "rmt_trt.commands.bench", "rmt_trt.benchmarks.recall"
GROWTH = ("--growth", "--growth-tokens", "10_000_000")


@dataclass(frozen=True)
class Part:
    """One process. share: of the seconds that are left, by the shares of the parts that are still to come."""

    name: str
    module: str
    arguments: tuple[str, ...]
    share: int


PARTS = (
    Part(
        "bert-base", BENCH, ("--preset", "bert-base", "--batch", "1,32", "--many", *GROWTH, "--kernels", "--drift"), 8
    ),
    Part("gpt2-small", BENCH, ("--preset", "gpt2-small", "--batch", "1,32", "--kernels"), 5),
    Part(
        "llama-1b",
        BENCH,
        ("--preset", "llama-1b", "--dtype", "fp16", "--batch", "1,8", "--tokens", "4096,65536,1048576", "--kernels"),
        5,
    ),
    Part("example", BENCH, ("--preset", "example", "--batch", "1,32", "--many", *GROWTH, "--drift"), 4),
    Part("recall", RECALL, (str(EXAMPLE), "--engine", "cuda", "--dtype", "fp32,fp16,bf16"), 3),
)


@dataclass(frozen=True)
class SuiteOptions:
    """What every part is run with. budget: seconds of all together, or None."""

    budget: float | None = None
    quick: bool = False
    device: int = 0
    compile_mode: str = "max-autotune"


def run_suite(
    folder: Path, work: Path, options: SuiteOptions, say: Callable[[str], None], parts: Sequence[Part] = PARTS
) -> Section:
    """Runs the parts one after another, each into `folder/NAME`, and writes `folder/summary.md` after each of them.

    A part that fails costs itself alone. An interrupted suite keeps what it has, and passes the interruption on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    ended: list[str] = []
    try:
        for number, part in enumerate(parts):
            left = None if options.budget is None else options.budget - (time.perf_counter() - started)
            seconds = None if left is None else left * part.share / sum(other.share for other in parts[number:])
            say(f"{part.name}" + ("" if seconds is None else f", within {max(seconds, 0.0):.0f} s"))
            before = time.perf_counter()
            code = _wait(subprocess.Popen(command_of(part, folder, work, options, seconds)))
            ended.append(f"{part.name}: {_ending(code)} after {time.perf_counter() - before:.0f} s.")
            _write(folder, parts, ended)
    finally:
        _write(folder, parts, ended)
    return summary(folder, parts)


def command_of(part: Part, folder: Path, work: Path, options: SuiteOptions, seconds: float | None) -> list[str]:
    """The command of a part. seconds: its share of the budget."""
    command = [sys.executable, "-m", part.module, *part.arguments, "--device", str(options.device)]
    if part.module == BENCH:
        command += ["--compile-mode", options.compile_mode, *(["--quick"] if options.quick else [])]
    command += [] if seconds is None else ["--budget", f"{max(seconds, 1.0):.0f}"]
    return [*command, "--work", str(work), "--out", str(folder / part.name)]


def summary(folder: Path, parts: Sequence[Part] = PARTS) -> Section:
    """A row per model and batch size, out of the parts' results."""
    body: list[tuple[str, ...]] = []
    for part in parts:
        head, rows = read_results(folder / part.name)
        model = head.get("model", {})
        title = f"{part.name}, {model.get('dtype', '')}"
        body += [(title, *cells) for cells in _figures(rows)]
    columns = (
        "model", "batch", "ms a step", "tokens/s", "published PyTorch / ours", "lean PyTorch / ours", "ONNX Runtime / ours",
        "faster than full attention from", "drift", "failed", "left out",
    )  # fmt: skip
    note = (
        "Ratios: the best variant of each kind by ours, medians, in turn. Drift: relative L2 distance of the memory from fp32 "
        "after the last segment. What failed and what the budget left out is named in each model's own report."
    )
    return Section("Summary", columns, body, note)


def _figures(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of each batch size; of recall, one row."""
    failed = str(sum(bool(row.failed) and row.failed != LEFT_OUT for row in rows))
    left_out = str(sum(row.failed == LEFT_OUT for row in rows))
    found: list[tuple[str, ...]] = []
    for row in rows:
        if row.kind != "step" or row.name != OURS:
            continue
        first = not found
        times = {one.group: one.times for one in best_of_groups(rows, row.batch)}
        best = [
            next((f"{value:.2f}" for name, value in times.items() if wanted in name and value is not None), "")
            for wanted in ("as published", "lean", "ONNX Runtime")
        ]
        found.append(
            (
                str(row.batch), in_ms(row.per_segment), f"{row.tokens_per_second or 0:,.0f}", *best,
                _crossing(rows) if row.batch == 1 else "", _drift(rows) if first else "",
                failed if first else "", left_out if first else "",
            )
        )  # fmt: skip
    recalled = [row.values for row in rows if row.kind == "recall" and not row.failed]
    if recalled:
        right, count = (sum(values[key] for values in recalled) for key in ("right", "count"))
        found.append((f"{right:,} of {count:,} answers right", *[""] * 7, failed, left_out))
    return found or ([("", *[""] * 7, failed, left_out)] if rows else [])


def _crossing(rows: Sequence[Row]) -> str:
    found = full_attention(rows).crossing
    return "" if found is None else f"{found:,.0f} tokens"


def _drift(rows: Sequence[Row]) -> str:
    tables = {row.name: row.values["table"] for row in rows if row.kind == "drift" and not row.failed}
    return ", ".join(f"{name} {table[-1]['memory']:.1e}" for name, table in tables.items() if table)


def _write(folder: Path, parts: Sequence[Part], ended: Sequence[str]) -> None:
    lines = ["# All models", "", *(f"- {line}" for line in ended), "", *markdown_table(summary(folder, parts))]
    (folder / SUMMARY).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit status. Interrupted, the process is given the time to write its report, and is interrupted too unless it
    ends by itself: a terminal's interruption has reached both."""
    try:
        return process.wait()
    except BaseException:
        for stop in (process.send_signal, lambda _: process.kill()):
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                stop(signal.SIGINT)
        raise


def _ending(code: int) -> str:
    if code < 0:
        return f"ended by signal {-code}"
    return "done" if code == 0 else f"failed with status {code}"
