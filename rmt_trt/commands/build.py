"""rmt-build: the step of a bundle is compiled to TensorRT engines, which are added to the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rmt_trt.bundle import Bundle
from rmt_trt.commands.app import Debug, Version, console, new_app, run_command
from rmt_trt.commands.engine_options import (
    ComputeCapability,
    Device,
    EngineFlags,
    HardwareCompatible,
    HeadOption,
    MaxBatch,
    OptimizationLevel,
    StripWeights,
    TimingCache,
    VersionCompatible,
    Workspace,
    build_engines,
    parse_dtypes,
)
from rmt_trt.commands.reference import bundle_model
from rmt_trt.errors import require

app = new_app()


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.rmt, that the engines are added to.")],
    engine: Annotated[
        str, typer.Option(help="tensorrt-rtx: builds for GPUs that are not here. tensorrt: for the GPU that is.")
    ] = "tensorrt-rtx",
    dtype: Annotated[
        str, typer.Option(help="fp32, fp16, bf16; int8, fp8 after rmt-calibrate. Several with commas.")
    ] = "fp16",
    compute_capability: ComputeCapability = None,
    max_batch: MaxBatch = None,
    head: HeadOption = None,
    workspace: Workspace = None,
    timing_cache: TimingCache = None,
    optimization_level: OptimizationLevel = None,
    strip_weights: StripWeights = False,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = None,
    device: Device = None,
    model: Annotated[
        Path | None, typer.Option(help="The checkpoint of a bundle that does not give its model itself.")
    ] = None,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Compiles the segment step of BUNDLE and adds the engines to it; the bundle is what it was until that is done."""
    kinds = parse_dtypes(dtype)
    for module in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "rmt-build")
    from rmt_trt.export.tensorrt import check_build

    flags = EngineFlags(
        compute_capability, max_batch, head, workspace, timing_cache, optimization_level, strip_weights,
        version_compatible, hardware_compatible, device,
    )  # fmt: skip
    options, opened = flags.options(), Bundle(bundle)
    check_build(engine, kinds, options, opened)
    step = bundle_model(opened, model) if model is not None else None
    build_engines(bundle, engine, kinds, options, step, console())


def main() -> None:
    """Console entry point."""
    run_command("rmt-build", app)
