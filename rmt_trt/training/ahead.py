"""Batches made ahead: the next step's documents are drawn while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from rmt_trt.training.tasks.task import Batch

DEPTH = 2  # steps ahead


class Ahead:
    """get(step, most) -> the batch that `make(step, most)` gives; those of the next steps are begun meanwhile.

    What was made ahead for another `most`, as at the end of a stage, is thrown away: a batch depends on its arguments alone.
    """

    def __init__(self, make: Callable[[int, int], Batch]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(DEPTH, thread_name_prefix="rmt-batches")
        self._begun: dict[tuple[int, int], Future[Batch]] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int, most: int) -> Batch:
        wanted = [(step + ahead, most) for ahead in range(DEPTH + 1)]
        self._begun = {key: future for key, future in self._begun.items() if key in wanted}
        for key in wanted:
            if key not in self._begun:
                self._begun[key] = self._pool.submit(self._make, *key)
        return self._begun.pop(wanted[0]).result()
