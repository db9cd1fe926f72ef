"""rmt-trt: a trained Recurrent Memory Transformer, from PyTorch to production.

Importing this package loads neither torch nor an engine; `RMTRuntime` and its companions load on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from rmt_trt.contract import StateSpec, StepSpec
from rmt_trt.errors import ContractError, EngineError, FormatError, RMTError, TokenError, VerificationError

if TYPE_CHECKING:
    from rmt_trt.runtime import BatchResult, Piece, RMTRuntime, RunResult, State

# In a checkout the rooms (export/, runtime/, ...) lie beside this folder, and setup.py maps them in here. Python run in
# the checkout's root takes this folder for the whole package; so that it finds the rooms, they are looked up there too.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_ROOT, "setup.py")) and os.path.isdir(os.path.join(_ROOT, "runtime", "engines")):
    __path__.append(_ROOT)

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
