"""Engines: each a small file that satisfies `rmt_trt.contract.Engine`, named in one literal table.

An engine's file has two functions: `refusal(source, dtype, device) -> str | None` says why it cannot run this
source on this machine, cheaply and without side effects (dtype None stands for any); `open_engine(source, dtype, device,
threads) -> Engine` does it. A file that serves two engines has an object with these two for each: `module:name`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from rmt_trt.contract import DTYPES, ENGINES, Engine
from rmt_trt.errors import ContractError, EngineError

if TYPE_CHECKING:
    from rmt_trt.runtime.source import Source

MODULES = {
    "tensorrt": "rmt_trt.runtime.engines.tensorrt:TENSORRT",
    "tensorrt-rtx": "rmt_trt.runtime.engines.tensorrt:TENSORRT_RTX",
    "cuda": "rmt_trt.runtime.engines.cuda",
    "cpu": "rmt_trt.runtime.engines.cpu",
    "torch": "rmt_trt.runtime.engines.torch",
}
# Best first: what `engine="auto"` tries. The reference comes last.
PREFERENCE = ("tensorrt", "tensorrt-rtx", "cuda", "cpu", "torch")


class EngineModule(Protocol):
    """What an engine's file offers."""

    def refusal(self, source: Source, dtype: str | None, device: int) -> str | None: ...

    def open_engine(self, source: Source, dtype: str | None, device: int, threads: int | None) -> Engine: ...


def engine_module(name: str) -> EngineModule:
    """Errors: ContractError for a name that is no engine, EngineError for one that this version lacks."""
    if name not in ENGINES:
        raise ContractError(f"engine is {name!r}; expected 'auto' or one of {', '.join(ENGINES)}")
    if name not in MODULES:
        raise EngineError(f"this version of rmt-trt has no '{name}' engine; it has {', '.join(MODULES)}")
    module, _, inside = MODULES[name].partition(":")
    found = importlib.import_module(module)
    return cast(EngineModule, getattr(found, inside) if inside else found)


def refusal(name: str, source: Source, dtype: str | None, device: int) -> str | None:
    """Why an engine cannot run this source on this machine, or None."""
    try:
        return engine_module(name).refusal(source, dtype, device)
    except EngineError as err:
        return str(err)


def choose(source: Source, engine: str, dtype: str | None, device: int) -> tuple[str, dict[str, str]]:
    """The engine to run, and the reason of each better one that was refused.

    Errors: ContractError for an unknown engine or dtype; EngineError when the engine that was asked for, or with
    "auto" every engine, is refused: never another one in its place.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ContractError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    refused: dict[str, str] = {}
    for name in PREFERENCE if engine == "auto" else (engine,):
        if engine != "auto":
            engine_module(name)
        reason = refusal(name, source, dtype, device)
        if reason is None:
            return name, refused
        refused[name] = reason
    if engine != "auto":
        raise EngineError(f"engine '{engine}' cannot run {source.path}: {refused[engine]}")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise EngineError(f"no engine can run {source.path} on this machine. {reasons}")
