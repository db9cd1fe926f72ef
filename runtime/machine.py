"""What this machine has that an engine file needs: its GPU, its driver, the packages of TensorRT.

Each fact is a small function. None of them touches a library of TensorRT beyond its import before the driver answered:
without a driver one of them ends the process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from rmt_trt.errors import EngineError, require
from rmt_trt.runtime import cuda

# Machines by the name that they have on Linux.
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def system() -> tuple[str, str]:
    """(operating system, machine) as an engine's record names them."""
    return platform.system(), machine_name(platform.machine())


def machine_name(name: str) -> str:
    """One name for a kind of processor: Windows and macOS have others than Linux."""
    return _MACHINES.get(name.lower(), name)


def gpu_refusal(device: int, extra: str, purpose: str) -> str | None:
    """Why GPU `device` cannot be used, or None. The pip line names `extra`, which has the library that looks for it."""
    try:
        require("cuda.core", extra, purpose)
    except EngineError as err:
        return str(err)
    return cuda.refusal(device)


def capability(device: int) -> int:
    """Compute capability of a GPU: 89 is 8.9. Errors: EngineError, with the driver's words."""
    with cuda.saying(f"the compute capability of GPU {device} cannot be read"):
        major, minor = cuda.library().Device(device).compute_capability
    return 10 * int(major) + int(minor)


def gpu_name(device: int) -> str:
    """What the driver calls a GPU. Errors: EngineError, with the driver's words."""
    with cuda.saying(f"the name of GPU {device} cannot be read"):
        return str(cuda.library().Device(device).name)


def driver_cuda() -> tuple[int, int]:
    """The newest CUDA that the driver runs: (13, 0). Errors: EngineError, with the driver's words."""
    from cuda.bindings import driver

    with cuda.saying("the driver's version cannot be read"):
        number = int(driver.cuDriverGetVersion()[1])
    return number // 1000, number % 1000 // 10


def current(device: int) -> AbstractContextManager[None]:
    """Makes a GPU current in this thread while it is open."""
    return cuda.made_current(cuda.library().Device(device))


def installed(name: str) -> bool:
    """Whether a package is installed, without loading it."""
    return importlib.util.find_spec(name) is not None


def module(name: str, extra: str, purpose: str) -> Any:
    """A package of TensorRT. Errors: EngineError, when it is not installed or cannot be loaded."""
    try:
        return require(name, extra, purpose)
    except OSError as err:  # of the shared libraries that it loads
        raise EngineError(
            f"{purpose} needs the Python package '{name}', whose libraries cannot be loaded here ({err}). Install it anew: "
            f"pip install --force-reinstall 'rmt-trt[{extra}]'"
        ) from err


def built_for_cuda(name: str) -> int | None:
    """The CUDA that an installed package was built for, out of its distribution's name (`tensorrt_cu13`), or None."""
    found = re.findall(r"[_-]cu(\d\d)\b", " ".join(_distributions().get(name, ())))
    return min(map(int, found), default=None)


@cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()
