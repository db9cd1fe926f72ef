"""PyTorch: the reference engine, which runs a checkpoint as it is. States are torch tensors on the host.

torch is imported in the functions: where it is not installed, `refusal` still has to say that an exported graph is
nothing for this engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rmt_trt.contract import StepSpec
from rmt_trt.errors import EngineError

if TYPE_CHECKING:
    import torch

    from rmt_trt.runtime.source import Source

NAME = "torch"
DTYPE = "fp32"


def refusal(source: Source, dtype: str, device: int) -> str | None:
    """Why this engine cannot run the source, or None."""
    if source.model is None:
        return "it runs a checkpoint (model.pt), and this is an exported graph"
    if dtype != DTYPE:
        return f"the reference runs in {DTYPE}, not {dtype}"
    return None


def open_engine(source: Source, dtype: str, device: int, threads: int | None) -> TorchEngine:
    """Errors: EngineError, when the source holds no model."""
    if source.model is None:
        raise EngineError(f"{source.path} holds no PyTorch model")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return TorchEngine(source.model, source.spec)


class TorchEngine:
    """A segment step in PyTorch behind the engine contract."""

    name = NAME
    dtype = DTYPE

    def __init__(self, step: torch.nn.Module, spec: StepSpec) -> None:
        self._step = step.eval()
        self._spec = spec

    def load(self, states: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, ...]:
        import torch

        return tuple(torch.from_numpy(np.array(value)) for value in states)

    def fetch(self, states: tuple[torch.Tensor, ...]) -> tuple[np.ndarray, ...]:
        return tuple(value.numpy().copy() for value in states)

    def take(self, states: tuple[torch.Tensor, ...], rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        import torch

        index = torch.from_numpy(rows)
        return tuple(value[index] for value in states)

    def step(
        self, states: tuple[torch.Tensor, ...], segment: np.ndarray, logits: bool
    ) -> tuple[tuple[torch.Tensor, ...], np.ndarray | None]:
        import torch

        with torch.no_grad():
            *new, rows = self._step(*states, torch.from_numpy(np.ascontiguousarray(segment)))
        return tuple(new), rows.numpy() if logits else None

    def close(self) -> None:
        del self._step
