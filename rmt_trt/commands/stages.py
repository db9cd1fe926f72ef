"""The bars of a command's work, one for each of its stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import TaskID

from rmt_trt.commands.app import stage_progress
from rmt_trt.commands.report import drift_table
from rmt_trt.errors import VerificationError

Show = Callable[[str, int, int], None]


@contextlib.contextmanager
def shown_stages(screen: Console, labels: Mapping[str, str]) -> Iterator[Show]:
    """Gives the function that is told (stage, done, total); each stage gets a bar when it is first told of.

    labels  by the first word of a stage; what stands behind it, as in "build fp16 all", is shown as it is
    A verification that fails is shown before its error goes on.
    """
    with stage_progress(screen) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                kind, _, rest = stage.partition(" ")
                tasks[stage] = bars.add_task(f"{labels[kind]}, {rest}" if rest else labels[kind], total=total)
            bars.update(tasks[stage], completed=done, total=total)

        try:
            yield show
        except VerificationError as err:
            if "rows" in err.report:
                screen.print(drift_table(err.report))
            raise
