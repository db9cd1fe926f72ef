"""Skips for absent hardware, which `RMT_REQUIRE=tensorrt,cuda` turns into failures: a skip is not a pass. "native" is the
library that a C compiler builds when rmt-trt is installed, "hopper" that library and a GPU of compute capability 9.0."""

from __future__ import annotations

import os
import shutil

import pytest

from rmt_trt.runtime import native

HARDWARE = ("cuda", "tensorrt", "tensorrt-rtx", "native", "hopper")


def required_hardware() -> frozenset[str]:
    """What RMT_REQUIRE names. Errors: ValueError for a name that no test asks for."""
    names = frozenset(name.strip() for name in os.environ.get("RMT_REQUIRE", "").split(",") if name.strip())
    unknown = sorted(names - set(HARDWARE))
    if unknown:
        raise ValueError(f"RMT_REQUIRE names {', '.join(unknown)}; expected some of {', '.join(HARDWARE)}")
    return names


def require_hardware(name: str, reason: str | None) -> None:
    """Skips the test, or fails it where RMT_REQUIRE names this hardware.

    `reason` says why it cannot be used here; None says that it can, and the test goes on.
    """
    if name not in HARDWARE:
        raise ValueError(f"{name!r} is no hardware of these tests; expected one of {', '.join(HARDWARE)}")
    if reason is None:
        return
    if name in required_hardware():
        pytest.fail(f"RMT_REQUIRE asks for {name}: {reason}", pytrace=False)
    pytest.skip(f"needs {name}: {reason}")


def require_native() -> None:
    """Skips the test where rmt-trt's own operators were not built for want of a compiler; with one, that is a failure."""
    if native.library() is None and (shutil.which("gcc") or shutil.which("cc")):
        pytest.fail(
            "the operators in native/ were not built, and a C compiler is here: pip install -v .", pytrace=False
        )
    require_hardware("native", None if native.library() else "rmt-trt was installed without a C compiler")
