"""Why this machine cannot run an engine file: what its record asks for, against what is here.

What cannot be helped on this machine is said first, so that nobody installs a package for a GPU that is not there. The
GPU and its driver are asked before a library of TensorRT is loaded.

Which version runs which engine is NVIDIA's rule, not ours. TensorRT: that which built it, to the build number; of a
version-compatible engine also later ones of the same major version, and 11 those of 10; no other crosses. TensorRT-RTX:
the release that built it alone, on either operating system.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rmt_trt.engine_record import EngineRecord
from rmt_trt.errors import EngineError
from rmt_trt.runtime import machine
from rmt_trt.runtime.engines.tensorrt_log import logger, one_line


@dataclass(frozen=True)
class Package:
    """A Python package that runs engine files. whole: all of its version; others run version-compatible ones alone."""

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
RTX = "tensorrt-rtx"
RTX_TARGETS = (75, 80, 86, 89, 120, 121)  # of 1.7.1
RTX_SYSTEMS = ("Linux", "Windows")
# Linux drivers from which on what was built for a CUDA runs, by CUDA's major version.
DRIVERS = {12: 525, 13: 580}
AMPERE = 80
CROSSING = (10, 11)
# What TensorRT-RTX may say of an engine, and what to do.
DIAGNOSTICS = {
    "VERSION_MISMATCH": "another release of TensorRT-RTX built it: install that, or build the engine again",
    "UNSUPPORTED_CC": "it was not built for this GPU: build it again with this GPU's --compute-capability",
    "OLD_CUDA_DRIVER": "the driver is too old for it: update the NVIDIA driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: update tensorrt-rtx",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it: end what else uses the GPU, or take a smaller dtype",
    "MALFORMED_ENGINE": "it is no engine of TensorRT-RTX: build the engine again",
    "CUDA_ERROR": "CUDA does not work: check nvidia-smi",
}


def refusal(record: EngineRecord, path: Path, device: int) -> str | None:
    """Why GPU `device` of this machine cannot run an engine file, in words that follow its name; None where it can."""
    return next(_reasons(record, path, device), None)


def needs(record: EngineRecord) -> str:
    """What an engine file asks for: the GPU and the package."""
    gpus = f"compute capability {dotted(record.compute_capabilities, ' or ')}"
    if record.hardware_compatible == "ampere_plus":
        gpus = "compute capability 8.0 or higher"
    later = " or a later one" if record.version_compatible else ""
    return f"a GPU of {gpus}, and {record.flavour} {record.version}{later}"


def package_of(record: EngineRecord) -> Package:
    """The package that runs an engine file. Errors: EngineError, with the reason of each that is here and does not."""
    packages = PACKAGES[record.engine]
    here = [package for package in packages if machine.installed(package.module)]
    reasons = []
    for package in here or packages[:1]:
        reason = _package_refusal(record, package)
        if reason is None:
            return package
        reasons.append(reason)
    if not here and record.version_compatible:
        reasons.append("as it is version-compatible, the smaller rmt-trt[tensorrt-lean] runs it too")
    raise EngineError("; ".join(reasons))


def dotted(values: Iterable[int], between: str = ", ") -> str:
    """(89, 120) as people write it: 8.9, 12.0."""
    return between.join(f"{value // 10}.{value % 10}" for value in values)


def cut(record: EngineRecord, path: Path) -> str | None:
    """What is wrong with an engine file at a glance, before it is read."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as err:
        return f"the file cannot be read ({err.strerror}). Copy it again"
    if size is None:
        return "the file is missing, or no regular file. Copy it again, or build it again with rmt-build"
    if size != record.size:
        return f"the file has {size} bytes, and its record says {record.size}: it was cut or altered. Copy it again"
    return None


def _reasons(record: EngineRecord, path: Path, device: int) -> Iterator[str]:
    """In order; the first is the answer, so that each is asked only where those before it found nothing."""
    first = PACKAGES[record.engine][0]
    if (damage := cut(record, path)) is not None:
        yield damage
    if record.stripped:
        yield (
            "it holds no weights, and this version of rmt-trt does not put them back. Build it without --strip-weights"
        )
    if (elsewhere := _other_system(record)) is not None:
        yield elsewhere
    gpu = machine.gpu_refusal(device, first.extra, "it")
    if gpu is not None:
        yield f"{gpu}. It needs {needs(record)}"
        return
    try:
        if (other := _other_gpu(record, device)) is not None:
            yield other
        package = package_of(record)
        if (old := old_driver(package.module)) is not None:
            yield old
    except EngineError as err:  # of a fact that cannot be had, or of every package
        yield str(err)
        return
    if record.engine == RTX and (invalid := _invalid(package, path, device)) is not None:
        yield invalid


def _other_system(record: EngineRecord) -> str | None:
    system, kind = machine.system()
    same = record.os == system or (record.engine == RTX and {record.os, system} <= set(RTX_SYSTEMS))
    if same and machine.machine_name(record.machine) == kind:
        return None
    return (
        f"it was built on {record.os} {record.machine}, and this machine is {system} {kind}: engines do not run across. "
        f"Build it on such a machine"
    )


def _other_gpu(record: EngineRecord, device: int) -> str | None:
    here = machine.capability(device)
    if here in record.compute_capabilities:
        return None
    if record.hardware_compatible == "ampere_plus" and here >= AMPERE:
        return None
    return (
        f"it was built for compute capability {dotted(record.compute_capabilities, ' or ')}"
        f"{', and all from 8.0 on' if record.hardware_compatible == 'ampere_plus' else ''}; GPU {device} has {dotted([here])}"
    )


def _package_refusal(record: EngineRecord, package: Package) -> str | None:
    try:
        version = str(machine.module(package.module, package.extra, "it").__version__)
    except EngineError as err:
        return str(err)
    if not package.whole and not record.version_compatible:
        return (
            f"{package.module} {version} runs version-compatible engines only, and it is not one. Install the whole of "
            f"TensorRT, pip install 'tensorrt=={record.version}', or build it with --version-compatible"
        )
    built, here = _numbers(record.version), _numbers(version)
    if built == here:
        return None
    said = f"{record.flavour} {record.version} built it, and {package.module} {version} is installed here"
    again = f"pip install '{record.flavour.replace('_', '-')}=={record.version}', or build it again here"
    if record.engine == RTX:
        return f"{said}; TensorRT-RTX runs an engine only in the release that built it. Install that: {again}"
    if not record.version_compatible:
        return f"{said}; TensorRT runs an engine only in the version that built it. Install that: {again}"
    if here > built and (here[0] == built[0] or (built[0], here[0]) == CROSSING):
        return None
    return (
        f"{said}; a version-compatible engine runs in later versions of the same major one, and those of "
        f"{CROSSING[0]} in {CROSSING[1]}. Install such a one: {again}"
    )


def old_driver(module: str) -> str | None:
    """Why the driver does not do for an installed package, or None."""
    wanted, (major, minor) = machine.built_for_cuda(module), machine.driver_cuda()
    if wanted is None or major >= wanted:
        return None
    newer = f" to {DRIVERS[wanted]} or newer" if wanted in DRIVERS else ""
    return (
        f"{module} is here for CUDA {wanted}, and the driver runs CUDA {major}.{minor} at the most: it is too old. Update "
        f"the NVIDIA driver{newer}"
    )


def _invalid(package: Package, path: Path, device: int) -> str | None:
    """What TensorRT-RTX itself says of an engine's header on a GPU."""
    trt = machine.module(package.module, package.extra, "it")
    try:
        log = logger(trt)
        with machine.current(device), log.capture() as lines:
            runtime = trt.Runtime(log)
            with path.open("rb") as file:
                verdict, bits = runtime.get_engine_validity(file.read(runtime.engine_header_size))
    except Exception as err:  # its bindings and the driver's raise what they like
        return f"{package.title} {trt.__version__} could not look at it: {' '.join(str(err).split())[:300]}"
    if verdict != trt.EngineValidity.INVALID:
        return None
    kinds = trt.EngineInvalidityDiagnostics.__members__
    found = [name for name, kind in kinds.items() if int(bits) & int(kind)]
    told = "; ".join(f"{name}, {DIAGNOSTICS[name]}" if name in DIAGNOSTICS else name for name in found)
    return f"{package.title} {trt.__version__} says that it is not valid here: {told or one_line(lines)}"


def rtx_targets() -> tuple[int, ...]:
    """The compute capabilities that TensorRT-RTX runs on, of the installed release where there is one."""
    package = PACKAGES[RTX][0]
    try:
        kinds = machine.module(package.module, package.extra, package.title).ComputeCapability.__members__
    except EngineError:
        return RTX_TARGETS
    return tuple(sorted(int(name[2:]) for name in kinds if re.fullmatch(r"SM\d+", name)))


def _numbers(version: str) -> tuple[int, ...]:
    """Release and build of a version: 11.4.0.106."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])
