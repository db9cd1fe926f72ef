"""What every test runs under: no network, few threads, and the package as it is installed."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
import shared
from exporter import keep_operator_table
from hardware import required_hardware

ROOT = Path(__file__).resolve().parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# `python -m pytest` puts the root on the path, where `rmt_trt` is a folder without its rooms.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# A machine that is busy fails no test.
hypothesis.settings.register_profile("rmt", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("rmt")

# What a shell starts in the background ignores interrupts, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    try:
        required_hardware()
    except ValueError as err:
        raise pytest.UsageError(str(err)) from err
    if "PYTEST_XDIST_WORKER" in os.environ:  # what follows is handed down to workers, and to processes that tests start
        return
    config.add_cleanup(shared.open_session_folder())
    # Before torch is loaded. Tiny models run slower on many threads.
    workers = config.getoption("numprocesses", None) or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, (os.cpu_count() or 1) // workers))))


def pytest_collection_finish() -> None:
    """What was loaded stays: the garbage collector need not go through it again and again while tests run."""
    if "torch" in sys.modules:
        keep_operator_table()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository; read only."""
    return ROOT
