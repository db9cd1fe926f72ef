"""Where the project's own operators for ONNX Runtime are: a shared library that is built when the package is installed.

It gives the CUDA provider products with bias and GELU in their epilogue, and products in FP8, by cuBLASLt. Its sources are
in `native/`; without a C compiler the package installs without it.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import Any

from rmt_trt.errors import EngineError

DOMAIN = "rmt_trt"  # of the operators in a graph
# How products are asked of cuBLASLt, in the order of `Setting` in native/gpu.c. Those to FP8 take the first of the others
# that it accepts.
SETTINGS = ("plain", "no C", "C elsewhere", "all scales", "rounded apart")


def library() -> str | None:
    """Path of the shared library, or None where it was not built."""
    spec = find_spec("rmt_trt.runtime._native")
    return None if spec is None else spec.origin


def register(options: Any) -> None:
    """Makes the operators known to sessions of these onnxruntime.SessionOptions. Errors: EngineError."""
    path = library()
    if path is None:
        raise EngineError(
            "these graphs use rmt-trt's own operators, and their library was not built when rmt-trt was installed: it takes "
            "a C compiler. Install one (gcc), then rmt-trt again: pip install --force-reinstall --no-deps --no-binary "
            "rmt-trt rmt-trt. Or export the graphs without --native"
        )
    try:
        options.register_custom_ops_library(path)
    except Exception as err:  # ONNX Runtime's exceptions share no base class of their own
        raise EngineError(f"ONNX Runtime does not take rmt-trt's own operators in {path}: {err}") from err


def product_settings() -> dict[str, int]:
    """How many products of one kind and shape this process has planned in each of `SETTINGS`; {} without the library."""
    path = library()
    if path is None:
        return {}
    counts = (ctypes.c_int64 * len(SETTINGS))()
    ctypes.CDLL(path).rmt_product_settings(counts)
    return dict(zip(SETTINGS, counts, strict=True))
