"""TensorRT and TensorRT for RTX: nearly one Python API. All that tells them apart in a build stands here.

TensorRT-RTX compiles ahead of time for GPUs that are not there; its kernels are finished on the user's machine.
TensorRT measures kernels on the GPU that it builds for. Enum numbers changed between 10 and 11, so that only names of
enums are used and none is stored as a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rmt_trt.engine_record import HARDWARE
from rmt_trt.errors import ContractError, EngineError, require
from rmt_trt.export.tensorrt.options import BuildOptions
from rmt_trt.runtime import cuda, machine
from rmt_trt.runtime.engine_fit import dotted

# TensorRT-RTX 1.7 writes into an engine, as text, which kernels a step runs; this is the one for whole attention.
JOINED_ATTENTION = re.compile(rb"function=\{ name=_gemm_mha")
KERNEL = re.compile(rb"function=\{ name=")


@dataclass(frozen=True)
class Flavour:
    """engine: its name in the contract. module, extra: its Python package, and the extra that brings it.
    ahead_of_time: builds for GPUs that are not there. oldest: version from which on all names are there that are used."""

    engine: str
    title: str
    module: str
    extra: str
    oldest: tuple[int, int]
    ahead_of_time: bool


FLAVOURS = {
    # IAttention, whose `decomposable` fp32 needs, came with 10.14.
    "tensorrt": Flavour("tensorrt", "TensorRT", "tensorrt", "tensorrt", (10, 14), False),
    "tensorrt-rtx": Flavour("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx", (1, 4), True),
}
# What TensorRT-RTX has no use for, and why; the first two were tried with 1.7.1.
NOT_AHEAD_OF_TIME = {
    "--timing-cache": "it measures no kernels when it builds",
    "--version-compatible": "that takes a library, libnvinfer_lean, which it does not come with",
    "--hardware-compatible": "its kernels are finished on the GPU that runs them; name the GPUs with --compute-capability",
}


def flavour_of(engine: str, options: BuildOptions) -> Flavour:
    """Errors: ContractError for an engine that is not built, and for options that its flavour does not have."""
    if engine not in FLAVOURS:
        raise ContractError(f"engine is {engine!r}; engines are built for {', '.join(FLAVOURS)}")
    flavour = FLAVOURS[engine]
    if flavour.ahead_of_time:
        given = {
            "--timing-cache": options.timing_cache is not None,
            "--version-compatible": options.version_compatible,
            "--hardware-compatible": options.hardware_compatible != HARDWARE[0],
        }
        for name, reason in NOT_AHEAD_OF_TIME.items():
            if given[name]:
                raise ContractError(
                    f"{flavour.title} takes no {name}: {reason}. Leave it out, or build with --engine tensorrt"
                )
    return flavour


def library(flavour: Flavour) -> Any:
    """The flavour's module. Errors: EngineError, when it is missing or too old, with its pip line."""
    trt = require(flavour.module, flavour.extra, f"a build with {flavour.title}")
    version = str(trt.__version__)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < flavour.oldest:
        raise EngineError(
            f"{flavour.title} {version} is installed; builds need {'.'.join(map(str, flavour.oldest))} or newer. "
            f"Install it with: pip install --upgrade 'rmt-trt[{flavour.extra}]'"
        )
    return trt


def capabilities(flavour: Flavour, trt: Any, options: BuildOptions) -> tuple[int, ...]:
    """The compute capabilities that the build is for: 89 is 8.9.

    Errors: ContractError for one that the flavour does not build for; EngineError, when the build needs a GPU that
    cannot be used.
    """
    wanted = options.compute_capabilities
    if flavour.ahead_of_time:
        known = {int(name[2:]) for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)}
        unknown = [value for value in wanted if value not in known]
        if unknown:
            raise ContractError(
                f"{flavour.title} {trt.__version__} does not build for compute capability {dotted(unknown)}; it builds for "
                f"{dotted(sorted(known))}. Other GPUs take --engine tensorrt, on a machine that has one"
            )
        if wanted and not options.strip_weights:
            return wanted
    reason = cuda.refusal(options.device)
    if reason is not None:
        raise EngineError(f"{_why_a_gpu(flavour, options)}: {reason}")
    here = machine.capability(options.device)
    if flavour.ahead_of_time and wanted:
        return wanted
    if wanted not in ((), (here,)):
        raise ContractError(
            f"{flavour.title} builds for the GPU that it runs on, which has compute capability {dotted([here])}; "
            f"{dotted(wanted)} was asked for. Build there, or with --engine tensorrt-rtx"
        )
    return (here,)


def prepare(flavour: Flavour, options: BuildOptions) -> None:
    """Makes the GPU that a build measures on the current one of this thread."""
    if not flavour.ahead_of_time:
        cuda.library().Device(options.device).set_current()


def target(flavour: Flavour, trt: Any, config: Any, wanted: tuple[int, ...], options: BuildOptions) -> None:
    """Tells a builder's config which GPUs to build for; TensorRT takes the one it runs on, and maybe others like it."""
    if flavour.ahead_of_time:
        config.num_compute_capabilities = len(wanted)
        for index, value in enumerate(wanted):
            config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{value}"], index)
        # Intermediate values lie where the runtime says, always: without that a run may not be captured as a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    elif options.hardware_compatible != HARDWARE[0]:
        levels = trt.HardwareCompatibilityLevel.__members__
        config.hardware_compatibility_level = levels[options.hardware_compatible.upper()]


def joined_attention(flavour: Flavour, data: Any) -> int | None:
    """In how many attention kernels a step of this engine runs products and softmax together, by the list of kernels in
    it; None where it has no such list."""
    if not flavour.ahead_of_time or KERNEL.search(data) is None:
        return None
    return len(JOINED_ATTENTION.findall(data))


def _why_a_gpu(flavour: Flavour, options: BuildOptions) -> str:
    if not flavour.ahead_of_time:
        return (
            f"{flavour.title} measures kernels on the GPU that it builds for (--engine tensorrt-rtx does without one)"
        )
    if options.strip_weights:
        # Tried with 1.7.1: its compiler asks the driver for kernels when weights are to be refitted.
        return f"{flavour.title} needs a GPU's driver to build an engine without its weights"
    return f"{flavour.title} was not told what to build for (--compute-capability 89,120), and takes this machine's GPU"
