"""The errors of rmt-trt.

Each says who complains, what came, what was expected and what to do, in one message. Each also derives from a
builtin, so that callers who do not know this package catch it as what it is.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class RMTError(Exception):
    """Anything that rmt-trt refuses or that failed on its way. Console commands print it as one line."""


class ContractError(RMTError, ValueError):
    """A step, a spec, a shape, a dtype or an option that does not fit the contract."""


class TokenError(RMTError, ValueError):
    """Tokens that cannot be what the model reads: out of the vocabulary, empty, padded in the middle, ..."""


class FormatError(RMTError, ValueError):
    """A file that is not what it claims to be: a bundle, a checkpoint, a state, an ONNX file."""


class EngineError(RMTError, RuntimeError):
    """An engine that cannot run here, or that failed while running."""


class VerificationError(RMTError, ArithmeticError):
    """A graph or an engine that drifts further from the PyTorch recurrence than its tolerance.

    `report` is the whole verification, as `rmt_trt.export.Report.to_json` gives it.
    """

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports an optional library, or says which pip line brings it.

    Errors: EngineError, when the library is not installed or cannot be loaded.
    """
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise EngineError(
            f"{purpose} needs the Python package '{module}', which cannot be imported here ({err}). "
            f"Install it with: pip install 'rmt-trt[{extra}]'"
        ) from err
