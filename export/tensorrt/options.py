"""What a caller may choose of a build; checked once, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rmt_trt.contract import Head, StepSpec
from rmt_trt.engine_check import HEADS
from rmt_trt.engine_record import HARDWARE
from rmt_trt.errors import ContractError

MAX_BATCH = 4096
MAX_WORKSPACE_MIB = 1 << 20
LEVELS = range(6)


@dataclass(frozen=True)
class BuildOptions:
    """compute_capabilities  of the GPUs to build for: 89 is 8.9; () takes that of GPU `device`
    max_batch             documents that a step takes at most; a step is tuned for that many full segments
    heads                 "all": an engine with logits, "none": one without; () takes what the model is run with
    workspace_mib         memory that the engine may use beside its weights and its inputs, in MiB; None is the library's own
    timing_cache          a file that keeps measured kernel times from one build to the next; made where it is missing
    optimization_level    0 (quick build) to 5 (longest search); None is the library's own
    strip_weights         leave the weights out of the engine: it is refitted from the graph that stays in the bundle
    version_compatible    let later versions of TensorRT run it
    hardware_compatible   let other GPUs run it: one of HARDWARE
    device                GPU that a build runs on, where it needs one
    check_segments        how many segments a graph that is made for the build goes through on the CPU; 0 leaves it out
    """

    compute_capabilities: tuple[int, ...] = ()
    max_batch: int = 8
    heads: tuple[Head, ...] = ()
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    optimization_level: int | None = None
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: str = "none"
    device: int = 0
    check_segments: int = 4

    def __post_init__(self) -> None:
        _whole(self.max_batch, "max_batch", 1, MAX_BATCH)
        _whole(self.device, "device", 0, 1 << 10)
        if self.check_segments != 0:
            _whole(self.check_segments, "check_segments", 2, 1 << 16)
        if self.workspace_mib is not None:
            _whole(self.workspace_mib, "workspace_mib", 1, MAX_WORKSPACE_MIB)
        if self.optimization_level is not None:
            _whole(self.optimization_level, "optimization_level", LEVELS[0], LEVELS[-1])
        if self.hardware_compatible not in HARDWARE:
            raise ContractError(
                f"hardware_compatible is {self.hardware_compatible!r}; expected one of {', '.join(HARDWARE)}"
            )
        if any(head not in HEADS for head in self.heads):
            raise ContractError(f"heads are {self.heads!r}; expected {' or '.join(HEADS)}, or both")
        object.__setattr__(self, "heads", tuple(sorted(set(self.heads), key=HEADS.index)))
        capabilities = tuple(self.compute_capabilities)
        for value in capabilities:
            _whole(value, "a compute capability", 10, 999)
        object.__setattr__(self, "compute_capabilities", tuple(sorted(set(capabilities))))


def heads_of(options: BuildOptions, spec: StepSpec) -> tuple[Head, ...]:
    """The heads to build. A language model's logits are wanted in some segments and cost much in all the others, so that
    it gets an engine without them too; a classifier's cost next to nothing."""
    return options.heads or (("all", "none") if spec.logits == "lm" else ("all",))


def parse_capabilities(text: str | None) -> tuple[int, ...]:
    """`89,120` or `8.9,12.0` as (89, 120); None as (). Errors: ContractError."""
    values = []
    for part in [] if text is None else text.split(","):
        major, dot, minor = part.strip().partition(".")
        digits = major + minor
        if not (digits.isascii() and digits.isdecimal() and len(digits) in (2, 3)) or (dot and len(minor) != 1):
            raise ContractError(
                f"--compute-capability is {text!r}; expected those of the GPUs with commas, such as 89,120 or 8.9,12.0"
            )
        values.append(int(digits))
    return tuple(values)


def _whole(value: object, name: str, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ContractError(f"{name} is {value!r}; expected a whole number from {low} to {high}")
