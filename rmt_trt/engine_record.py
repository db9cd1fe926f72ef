"""`engines/NAME.json`: what is known of the engine file beside it, enough to choose or refuse it without loading it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rmt_trt.errors import FormatError

FORMAT = "rmt-trt-engine"
FORMAT_VERSION = 1
FOLDER = "engines"
BUILT = ("fp32", "fp16", "bf16", "int8", "fp8")  # dtypes that engines are built in
# "none": GPUs of its compute capabilities; "same_compute_capability": the same, whatever their model; "ampere_plus": all
# from 8.0 on. In the words of TensorRT's HardwareCompatibilityLevel.
HARDWARE = ("none", "same_compute_capability", "ampere_plus")


@dataclass(frozen=True)
class EngineRecord:
    """engine, dtype, role, head  its use, in the words of the bundle's graphs
    file, size, sha256         the engine file, beside this one
    flavour, version           the Python package that built it, and its version
    compute_capabilities       GPUs that it was built for: 89 is 8.9
    os, machine                what it was built on, as Python's `platform` names them: an engine runs on such only
    profiles                   for every profile and input the shapes `min`, `opt`, `max`
    inputs, outputs            name, dtype, shape of every tensor; -1 varies
    graph                      `file` in the bundle, or null where it was made for the build alone, and `sha256`
    stripped                   it holds no weights: refit it from `graph` before it runs
    version_compatible         later versions of the flavour run it too
    hardware_compatible        other GPUs run it too: one of HARDWARE
    decomposable               attention nodes that may have become several kernels
    seconds                    of the build
    metadata                   step spec and initial state, as in an ONNX graph of ours
    """

    engine: str
    dtype: str
    role: str
    head: str
    file: str
    size: int
    sha256: str
    flavour: str
    version: str
    compute_capabilities: tuple[int, ...]
    profiles: tuple[dict[str, dict[str, list[int]]], ...]
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    graph: dict[str, Any]
    metadata: dict[str, str]
    os: str = field(default_factory=platform.system)
    machine: str = field(default_factory=platform.machine)
    stripped: bool = False
    version_compatible: bool = False
    hardware_compatible: str = "none"
    decomposable: tuple[str, ...] = ()
    seconds: float = 0.0
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, value: object, where: str) -> EngineRecord:
        """Reads what `to_json` wrote. Errors: FormatError, naming the field that is wrong, missing or unknown."""
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise FormatError(f"{where} describes no engine of rmt-trt. Build the engine again with rmt-build")
        version = value.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise FormatError(
                f"{where} has format version {version!r:.80}; this rmt-trt reads version {FORMAT_VERSION}. "
                f"Update rmt-trt, or build the engine again"
            )
        names = {f.name for f in fields(cls)}
        if set(value) != names:
            raise FormatError(
                f"{where} lacks {sorted(names - set(value))} and has the unknown fields {sorted(set(value) - names)!r:.200}; it was "
                f"altered. Build the engine again"
            )
        for name, kind in _KINDS.items():
            if not _is(value[name], kind):
                raise FormatError(f"{where}: '{name}' is {value[name]!r:.80}; it was altered. Build the engine again")
        known: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
        return cls(**known)


# JSON kinds of the fields: a list of something is named by a tuple.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("engine", "dtype", "role", "head", "file", "sha256", "flavour", "version", "os", "machine"), str),
    "size": int, "compute_capabilities": (int,), "profiles": (dict,), "inputs": (dict,), "outputs": (dict,),
    "graph": dict, "metadata": dict, "stripped": bool, "version_compatible": bool, "hardware_compatible": str, "decomposable": (str,),
    "seconds": float,
}  # fmt: skip


def _is(value: object, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, list) and all(_is(item, kind[0]) for item in value)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
