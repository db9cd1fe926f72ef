"""TensorRT and a GPU made of host memory, so that the TensorRT engine's own code runs where there is neither.

A fake engine file names an ONNX graph, which ONNX Runtime's CPU provider computes. `tensorrt_world.py` is the GPU,
`tensorrt_library.py` the library.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_records import VERSIONS, Facts, on_machine, record_of, write_engine
from models import made
from tensorrt_library import MAGIC, library
from tensorrt_world import StrictGpu, StrictLateGpu, World

from rmt_trt import RMTRuntime
from rmt_trt.bundle import Bundle, add_files
from rmt_trt.engine_record import FOLDER, EngineRecord
from rmt_trt.runtime import buckets, cuda
from rmt_trt.runtime.engines.tensorrt import TensorRTEngine


def engine_file(
    folder: Path, bundle: Path, engine: str = "tensorrt-rtx", head: str = "all", batch: int = 8, **changes: Any
) -> Path:
    """A fake engine of a bundle's step, its true record beside it."""
    found = Bundle(bundle)
    states = zip(found.spec.states, found.initial(), strict=True)
    initial = {state.initial: value for state, value in states}
    common: dict[str, Any] = {"head": head, "batch": batch, "initial": initial, **changes}
    record = record_of(found.spec, engine, "fp32", **common)
    data = content(record, bundle)
    return write_engine(folder, record_of(found.spec, engine, "fp32", data=data, **common), data)


def content(record: EngineRecord, bundle: Path) -> bytes:
    """The bytes of a fake engine: what the real one knows of itself."""
    told = json.dumps({
        "graph": str(bundle / "step.onnx"), "head": record.head, "rtx": record.engine == "tensorrt-rtx",
        "inputs": record.inputs, "outputs": record.outputs, "profile": record.profiles[0],
        "host_code": record.version_compatible,
    }).encode()  # fmt: skip
    return MAGIC + len(told).to_bytes(8, "little") + told


def engine_bundle(folder: Path, name: str, engine: str, heads: tuple[str, ...] = ("all",), batch: int = 8) -> Path:
    """A copy of the bundle of a model of the catalogue with fake engines of these heads."""
    path = folder / f"{name}.rmt"
    shutil.copytree(made(name).bundle, path)
    for head in heads:
        file = engine_file(folder, path, engine, head, batch)
        both = (file, file.with_suffix(".json"))
        add_files(path, {f"{FOLDER}/{one.name}": one for one in both})
        for one in both:
            one.unlink()
    return path


def engine_of(runtime: RMTRuntime) -> TensorRTEngine:
    """The TensorRT engine that a runtime steps on."""
    engine = runtime._engine
    assert isinstance(engine, TensorRTEngine)
    return engine


@contextmanager
def tensorrt_host(
    cache: Path, seed: int | None = None, packages: tuple[str, ...] = ("tensorrt", "tensorrt_rtx"), staged: int = 2
) -> Iterator[World]:
    """While it is open, TensorRT runs on host memory; everything that went wrong is raised at the end.

    cache  the user's cache folder
    seed   streams do their work late, in an order by chance, and stage so many segments at a time
    """
    world = World(seed)
    facts = Facts()
    for name in packages:
        version = VERSIONS["tensorrt-rtx" if name == "tensorrt_rtx" else "tensorrt"]
        facts.packages[name] = library(world, name, version)
    gpu = StrictGpu if seed is None else StrictLateGpu
    with pytest.MonkeyPatch.context() as patch, on_machine(facts):
        patch.setattr(cuda, "Gpu", functools.partial(gpu, world=world))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        if seed is not None:
            patch.setattr(sys.modules[buckets.__name__], "STAGED", staged)
        yield world
    world.check()
