"""Which engine file this machine can run: those of a bundle, or one by itself with its record beside it.

The rule of the choice, for one engine ("tensorrt" or "tensorrt-rtx"): of the files that this machine can run, the dtype
comes first, in the order of the CUDA engine's; of that dtype the narrowest: built for these GPUs alone before those
that other GPUs run too, for its own version alone before version-compatible ones; then the one that takes most
documents; then the one for the fewest kinds of GPU. Every other file is refused with its reason.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rmt_trt.contract import SEGMENT, Head
from rmt_trt.engine_record import FOLDER, HARDWARE, EngineRecord
from rmt_trt.errors import EngineError, FormatError
from rmt_trt.files import read_json, sha256
from rmt_trt.runtime import machine
from rmt_trt.runtime.engines.cuda import DTYPES

if TYPE_CHECKING:
    from rmt_trt.runtime.source import Source

RECORD_LIMIT = 64 << 20


@dataclass(frozen=True)
class EngineFile:
    """An engine file and what its record says of it. Size and hash of the file are not checked yet: `read_checked`."""

    record: EngineRecord
    path: Path


@dataclass(frozen=True)
class Package:
    """A Python package that runs engine files. whole: it runs all of its own version; others the version-compatible."""

    module: str
    title: str
    extra: str
    whole: bool = True


# By engine, best first.
PACKAGES = {
    "tensorrt": (
        Package("tensorrt", "TensorRT", "tensorrt"),
        Package("tensorrt_lean", "TensorRT's lean runtime", "tensorrt-lean", whole=False),
        Package("tensorrt_dispatch", "TensorRT's dispatch runtime", "tensorrt-lean", whole=False),
    ),
    "tensorrt-rtx": (Package("tensorrt_rtx", "TensorRT-RTX", "tensorrt-rtx"),),
}
# The Linux driver that came with a CUDA: older ones do not run what was built for it.
DRIVERS = {12: 525, 13: 580}


def engine_files(source: Source) -> tuple[EngineFile, ...]:
    """The engine files of a bundle whose records can be read, by name, or the lone one that was opened."""
    if source.kind == "engine":
        record = EngineRecord.from_json(
            read_json(source.path.with_suffix(".json"), RECORD_LIMIT, "an engine's record"), str(source.path)
        )
        return (EngineFile(record, source.path),)
    if source.bundle is None:
        return ()
    found = []
    for name in sorted(source.bundle.manifest.files):
        if name.startswith(f"{FOLDER}/") and name.endswith(".json"):
            path = source.bundle.file(name)
            record = EngineRecord.from_json(read_json(path, RECORD_LIMIT, "an engine's record"), str(path))
            found.append(EngineFile(record, path.with_suffix(".engine")))
    return tuple(found)


def read_checked(file: EngineFile) -> Path:
    """Path of an engine file whose size and hash are those of its record. Errors: FormatError."""
    reason = _cut(file)
    if reason is not None:
        raise FormatError(f"{file.path} {reason}")
    if sha256(file.path) != file.record.sha256:
        raise FormatError(
            f"{file.path} is not the file that was built (SHA-256 differs). Copy it again, or build it again"
        )
    return file.path


def refusal_of(file: EngineFile, device: int) -> str | None:
    """Why this machine cannot run an engine file on GPU `device`, or None. What it costs: a look at the GPU and an import."""
    return next(_reasons(file, device), None)


def package_of(file: EngineFile) -> Package:
    """The package that runs a file. Errors: EngineError, with the reason of each that does not."""
    reasons = []
    for package in PACKAGES[file.record.engine]:
        reason = _package_refusal(file.record, package)
        if reason is None:
            return package
        reasons.append(reason)
    raise EngineError("; ".join(reasons))


def runnable(source: Source, engine: str, dtype: str | None, device: int) -> dict[Head, EngineFile]:
    """The best file of each head, all of one dtype and one range of batches; "all" is among them.

    Errors: EngineError with the reason of every file, where this machine can run none.
    """
    found, reason = _choice(source, engine, dtype, device)
    if reason is not None:
        raise EngineError(f"engine '{engine}' cannot run {source.path}: {reason}")
    return found


def refusal(source: Source, engine: str, dtype: str | None, device: int) -> str | None:
    """Why no engine file of a source can be run by `engine`, or None."""
    return _choice(source, engine, dtype, device)[1]


def _choice(source: Source, engine: str, dtype: str | None, device: int) -> tuple[dict[Head, EngineFile], str | None]:
    files = [file for file in engine_files(source) if file.record.engine == engine]
    wanted = [file for file in files if (file.record.dtype in DTYPES if dtype is None else file.record.dtype == dtype)]
    reasons = {file.path.name: refusal_of(file, device) for file in wanted}
    fitting = sorted((file for file in wanted if reasons[file.path.name] is None), key=_rank)
    whole = next((file for file in fitting if file.record.head == "all"), None)
    if whole is None:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        return {}, f"{told or 'it has no engine file for it'}. Build one: {build_line(source, engine, dtype, device)}"
    chosen: dict[Head, EngineFile] = {"all": whole}
    for file in fitting:
        if (file.record.dtype, file.record.profiles) == (whole.record.dtype, whole.record.profiles):
            chosen.setdefault(cast(Head, file.record.head), file)
    return chosen, None


def _rank(file: EngineFile) -> tuple[Any, ...]:
    record = file.record
    return (
        DTYPES.index(record.dtype) if record.dtype in DTYPES else len(DTYPES),
        HARDWARE.index(record.hardware_compatible),
        record.version_compatible,
        -record.profiles[0][SEGMENT]["max"][0],
        len(record.compute_capabilities),
        file.path.name,
    )


def _reasons(file: EngineFile, device: int) -> Iterator[str]:
    """What speaks against a file, what cannot be helped first; nothing of TensorRT is loaded before the GPU answered."""
    record = file.record
    cut = _cut(file)
    if cut is not None:
        yield cut
    if record.stripped:
        yield "it holds no weights, and this version of rmt-trt cannot refit it. Build it without --strip-weights"
    here = machine.system()
    if (record.os, machine.machine_name(record.machine)) != here:
        yield f"it was built on {record.os} {record.machine}, and this is {here[0]} {here[1]}. Build it on such a machine"
    package = PACKAGES[record.engine][0]
    gpu = machine.gpu_refusal(device, package.extra, package.title)
    if gpu is not None:
        yield gpu
        return
    capability = machine.capability(device)
    if not _fits(record, capability):
        yield (
            f"it was built for compute capability {dotted(record.compute_capabilities)}, and GPU {device} has "
            f"{dotted([capability])}"
        )
    try:
        found = package_of(file)
    except EngineError as err:
        yield str(err)
        return
    wanted, driver = machine.built_for_cuda(found.module), machine.driver_cuda()
    if wanted is not None and driver[0] < wanted:
        yield (
            f"{found.module} is for CUDA {wanted}, and the driver runs CUDA {driver[0]}.{driver[1]}. Update the NVIDIA "
            f"driver to {DRIVERS.get(wanted, 'a newer one')} or newer"
        )


def _fits(record: EngineRecord, capability: int) -> bool:
    if record.hardware_compatible == "ampere_plus":
        return capability >= 80
    return capability in record.compute_capabilities


def _package_refusal(record: EngineRecord, package: Package) -> str | None:
    try:
        version = str(machine.module(package.module, package.extra, package.title).__version__)
    except EngineError as err:
        return str(err)
    if not package.whole and not record.version_compatible:
        return f"{package.module} {version} runs version-compatible engines only, and this is none"
    built, here = _numbers(record.version), _numbers(version)
    later = here > built and (here[0] == built[0] or (built[0], here[0]) == (10, 11))
    if built == here or (record.version_compatible and later):
        return None
    return f"it was built by {record.flavour} {record.version}, and {package.module} here is {version}"


def _numbers(version: str) -> tuple[int, ...]:
    """Release and build: 11.4.0.106."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def _cut(file: EngineFile) -> str | None:
    try:
        size = file.path.stat().st_size if file.path.is_file() else None
    except OSError:
        size = None
    if size is None:
        return "is missing. Copy the bundle again, or build the engine again"
    if size != file.record.size:
        return f"has {size} bytes; its record says {file.record.size}. It was cut or altered: copy it again"
    return None


def build_line(source: Source, engine: str, dtype: str | None, device: int) -> str:
    """The command that builds what this machine's GPU runs, ready to paste."""
    path = shlex.quote(str(source.path)) if source.bundle is not None else "NAME.rmt"
    line = f"rmt-build {path} --engine {engine} --dtype {dtype or 'fp16'}"
    if engine == "tensorrt":
        return line
    known = machine.gpu_refusal(device, "tensorrt-rtx", "TensorRT-RTX") is None
    return f"{line} --compute-capability {machine.capability(device) if known else '89,120'}"


def dotted(values: tuple[int, ...] | list[int]) -> str:
    """(89, 120) as people write it: 8.9, 12.0."""
    return ", ".join(f"{value // 10}.{value % 10}" for value in values)
