"""The options of a benchmark, checked once, and the texts that it runs over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rmt_trt.benchmarks.timing import Effort
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError

PUBLISHED, LEAN = "published", "lean"  # the two steps that PyTorch is measured with, each in these ways
WAYS = ("eager", "graph", "compile")
GROUPS = {group: tuple(f"{group}-{way}" for way in WAYS) for group in (PUBLISHED, LEAN)}
PEERS = (*GROUPS[PUBLISHED], *GROUPS[LEAN], "ort", "full")
CPU_PEERS = (f"{PUBLISHED}-eager", f"{LEAN}-eager", "ort")
COMPILE_MODES = ("default", "max-autotune")
ENGINES = ("cpu", "cuda")
COMPARED_DTYPES = ("fp32", "fp16", "bf16")
CHECKED_SEGMENTS = 4  # after so many segments a peer's memory is compared with the fp32 step's


@dataclass(frozen=True)
class Plan:
    """What is measured.

    batches, tokens  sizes of batches, and lengths of a document at batch 1
    peers      of PEERS, or names of GROUPS for all of a group that the device can run
    steps      full segments in a run that compares engines; None takes as many as make a run long enough
    quick      fewer repeats, the faster variant of each peer alone, the published step at the smallest batch alone
    compile_mode   of torch.compile
    full_seconds   no pass of full attention that would take longer is begun
    """

    engine: str = "cuda"
    dtype: str = "fp16"
    device: int = 0
    batches: tuple[int, ...] = (1, 8, 32)
    tokens: tuple[int, ...] = (4096, 65536, 1048576, 2000000)
    peers: tuple[str, ...] = (PUBLISHED, LEAN, "ort", "full")
    compile_mode: str = "max-autotune"
    repeat: int = 20
    steps: int | None = None
    threads: int | None = None
    quick: bool = False
    full_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, word, allowed in (("--engine", self.engine, ENGINES), ("--dtype", self.dtype, COMPARED_DTYPES)):
            if word not in allowed:
                raise ContractError(f"{name} is {word!r}; expected one of {', '.join(allowed)}")
        if self.compile_mode not in COMPILE_MODES:
            raise ContractError(f"--compile-mode is {self.compile_mode!r}; expected one of {', '.join(COMPILE_MODES)}")
        unknown = [peer for peer in self.peers if peer not in (*PEERS, *GROUPS)]
        if unknown:
            raise ContractError(
                f"--peers names {unknown[0]!r}; expected some of {', '.join((*GROUPS, *PEERS))}, or none"
            )
        object.__setattr__(self, "peers", self._single(self.peers))
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

    def _single(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Groups replaced by their members, in the order of PEERS. A CPU has the plain calls alone."""
        wanted: set[str] = set()
        for name in names:
            members = GROUPS.get(name, (name,))
            wanted.update(members if self.gpu or name not in GROUPS else members[:1])
        return tuple(peer for peer in PEERS if peer in wanted)

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

    def variants(self, count: int) -> int:
        """How many of a peer's variants are measured."""
        return min(count, 1) if self.quick else count


def allowed_ids(spec: StepSpec) -> np.ndarray:
    """Ids that a document may hold without any being dropped."""
    return np.setdiff1d(np.arange(spec.vocab_size), spec.dropped_ids)


def documents(spec: StepSpec, count: int, tokens: int, seed: int = 0) -> np.ndarray:
    """(count, tokens) int64 random ids, none of which is dropped."""
    return np.random.default_rng(seed).choice(allowed_ids(spec), (count, tokens))
