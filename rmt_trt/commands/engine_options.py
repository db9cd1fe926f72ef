"""What rmt-build and rmt-export share: the options of an engine's build, the build itself, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from rmt_trt.commands.app import printable
from rmt_trt.commands.stages import shown_stages
from rmt_trt.contract import DTYPES, Head
from rmt_trt.engine_check import HEADS
from rmt_trt.engine_record import HARDWARE
from rmt_trt.errors import ContractError
from rmt_trt.runtime.engine_fit import dotted

if TYPE_CHECKING:
    from torch import nn

    from rmt_trt.export.tensorrt import BuildOptions, BuiltEngine

ENGINES = ("tensorrt", "tensorrt-rtx")
LABELS = {"graph": "exporting the graph", "check": "checking it on the CPU", "build": "building the engine"}

ComputeCapability = Annotated[
    str | None, typer.Option(help="GPUs to build for: 89,120 or 8.9,12.0. [default: that of --device]")
]
MaxBatch = Annotated[int | None, typer.Option(help="Documents that a step takes at most. [default: 8]")]
HeadOption = Annotated[
    str | None,
    typer.Option(
        "--head", help="all: with logits. none: without. Or both. [default: all; of a language model all,none]"
    ),
]
Workspace = Annotated[int | None, typer.Option(help="Memory for intermediate values, in MiB.")]
TimingCache = Annotated[Path | None, typer.Option(help="A file that keeps kernel times between builds; tensorrt only.")]
OptimizationLevel = Annotated[int | None, typer.Option(help="0, a quick build, to 5, the longest search.")]
StripWeights = Annotated[
    bool, typer.Option("--strip-weights", help="Leave the weights to the graph in the bundle; needs a GPU here.")
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Let later versions run it; tensorrt only.")
]
HardwareCompatible = Annotated[
    str | None, typer.Option(help=f"Let other GPUs run it: {', '.join(HARDWARE)}; tensorrt only. [default: none]")
]
Device = Annotated[int | None, typer.Option(help="GPU index, where the build needs one. [default: 0]")]


@dataclass(frozen=True)
class EngineFlags:
    """The options as they were given; None or False where they were not."""

    compute_capability: str | None = None
    max_batch: int | None = None
    head: str | None = None
    workspace: int | None = None
    timing_cache: Path | None = None
    optimization_level: int | None = None
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: str | None = None
    device: int | None = None

    def given(self) -> list[str]:
        """Names of those that were given, as on a command line."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [f"--{name.replace('_', '-')}" for name, value in values.items() if value not in (None, False)]

    def options(self) -> BuildOptions:
        """Errors: ContractError for one that is none."""
        from rmt_trt.export.tensorrt import BuildOptions
        from rmt_trt.export.tensorrt.options import parse_capabilities

        heads = tuple(self.head.split(",")) if self.head is not None else ()
        if any(head not in HEADS for head in heads):
            raise ContractError(f"--head is {self.head!r}; expected {' or '.join(HEADS)}, or both with a comma")
        if self.hardware_compatible not in (None, *HARDWARE):
            raise ContractError(
                f"--hardware-compatible is {self.hardware_compatible!r}; expected one of {', '.join(HARDWARE)}"
            )
        chosen = {
            "max_batch": self.max_batch, "device": self.device, "hardware_compatible": self.hardware_compatible,
        }  # fmt: skip
        return BuildOptions(
            parse_capabilities(self.compute_capability),
            heads=cast("tuple[Head, ...]", heads),
            workspace_mib=self.workspace,
            timing_cache=self.timing_cache,
            optimization_level=self.optimization_level,
            strip_weights=self.strip_weights,
            version_compatible=self.version_compatible,
            **{name: value for name, value in chosen.items() if value is not None},  # type: ignore[arg-type]
        )


def parse_dtypes(text: str, allowed: Sequence[str] = DTYPES) -> tuple[str, ...]:
    """`fp16,fp32` as (fp16, fp32), each once. Errors: ContractError."""
    kinds = tuple(dict.fromkeys(text.split(",")))
    if any(kind not in allowed for kind in kinds):
        raise ContractError(f"--dtype is {text!r}; expected one of {', '.join(allowed)}, or several with commas")
    return kinds


def build_engines(
    bundle: Path, engine: str, dtypes: tuple[str, ...], options: BuildOptions, step: nn.Module | None, screen: Console
) -> None:
    """Builds and adds the engines, with their progress, and says what was made."""
    from rmt_trt.export.tensorrt import add_engines

    for dtype in dtypes:
        started = time.perf_counter()
        with shown_stages(screen, LABELS) as show:
            made = add_engines(bundle, engine, (dtype,), options, step, show)
        for one in made:
            for line in engine_lines(one):
                screen.print(line)
        names = "1 engine" if len(made) == 1 else f"{len(made)} engines"
        screen.print(f"{bundle}: {names} added in {time.perf_counter() - started:.1f} s; compiled, and not run")


def engine_lines(made: BuiltEngine) -> list[str]:
    """What an engine is, what its attention became, and how its graph was checked."""
    record = made.record
    segment = record.profiles[0]["segment"]
    what = "with logits" if record.head == "all" else "without logits"
    lines = [
        f"{made.file}: {record.size / 1e6:.1f} MB, built in {record.seconds:.1f} s",
        f"  {record.flavour} {record.version}, {record.dtype}, {what}, compute capability "
        f"{dotted(record.compute_capabilities)}, {record.os} {record.machine}; batch {segment['min'][0]} to "
        f"{segment['max'][0]}, text {segment['min'][1]} to {segment['max'][1]}",
        f"  attention: {_attention(made)}",
    ]
    if made.check is not None:
        lines.append(
            f"  its graph was checked on the CPU: largest error {made.check.largest:.1e} over {made.check.segments} segments"
        )
    return lines


def _attention(made: BuiltEngine) -> str:
    """How much of attention stayed whole, in words."""
    apart, parts = made.record.decomposable, f"products and softmax in its graph (opset {made.opset})"
    told = []
    if made.whole:
        told.append(f"kept whole, one kernel for each of {_named(made.whole)}")
    if apart:
        told.append(f"made of several kernels where the library has no single one: {_named(apart)}")
    if told:
        return "; ".join(told)
    if made.joined is None:
        return f"{parts}, which the builder joins where it can"
    if made.joined == 0:
        return f"made of several kernels, of {parts}: the library has no single one for them"
    kernels = "1 kernel" if made.joined == 1 else f"{made.joined} kernels"
    return f"kept whole, in {kernels} that the builder made of {parts}"


def _named(nodes: tuple[str, ...]) -> str:
    """A count, and the first of the names."""
    first = printable(", ".join(nodes[:2]))
    return (
        f"{len(nodes)} nodes ({first:.200}{', ...' if len(nodes) > 2 else ''})" if len(nodes) > 1 else f"{first:.200}"
    )
