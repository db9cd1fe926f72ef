"""Throughput over documents of very different lengths, beside that of full batches in the same process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmt_trt.benchmarks.plan import documents
from rmt_trt.benchmarks.rows import Results, Row
from rmt_trt.benchmarks.timing import Timing
from rmt_trt.errors import ContractError
from rmt_trt.runtime import RMTRuntime

FULL_BATCHES = "full batches"


@dataclass(frozen=True)
class ManyOptions:
    """`count` documents of `shortest` to `longest` full segments, log-uniform, in `slots` slots."""

    count: int = 512
    shortest: int = 10
    longest: int = 1000
    slots: int = 32

    def __post_init__(self) -> None:
        if not (1 <= self.shortest <= self.longest and self.count >= 1 and self.slots >= 1):
            raise ContractError(
                f"--many-segments is {self.shortest},{self.longest} with {self.count} documents in {self.slots} slots; expected "
                f"two whole numbers from 1 on, the smaller first, and at least one document and slot"
            )


def lengths(options: ManyOptions) -> np.ndarray:
    """(count,) int64 segments of each document, the same for the same options."""
    low, high = np.log(options.shortest), np.log(options.longest)
    drawn = np.random.default_rng(0).uniform(low, high, options.count)
    return np.clip(np.round(np.exp(drawn)), options.shortest, options.longest).astype(np.int64)


def many(runtime: RMTRuntime, options: ManyOptions, results: Results, say: Callable[[str], None]) -> None:
    """`run_many` of a list and of an iterator, and `run` of full batches of equal documents."""
    size = runtime.spec.segment_length
    counts = lengths(options)
    pool = documents(runtime.spec, 1, max(3, options.longest + options.count) * size)[0]
    texts = [pool[i * size : (i + int(count)) * size] for i, count in enumerate(counts)]
    per_batch = int(np.median(counts))
    equal = [pool[i * size : (i + per_batch) * size] for i in range(options.slots)]

    warm(runtime, options.slots, pool)
    say(f"{FULL_BATCHES}: {options.slots} documents of {per_batch} segments")
    timing = Timing.of([_seconds(lambda: runtime.run(equal, alignment="left")) for _ in range(3)])
    results.add(Row("many", FULL_BATCHES, options.slots, per_batch * size, per_batch, timing))
    sources: dict[str, Callable[[], Any]] = {"list": lambda: texts, "iterator": lambda: _each(texts)}
    for name, source in sources.items():
        say(f"run_many of {options.count} documents, {name}")
        with results.attempt("many", name, options.slots):
            started = time.perf_counter()
            running: Any = runtime.run_many(source(), slots=options.slots, alignment="left")
            answers = sum(1 for _ in running)
            seconds = time.perf_counter() - started
            tokens = int(counts.sum()) * size
            values = {
                "documents": answers,
                "seconds": seconds,
                "segments": int(counts.sum()),
                "idle_share": float(running.idle_share),
                "tokens_per_second": tokens / seconds,
            }
            results.add(Row("many", name, options.slots, values=values))


def warm(runtime: RMTRuntime, slots: int, pool: np.ndarray) -> None:
    """Visits every number of documents that a GPU engine captures for, in each kind of step that there is, so that none
    is captured while the clock runs: full segments in a block, full last ones, short last ones. pool: ids (n,), n at
    least 3 segments."""
    size = runtime.spec.segment_length
    for count in bucket_sizes(slots):
        for tokens in (3 * size, 2 * size + 1):
            runtime.run([pool[:tokens]] * count, alignment="left")


def bucket_sizes(slots: int) -> list[int]:
    """slots, and the powers of two below it, the largest first: an engine pads a number of documents to one of them."""
    return [slots, *(1 << power for power in reversed(range((slots - 1).bit_length())))]


def _each(texts: list[np.ndarray]) -> Iterator[np.ndarray]:
    yield from texts


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
