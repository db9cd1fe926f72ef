"""The options of a benchmark, checked once, and the texts that it runs over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rmt_trt.benchmarks.timing import Effort
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError

PEERS = ("eager", "graph", "compile", "ort", "full")
CPU_PEERS = ("eager", "ort")
ENGINES = ("cpu", "cuda")
COMPARED_DTYPES = ("fp32", "fp16", "bf16")
CHECKED_SEGMENTS = 4  # after so many segments a peer's memory is compared with the fp32 step's


@dataclass(frozen=True)
class Plan:
    """What is measured.

    batches, tokens  sizes of batches, and lengths of a document at batch 1
    peers      of PEERS
    steps      full segments in a run that compares engines; None takes as many as suit the device
    quick      fewer repeats, shorter runs, the faster variant of each peer alone
    full_seconds   no pass of full attention that would take longer is begun
    """

    engine: str = "cuda"
    dtype: str = "fp16"
    device: int = 0
    batches: tuple[int, ...] = (1, 8, 32)
    tokens: tuple[int, ...] = (4096, 65536, 1048576, 2000000)
    peers: tuple[str, ...] = PEERS
    repeat: int = 20
    steps: int | None = None
    threads: int | None = None
    quick: bool = False
    full_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, word, allowed in (("--engine", self.engine, ENGINES), ("--dtype", self.dtype, COMPARED_DTYPES)):
            if word not in allowed:
                raise ContractError(f"{name} is {word!r}; expected one of {', '.join(allowed)}")
        unknown = [peer for peer in self.peers if peer not in PEERS]
        if unknown:
            raise ContractError(f"--peers names {unknown[0]!r}; expected some of {', '.join(PEERS)}, or none")
        if not self.gpu:
            senseless = [peer for peer in self.peers if peer not in CPU_PEERS]
            if senseless:
                raise ContractError(
                    f"--peers names {senseless[0]!r}, which needs a GPU; on engine '{self.engine}' there are "
                    f"{', '.join(CPU_PEERS)}"
                )
        for name, values in (("--batch", self.batches), ("--tokens", self.tokens)):
            if not values or min(values) < 1:
                raise ContractError(f"{name} is {','.join(map(str, values))!r}; expected whole numbers from 1 on")
        numbers = {"--repeat": self.repeat, "--steps": self.steps, "--full-seconds": self.full_seconds}
        for name, number in numbers.items():
            if number is not None and not number > 0:
                raise ContractError(f"{name} is {number}; expected a number above 0")

    @property
    def gpu(self) -> bool:
        """Whether the run is on a GPU."""
        return self.engine != "cpu"

    @property
    def place(self) -> str:
        """PyTorch's name of the device."""
        return f"cuda:{self.device}" if self.gpu else "cpu"

    @property
    def smallest_and_largest(self) -> list[int]:
        """The batch sizes at which what takes long is measured."""
        return sorted({min(self.batches), max(self.batches)})

    @property
    def effort(self) -> Effort:
        """How often a measurement is repeated."""
        return Effort(min(self.repeat, 7), 1.0) if self.quick else Effort(self.repeat, 2.0)

    def steps_at(self, batch: int) -> int:
        """Full segments in a run that compares engines at a batch size."""
        if self.steps is not None:
            return max(self.steps, CHECKED_SEGMENTS)
        if not self.gpu:
            return 8
        return max(32, (128 if self.quick else 256) // batch)


def allowed_ids(spec: StepSpec) -> np.ndarray:
    """Ids that a document may hold without any being dropped."""
    return np.setdiff1d(np.arange(spec.vocab_size), spec.dropped_ids)


def documents(spec: StepSpec, count: int, tokens: int, seed: int = 0) -> np.ndarray:
    """(count, tokens) int64 random ids, none of which is dropped."""
    return np.random.default_rng(seed).choice(allowed_ids(spec), (count, tokens))
