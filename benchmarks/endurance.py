"""What happens along a very long recurrence: the drift of a dtype from fp32, and whether anything grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.benchmarks.machine import Meters
from rmt_trt.benchmarks.plan import Plan, documents
from rmt_trt.benchmarks.rows import Results, Row
from rmt_trt.runtime import RMTRuntime

Say = Callable[[str], None]
PIECE_TOKENS = 1 << 16
GROWTH_SEGMENTS = 20_000
GROWTH_TOKENS = 20_000_000


def powers_of_two(last: int) -> list[int]:
    """1, 2, 4, ... and `last` itself."""
    found = [1 << i for i in range(last.bit_length())]
    return found if found[-1] == last else [*found, last]


def drift(
    bundle: Path,
    plan: Plan,
    dtypes: tuple[str, ...],
    segments: int,
    results: Results,
    say: Say,
    reference: str | None = None,
) -> None:
    """Relative L2 distance of each dtype's memory from the fp32 engine's, after 1, 2, 4, ... `segments` full segments.

    reference  engine that runs the bundle's fp32 recurrence, "cpu" say; None takes the plan's own
    """
    from rmt_trt.export.verify import relative_error

    with results.attempt("drift", "fp32, the reference"), ExitStack() as stack:
        exact = stack.enter_context(_open(bundle, reference or plan.engine, "fp32", plan))
        size = exact.spec.segment_length
        tokens = documents(exact.spec, 1, segments * size)[0]
        marks = powers_of_two(segments)
        say(f"drift: {segments:,} segments in fp32")
        wanted = _memories(exact, tokens, marks)
        for dtype in dtypes:
            say(f"drift: {segments:,} segments in {dtype}")
            with results.attempt("drift", dtype), _open(bundle, plan.engine, dtype, plan) as runtime:
                found = _memories(runtime, tokens, marks)
                table = [
                    {"segments": mark, "memory": relative_error(value, want)}
                    for mark, value, want in zip(marks, found, wanted, strict=True)
                ]
                results.add(Row("drift", dtype, 1, len(tokens), values={"reference": exact.engine, "table": table}))


def growth(runtime: RMTRuntime, meters: Meters, results: Results, say: Say, tokens: int = GROWTH_TOKENS) -> None:
    """Memory after two segments and after very many, out of an iterator; and whether the time per segment stays."""
    spec = runtime.spec
    size = spec.segment_length
    block = documents(spec, 1, PIECE_TOKENS)[0]
    lengths = {"2 segments": 2 * size, "a twentieth": tokens // 20, "all": tokens}
    runtime.run(_pieces(block, 3 * size), alignment="left")
    found: dict[str, dict[str, Any]] = {}
    for name, length in lengths.items():
        say(f"growth: {length:,} tokens")
        started = time.perf_counter()
        runtime.run(_pieces(block, length), alignment="left")
        seconds = time.perf_counter() - started
        found[name] = {
            "tokens": length,
            "seconds_per_segment": seconds / -(-length // size),
            "device_bytes": meters.device_bytes(),
            "host_bytes": meters.host_bytes(),
        }
    first, last = found["2 segments"], found["all"]
    values: dict[str, Any] = {
        "table": list(found.values()),
        "time_ratio": last["seconds_per_segment"] / found["a twentieth"]["seconds_per_segment"],
        "host_bytes_grown": last["host_bytes"] - first["host_bytes"],
    }
    if first["device_bytes"] is not None:
        values["device_bytes_grown"] = last["device_bytes"] - first["device_bytes"]
    results.add(Row("growth", "rmt-trt", 1, tokens, -(-tokens // size), values=values))


def _open(bundle: Path, engine: str, dtype: str, plan: Plan) -> RMTRuntime:
    return RMTRuntime(bundle, engine=engine, dtype=dtype, device=plan.device, threads=plan.threads)


def _memories(runtime: RMTRuntime, tokens: np.ndarray, marks: list[int]) -> list[np.ndarray]:
    """The memory after each mark, a number of full segments."""
    size, state, start, found = runtime.spec.segment_length, None, 0, []
    for mark in marks:
        result = runtime.run(tokens[start * size : mark * size], state=state, alignment="left", logits="none")
        found.append(result.memory)
        state, start = result.state, mark
    return found


def _pieces(block: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """`tokens` ids in pieces, from one block over and over: a text of any length that takes no memory."""
    for start in range(0, tokens, len(block)):
        yield block[: min(len(block), tokens - start)]
