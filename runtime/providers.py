"""ONNX Runtime's providers that compile with TensorRT and TensorRT-RTX: found here or not, and what speaks against them.

They are detected only. rmt-trt runs no graph on them, and nobody of this project ever ran one: they would build an engine
when a session is opened, and keep no memory on the GPU between segments by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmt_trt.errors import EngineError
from rmt_trt.runtime import engine_fit, machine
from rmt_trt.runtime.engine_fit import PACKAGES, RTX

# A provider of ONNX Runtime, and the plugin package that brings it beside those that are built in.
TENSORRT, NV_RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
LIBRARY = "libonnxruntime_providers_tensorrt.so"
LIBRARY_LIMIT = 64 << 20
_TITLES = {TENSORRT: "TensorRT", NV_RTX: "NV TensorRT-RTX"}


@dataclass(frozen=True)
class Provider:
    """name: ONNX Runtime's. found: it is installed. reason: why it cannot start here, or None."""

    name: str
    title: str
    found: bool
    reason: str | None


def providers(device: int) -> tuple[Provider, ...]:
    """Both providers. Starts neither."""
    try:
        ort = machine.module("onnxruntime", "gpu", "it")
    except EngineError as err:
        return tuple(Provider(name, title, False, str(err)) for name, title in _TITLES.items())
    known = set(ort.get_available_providers())
    here = {TENSORRT: TENSORRT in known, NV_RTX: NV_RTX in known or machine.installed(PLUGIN)}
    against = {TENSORRT: _against_tensorrt, NV_RTX: _against_rtx}
    found = []
    for name, title in _TITLES.items():
        try:
            reason = next(against[name](ort, here[name], device), None)
        except EngineError as err:  # of a fact that the driver does not give
            reason = str(err)
        found.append(Provider(name, title, here[name], reason))
    return tuple(found)


def _against_tensorrt(ort: Any, found: bool, device: int) -> Iterator[str]:
    """In order; the first is the answer."""
    if not found:
        yield (
            f"the installed onnxruntime {ort.__version__} has no such provider. It is in the other build: pip uninstall "
            f"onnxruntime; pip install 'rmt-trt[gpu]'"
        )
    package = PACKAGES["tensorrt"][0]
    gpu = machine.gpu_refusal(device, "gpu", "it")
    if gpu is not None:
        yield gpu
        return
    wanted = linked_tensorrt(Path(ort.__file__).parent / "capi" / LIBRARY)
    install = f"pip install 'tensorrt=={wanted}.*'" if wanted else "pip install 'rmt-trt[tensorrt]'"
    try:
        version = str(machine.module(package.module, package.extra, "it").__version__)
    except EngineError as err:
        yield str(err) if wanted is None else f"it needs TensorRT {wanted}, which is not installed: {install}"
        return
    if wanted is not None and version.split(".")[0] != str(wanted):
        yield f"it needs TensorRT {wanted}, and tensorrt {version} is installed. Install the other: {install}"
    old = engine_fit.old_driver(package.module)
    if old is not None:
        yield old


def _against_rtx(ort: Any, found: bool, device: int) -> Iterator[str]:
    """In order; the first is the answer."""
    if not found:
        yield (
            f"the installed onnxruntime {ort.__version__} has no such provider, and its plugin is not installed: pip install "
            f"{PLUGIN.replace('_', '-')}"
        )
    gpu = machine.gpu_refusal(device, PACKAGES[RTX][0].extra, "it")
    if gpu is not None:
        yield gpu
        return
    capability, targets = machine.capability(device), engine_fit.rtx_targets()
    if capability not in targets:
        yield (
            f"TensorRT-RTX does not run on compute capability {engine_fit.dotted([capability])}, which GPU {device} has; it "
            f"runs on {engine_fit.dotted(targets)}"
        )
    old = engine_fit.old_driver(PLUGIN)
    if old is not None:
        yield old


def linked_tensorrt(library: Path) -> int | None:
    """The major version of TensorRT that ONNX Runtime's provider was linked with, read out of its file; None where that
    does not say it."""
    try:
        if not library.is_file() or library.stat().st_size > LIBRARY_LIMIT:
            return None
        found = re.search(rb"libnvinfer\.so\.(\d{1,3})\0", library.read_bytes())
    except OSError:
        return None
    return int(found[1]) if found else None
