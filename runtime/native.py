"""Where the project's own operators for ONNX Runtime are: a shared library that is built when the package is installed.

It gives the CUDA provider products with bias and GELU in their epilogue and products in FP8, by cuBLASLt, and kernels for
rotary positions and gated activations, which NVRTC compiles on the GPU's machine. Its sources are in `native/`; without a C
compiler the package installs without it. Graphs of a bundle that have such operators say so (`needs`), and who lacks the
library runs the graphs beside them.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

from rmt_trt.errors import ContractError, EngineError
from rmt_trt.runtime import machine

DOMAIN = "rmt_trt"  # of the operators in a graph
NEED = "native"  # what a manifest calls it
HOPPER = "hopper"  # what it calls kernels of theirs that one kind of GPU runs
CAPABILITY = 90  # which one: 9.0, as of the H100 and H200
SWITCH = "RMT_NATIVE"  # 0 leaves the operators out, for comparisons
INSTALL = (
    "their library was not built when rmt-trt was installed: it takes a C compiler. Install one (gcc), then rmt-trt again: "
    "pip install --force-reinstall --no-deps --no-binary rmt-trt rmt-trt"
)


def library() -> str | None:
    """Path of the shared library, or None where it was not built."""
    spec = find_spec("rmt_trt.runtime._native")
    return None if spec is None else spec.origin


def unused() -> str | None:
    """Why graphs with the operators are not taken here, or None. Errors: ContractError, for a switch that is neither."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ContractError(f"{SWITCH} is {switch!r:.80}; expected 0, which leaves rmt-trt's own operators out, or 1")
    if switch == "0":
        return f"{SWITCH}=0 leaves them out"
    return INSTALL if library() is None else None


def lacking(needs: Collection[str], device: int) -> str | None:
    """Why graphs with such needs are not taken on GPU `device`, or None; which GPU it is, is asked only where that matters.
    Errors: as `unused`."""
    reason = unused()
    if reason is None and HOPPER in needs:
        reason = _other_gpu(device)
    return reason if needs else None


def _other_gpu(device: int) -> str | None:
    try:
        found = machine.capability(device)
    except EngineError as err:
        return str(err)
    if found == CAPABILITY:
        return None
    return f"their kernels are for compute capability {CAPABILITY / 10:.1f}; GPU {device} has {found / 10:.1f}"


def register(options: Any) -> None:
    """Makes the operators known to sessions of these onnxruntime.SessionOptions. Errors: EngineError."""
    path = library()
    if path is None:
        raise EngineError(f"these graphs use rmt-trt's own operators, and {INSTALL}")
    try:
        options.register_custom_ops_library(path)
    except Exception as err:  # ONNX Runtime's exceptions share no base class of their own
        raise EngineError(f"ONNX Runtime does not take rmt-trt's own operators in {path}: {err}") from err
