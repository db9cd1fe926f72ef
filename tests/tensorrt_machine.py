"""What tests on a machine with TensorRT and its GPU share: whether there is one, and bundles with engines for it."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from hardware import require_hardware
from models import made, scratch
from tensorrt_stand_in import engine_bundle

from rmt_trt.errors import EngineError
from rmt_trt.export.tensorrt import BuildOptions
from rmt_trt.export.tensorrt.flavours import FLAVOURS, capabilities, library
from rmt_trt.runtime import engine_fit, machine

# The largest batch that the conformance suite steps together.
BATCH = 8


def require_tensorrt(engine: str) -> None:
    """Skips the test where there is no such TensorRT, or no GPU that it runs on; RMT_REQUIRE makes that a failure."""
    require_hardware(engine, _reason(engine))


@functools.cache
def _reason(engine: str) -> str | None:
    flavour = FLAVOURS[engine]
    reason = machine.gpu_refusal(0, flavour.extra, "it")
    if reason is not None:
        return reason
    try:
        capabilities(flavour, library(flavour), BuildOptions())
    except EngineError as err:
        return str(err)
    here = machine.capability(0)
    if flavour.ahead_of_time and here not in engine_fit.rtx_targets():
        return f"{flavour.title} does not run on compute capability {engine_fit.dotted([here])}"
    return engine_fit.old_driver(flavour.module)


@functools.cache
def real_bundle(name: str, engine: str) -> Path:
    """The bundle of a model of the catalogue with engines that are built here, for this GPU: nobody may change it."""
    from rmt_trt.export.tensorrt import add_engines

    path = scratch() / f"{name}-{engine}.rmt"
    shutil.copytree(made(name).bundle, path)
    add_engines(path, engine, ("fp32",), BuildOptions(max_batch=BATCH))
    return path


@functools.cache
def fake_bundle(name: str) -> Path:
    """The same with fake engines of TensorRT-RTX, which `tensorrt_host` runs; a language model has one without logits."""
    folder = scratch() / "fake-engines"
    folder.mkdir(exist_ok=True)
    return engine_bundle(folder, name, "tensorrt-rtx", ("all", "none") if made(name).spec.logits == "lm" else ("all",))
