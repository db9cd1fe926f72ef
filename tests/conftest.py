"""What every test runs under: no network, few threads, and the package as it is installed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hardware import required_hardware

ROOT = Path(__file__).resolve().parent.parent

# Before torch is loaded, and for the processes that tests start too. Tiny models run slower on many threads.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# `python -m pytest` puts the root on the path, where `rmt_trt` is a folder without its rooms.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


# What a shell starts in the background ignores interrupts, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    try:
        required_hardware()
    except ValueError as err:
        raise pytest.UsageError(str(err)) from err


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository; read only."""
    return ROOT
