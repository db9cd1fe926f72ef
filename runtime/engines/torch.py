"""PyTorch: the reference engine, which runs a checkpoint as it is. States are torch tensors on the host.

torch is imported in the functions: where it is not installed, `refusal` still has to say that an exported graph is
nothing for this engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rmt_trt.contract import Answer, Head, StepSpec
from rmt_trt.errors import EngineError
from rmt_trt.runtime.loglik import reduced

if TYPE_CHECKING:
    import torch

    from rmt_trt.runtime.source import Source

NAME = "torch"
DTYPE = "fp32"


def refusal(source: Source, dtype: str | None, device: int) -> str | None:
    """Why this engine cannot run the source, or None."""
    if source.model is None:
        what = "a TensorRT engine" if source.kind == "engine" else "an exported graph"
        return f"it runs a checkpoint (model.pt), and this is {what}"
    if dtype not in (None, DTYPE):
        return f"the reference runs in {DTYPE}, not {dtype}"
    return None


def open_engine(source: Source, dtype: str | None, device: int, threads: int | None) -> TorchEngine:
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
    max_batch = None

    def __init__(self, step: torch.nn.Module, spec: StepSpec) -> None:
        self._step = step.eval()
        self._spec = spec

    def load(self, states: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, ...]:
        import torch

        return tuple(torch.from_numpy(np.array(value)) for value in states)

    def fetch(self, states: tuple[torch.Tensor, ...]) -> tuple[np.ndarray, ...]:
        return tuple(value.numpy().copy() for value in states)

    share = fetch  # what lies on the host is fetched and shared alike: as a copy, which keeps States values

    def take(self, parts: Sequence[tuple[torch.Tensor, ...]], rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        import torch

        index = torch.from_numpy(rows)
        return tuple(torch.cat(values)[index] for values in zip(*parts, strict=True))

    def step(
        self, states: tuple[torch.Tensor, ...], segment: np.ndarray, head: Head, host: bool = True
    ) -> tuple[tuple[torch.Tensor, ...], Answer | None]:
        new, logits = self._run(states, segment)
        return new, None if head == "none" else reduced(logits.numpy(), segment, head, self._spec.logits)

    def steps(self, states: tuple[torch.Tensor, ...], segments: np.ndarray) -> tuple[torch.Tensor, ...]:
        for segment in segments:
            states, _ = self._run(states, segment)
        return states

    def _run(
        self, states: tuple[torch.Tensor, ...], segment: np.ndarray
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        import torch

        with torch.no_grad():
            *new, logits = self._step(*states, torch.from_numpy(np.ascontiguousarray(segment)))
        return tuple(new), logits

    def close(self) -> None:
        del self._step
