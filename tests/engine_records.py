"""Files that stand for engines with true records beside them, and a machine whose facts a test chooses."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rmt_trt.bundle import INITIAL, STEP, Bundle, GraphEntry, Manifest, add_files, new_bundle, write_manifest
from rmt_trt.contract import StateSpec, StepSpec
from rmt_trt.engine_check import FLAVOURS
from rmt_trt.engine_record import FOLDER, EngineRecord
from rmt_trt.errors import EngineError
from rmt_trt.initial_state import to_bytes, to_metadata
from rmt_trt.runtime import machine

DATA = b"what stands here for an engine" * 7
S = 12
SPEC = StepSpec(
    "custom",
    (StateSpec("hidden", "new_hidden", (4,), "float32", "h"), StateSpec("table", "new_table", (3, 2), "float16", "t")),
    S, 50, "lm", 50, fingerprint="f" * 64,
)  # fmt: skip
CLASSIFIER = StepSpec("custom", (StateSpec(shape=(2, 3)),), S, 50, "classifier", 5, fingerprint="c" * 64)
VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}


def _library() -> Any:
    """The real tensorrt_rtx. Only here: these files also serve tests on machines that lack it."""
    return importlib.import_module("tensorrt_rtx")


def initial_of(spec: StepSpec) -> dict[str, np.ndarray]:
    values = (np.full(state.shape, 0.5, state.dtype) for state in spec.states)
    return {state.initial: value for state, value in zip(spec.states, values, strict=True)}


def record_of(
    spec: StepSpec = SPEC,
    engine: str = "tensorrt-rtx",
    dtype: str = "fp16",
    head: str = "all",
    batch: int = 8,
    capabilities: tuple[int, ...] = (89,),
    *,
    name: str = "",
    data: bytes = DATA,
    initial: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> EngineRecord:
    """What rmt-build writes of an engine of `spec`: every field as a true one has it, unless `changes` say otherwise."""
    sizes = {state.input: state.shape for state in spec.states}
    profile = {n: {"min": [1, *s], "opt": [batch, *s], "max": [batch, *s]} for n, s in sizes.items()}
    profile["segment"] = {"min": [1, 1], "opt": [batch, spec.segment_length], "max": [batch, spec.segment_length]}
    tensors = [
        [{"name": n, "dtype": s.dtype, "shape": [-1, *s.shape]} for n, s in zip(names, spec.states, strict=False)]
        for names in (spec.inputs, spec.outputs)
    ]
    tensors[0].append({"name": "segment", "dtype": "int64", "shape": [-1, -1]})
    if head == "all":
        rows = [-1, -1] if spec.logits == "lm" else [-1]
        tensors[1].append({"name": "logits", "dtype": "float32", "shape": [*rows, spec.num_logits]})
    kinds = "-".join(f"sm{value}" for value in capabilities)
    fields: dict[str, Any] = {
        "engine": engine, "dtype": dtype, "role": "step", "head": head,
        "file": f"{name or f'{engine}-{dtype}-{head}-{kinds}-b{batch}'}.engine", "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(), "flavour": FLAVOURS[engine], "version": VERSIONS[engine],
        "compute_capabilities": capabilities, "profiles": (profile,), "inputs": tuple(tensors[0]),
        "outputs": tuple(tensors[1]), "graph": {"file": None, "sha256": "0" * 64},
        "metadata": to_metadata(spec, initial or initial_of(spec)), "os": "Linux", "machine": "x86_64", "seconds": 1.5,
    }  # fmt: skip
    return EngineRecord(**{**fields, **changes})


def write_engine(folder: Path, record: EngineRecord, data: bytes = DATA) -> Path:
    """An engine by itself: the file and its record beside it."""
    path = folder / record.file
    path.write_bytes(data)
    path.with_suffix(".json").write_text(record.to_json())
    return path


def add_engines(bundle: Path, *records: EngineRecord, data: bytes = DATA) -> None:
    """Adds engines to a bundle as rmt-build does."""
    for record in records:
        path = write_engine(bundle.parent, record, data)
        names = (path, path.with_suffix(".json"))
        add_files(bundle, {f"{FOLDER}/{name.name}": name for name in names})
        for name in names:
            name.unlink()


def bundle_of(folder: Path, *records: EngineRecord, spec: StepSpec = SPEC) -> Path:
    """A bundle that no test runs: its graph is none."""
    path = folder / "model.rmt"
    with new_bundle(path) as made:
        (made / STEP).write_bytes(b"no graph")
        (made / INITIAL).write_bytes(to_bytes(initial_of(spec), spec))
        write_manifest(made, Manifest(spec, (GraphEntry(STEP),), {}))
    add_engines(path, *records)
    return path


def names_of(bundle: Path) -> list[str]:
    return sorted(Bundle(bundle).manifest.files)


@dataclass
class Facts:
    """What a machine says of itself. gpu: why it has none, or None. packages: their modules by name. invalid: what
    TensorRT-RTX says against every engine."""

    system: tuple[str, str] = ("Linux", "x86_64")
    gpu: str | None = None
    capability: int = 89
    driver: tuple[int, int] = (13, 0)
    cuda: int | None = 13
    packages: dict[str, Any] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)

    def install(self, name: str, version: str, **inside: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(__version__=version, **inside)
        self.packages[name] = module

    def module(self, name: str, extra: str, purpose: str) -> Any:
        self.loaded.append(name)
        if name not in self.packages:
            raise EngineError(f"{purpose} needs the Python package '{name}': pip install 'rmt-trt[{extra}]'")
        return self.packages[name]


class Judge:
    """In place of `tensorrt_rtx.Runtime`: says of a header what a test wants. The enums are the real library's."""

    engine_header_size = 64

    def __init__(self, verdict: str, *found: str) -> None:
        self.verdict, self.found = verdict, found
        self.headers: list[bytes] = []

    def __call__(self, logger: Any) -> Judge:
        assert isinstance(logger, _library().ILogger)
        return self

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        self.headers.append(header)
        bits = (getattr(_library().EngineInvalidityDiagnostics, name) for name in self.found)
        return getattr(_library().EngineValidity, self.verdict), sum(int(bit) for bit in bits)


def rtx_names(judge: Judge) -> dict[str, Any]:
    names = ("EngineValidity", "EngineInvalidityDiagnostics", "ComputeCapability", "ILogger")
    return {**{name: getattr(_library(), name) for name in names}, "Runtime": judge}


@contextmanager
def on_machine(facts: Facts) -> Iterator[Facts]:
    """While it is open, this machine has these facts."""
    fakes: dict[str, Callable[..., Any]] = {
        "system": lambda: facts.system,
        "gpu_refusal": lambda device, extra, purpose: facts.gpu,
        "capability": lambda device: facts.capability,
        "gpu_name": lambda device: "NVIDIA Test",
        "driver_cuda": lambda: facts.driver,
        "current": lambda device: _nothing(),
        "installed": lambda name: name in facts.packages,
        "module": facts.module,
        "built_for_cuda": lambda name: facts.cuda,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(machine, name, fake)
        yield facts


def rtx_machine(**facts: Any) -> Facts:
    """A machine with a GPU of 8.9 and TensorRT-RTX that finds every engine valid."""
    found = Facts(**facts)
    found.install("tensorrt_rtx", VERSIONS["tensorrt-rtx"], **rtx_names(Judge("VALID")))
    return found


def tensorrt_machine(**facts: Any) -> Facts:
    """A machine with a GPU of 8.9 and the whole of TensorRT."""
    found = Facts(**facts)
    found.install("tensorrt", VERSIONS["tensorrt"])
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield
