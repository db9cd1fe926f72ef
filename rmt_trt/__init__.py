"""rmt-trt: a trained Recurrent Memory Transformer, from PyTorch to production.

Importing this package loads neither torch nor an engine; `RMTRuntime` and its companions load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rmt_trt.contract import StateSpec, StepSpec
from rmt_trt.errors import ContractError, EngineError, FormatError, RMTError, TokenError, VerificationError

if TYPE_CHECKING:
    from rmt_trt.runtime import BatchResult, Piece, RMTRuntime, RunResult, State

__version__ = "0.1.0"
__all__ = [
    "BatchResult",
    "ContractError",
    "EngineError",
    "FormatError",
    "Piece",
    "RMTError",
    "RMTRuntime",
    "RunResult",
    "State",
    "StateSpec",
    "StepSpec",
    "TokenError",
    "VerificationError",
]

_LAZY = ("BatchResult", "Piece", "RMTRuntime", "RunResult", "State")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module("rmt_trt.runtime"), name)
    raise AttributeError(f"module 'rmt_trt' has no attribute '{name}'")
