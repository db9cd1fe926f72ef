"""What a build says while it runs: how far it is, and how it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

PARTS = 1000
WAIT_SECONDS = 0.1
Share = Callable[[int, int], None]
Result = TypeVar("Result")


class Phases:
    """Nested phases as one share of the whole: a phase that runs inside another is a part of one of its steps."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[str | None, int, int]] = {}  # name: parent, steps, steps done
        self.share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self.running[name] = (parent, max(1, steps), 0)

    def step(self, name: str, number: int) -> float:
        """Step `number`, counted from 0, is done. Returns the share of the whole, which never shrinks."""
        if name in self.running:
            parent, steps, _ = self.running[name]
            self.running[name] = (parent, steps, number + 1)
            self.share = max(self.share, self._whole(name))
        return self.share

    def finish(self, name: str) -> None:
        self.running.pop(name, None)

    def _whole(self, name: str) -> float:
        inner = 0.0
        step: str | None = name
        while step is not None and step in self.running:
            parent, steps, done = self.running[step]
            inner = min(1.0, (done + inner) / steps)
            step = parent
        return inner


def monitor(trt: Any, share: Share, stop: threading.Event) -> Any:
    """A progress monitor that calls `share(done, PARTS)`, and tells the builder to stop once `stop` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.phases = Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            share(int(PARTS * self.phases.step(phase_name, step)), PARTS)
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()


def interruptible(work: Callable[[], Result], stop: threading.Event) -> Result:
    """Runs `work` in a thread of its own and returns what it returns, or raises what it raises.

    Ctrl-C would otherwise be raised inside a callback of the builder, through C++ code, or be kept waiting until the
    build is over. Here it sets `stop`, waits for the work to end, and is then raised; a second one does not wait.
    """
    outcome: list[Result] = []
    failure: list[BaseException] = []
    ended = threading.Event()

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as err:  # raised again in the caller's thread
            failure.append(err)
        finally:
            ended.set()

    thread = threading.Thread(target=body, name="rmt-build", daemon=True)
    thread.start()
    try:
        # Not `join`, which marks a thread as ended when Ctrl-C comes, as of Python 3.11, although it runs on. In pieces,
        # so that a signal's handler runs between them.
        while not ended.wait(WAIT_SECONDS):
            pass
    except KeyboardInterrupt:
        stop.set()
        ended.wait()
        thread.join()
        raise
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
