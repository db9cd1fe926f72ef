"""Memory of this process and of the device, read at the start, after a tenth and at the end of a row."""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmt_trt.errors import EngineError

GPU_ENGINES = ("cuda", "tensorrt", "tensorrt-rtx")
TENTH = 0.1


@dataclass(frozen=True)
class Memory:
    """host: resident bytes of this process. device: bytes in use on the GPU, by all processes; None without a GPU."""

    host: int | None
    device: int | None


class Meters:
    """device: index of the GPU that the engine runs on, or None."""

    def __init__(self, device: int | None) -> None:
        self.device = device

    def read(self) -> Memory:
        """What is in use now."""
        return Memory(_resident(), None if self.device is None else _in_use(self.device))


class Marks:
    """The memory along a row of `total` tokens, read as its progress is told."""

    def __init__(self, meters: Meters, total: int) -> None:
        self._meters, self._total = meters, total
        self._start = meters.read()
        self._tenth: Memory | None = None

    def at(self, tokens: int) -> None:
        """Takes note of the progress."""
        if self._tenth is None and tokens >= TENTH * self._total:
            self._tenth = self._meters.read()

    def end(self) -> dict[str, dict[str, Any]]:
        """Bytes by name, at "start", "tenth" and "end"; None for what cannot be measured here."""
        found = {"start": self._start, "tenth": self._tenth, "end": self._meters.read()}
        return {name: asdict(memory) for name, memory in found.items() if memory is not None}


def _resident() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # a system without it
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), None)


def _in_use(device: int) -> int | None:
    """By the driver's own count, so that no library beside the engine's is needed."""
    from rmt_trt.runtime import cuda, machine

    with suppress(EngineError, ImportError):
        driver = importlib.import_module("cuda.bindings.driver")
        # An engine of another thread may be recording a CUDA graph: nothing else calls the driver then.
        with cuda.CAPTURING, cuda.saying(f"the memory of GPU {device} cannot be read"), machine.current(device):
            status, free, total = driver.cuMemGetInfo()
            return int(total) - int(free) if int(status) == 0 else None
    return None
