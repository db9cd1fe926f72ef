"""Which engine file is run: those of a bundle, or one by itself, and of those that this machine can run the best.

The rule, for one engine ("tensorrt" or "tensorrt-rtx"): the dtype comes first, in the order of the CUDA engine, others
only where they are asked for; of a dtype the narrowest fit, since what runs elsewhere too may be slower here: for its kind
of GPU alone before hardware-compatible, for its own version alone before version-compatible; then the file that takes
most documents together; then that for the fewest kinds of GPU. A file that this machine cannot run is refused with its
reason.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rmt_trt.bundle import Bundle
from rmt_trt.contract import QUANTIZED, SEGMENT, Head
from rmt_trt.engine_check import read_record
from rmt_trt.engine_record import BUILT, FOLDER, HARDWARE, EngineRecord
from rmt_trt.errors import EngineError, FormatError
from rmt_trt.files import sha256
from rmt_trt.runtime import engine_fit, machine
from rmt_trt.runtime.engine_fit import PACKAGES, RTX, Package
from rmt_trt.runtime.engines.cuda import DTYPES

if TYPE_CHECKING:
    from rmt_trt.runtime.source import Source

SUFFIX, RECORD = ".engine", ".json"


@dataclass(frozen=True)
class EngineFile:
    """An engine file and what its record says of it. The hash is not compared yet: `read_checked`."""

    record: EngineRecord
    path: Path


def engine_files(source: Source) -> tuple[EngineFile, ...]:
    """The engine files of a bundle whose records can be read, by name, or the one that was opened by itself."""
    return listed(source)[0]


def listed(source: Source) -> tuple[tuple[EngineFile, ...], dict[str, str]]:
    """The engine files, and of those whose record cannot be believed the reason, by name."""
    if source.record is not None:
        return (EngineFile(source.record, source.path),), {}
    if source.bundle is None:
        return (), {}
    found, unreadable = [], {}
    for name in _names(source.bundle):
        try:
            found.append(_of_bundle(source.bundle, name))
        except FormatError as err:
            unreadable[f"{name}{SUFFIX}"] = str(err)
    return tuple(found), unreadable


def read_checked(file: EngineFile) -> Path:
    """The path of an engine file, after its size and hash were compared with its record. Errors: FormatError."""
    reason = engine_fit.cut(file.record, file.path)
    if reason is not None:
        raise FormatError(f"{file.path}: {reason}")
    try:
        digest = sha256(file.path)
    except OSError as err:
        raise FormatError(f"{file.path} cannot be read ({err.strerror}). Copy it again") from err
    if digest != file.record.sha256:
        raise FormatError(
            f"{file.path} is not the engine that its record describes (SHA-256 differs): it was altered. Copy both files "
            f"again, or build the engine again with rmt-build"
        )
    return file.path


def refusal_of(file: EngineFile, device: int) -> str | None:
    """Why GPU `device` of this machine cannot run an engine file, or None."""
    return engine_fit.refusal(file.record, file.path, device)


def package_of(file: EngineFile) -> Package:
    """The Python package that runs a file. Errors: EngineError, with the reason of each that is here and does not."""
    return engine_fit.package_of(file.record)


def runnable(source: Source, engine: str, dtype: str | None, device: int) -> dict[Head, EngineFile]:
    """The best file of each head; those without logits of the same dtype and range of batches as the one with, "all",
    which is always there.

    Errors: EngineError with the reason of every file, where this machine can run none.
    """
    found = _choice(source, engine, dtype, device)
    if isinstance(found, str):
        raise EngineError(f"engine '{engine}' cannot run {source.path}: {found}")
    return found


def refusal(source: Source, engine: str, dtype: str | None, device: int) -> str | None:
    """Why `engine` can run no engine file of a source on this machine, and what to build; None where it can run one."""
    found = _choice(source, engine, dtype, device)
    return found if isinstance(found, str) else None


def _choice(source: Source, engine: str, dtype: str | None, device: int) -> dict[Head, EngineFile] | str:
    """The files to run, or why there are none."""
    if dtype is not None and dtype not in BUILT:
        return f"engines are built in {', '.join(BUILT)}, not in {dtype}"
    files, unreadable = listed(source)
    own = [file for file in files if file.record.engine == engine]
    wanted = [file for file in own if _wanted(file.record, dtype, source.record is not None)]
    if not wanted:
        nothing = "; ".join([_nothing(source, engine, dtype, own), *_told(unreadable)])
        return f"{nothing}. {_advice(source, engine, dtype, device)}"
    reasons = {file.path.name: refusal_of(file, device) for file in wanted}
    fitting = sorted((file for file in wanted if reasons[file.path.name] is None), key=_rank)
    whole = next((file for file in fitting if file.record.head == "all"), None)
    if whole is None:
        refused = {name: reason or "it gives no logits (head 'none')" for name, reason in reasons.items()}
        told = "; ".join(_told(refused | unreadable))
        # Without a GPU it is not the engine that is missing.
        return told if _no_gpu(engine, device) else f"{told}. {_advice(source, engine, dtype, device)}"
    alike = [f for f in fitting if (f.record.dtype, f.record.profiles) == (whole.record.dtype, whole.record.profiles)]
    chosen: dict[Head, EngineFile] = {"all": whole}
    for file in alike:
        chosen.setdefault(cast(Head, file.record.head), file)
    return chosen


def _wanted(record: EngineRecord, dtype: str | None, alone: bool) -> bool:
    if dtype is None:
        return alone or record.dtype in DTYPES
    return record.dtype == dtype


def _rank(file: EngineFile) -> tuple[Any, ...]:
    """The rule of the choice; the least comes first."""
    record = file.record
    return (
        DTYPES.index(record.dtype) if record.dtype in DTYPES else len(DTYPES),
        HARDWARE.index(record.hardware_compatible),
        record.version_compatible,
        -most_documents(record),
        len(record.compute_capabilities),
        file.path.name,
    )


def most_documents(record: EngineRecord) -> int:
    """How many documents a step of an engine takes, by its first profile, which is the one that is run."""
    return int(record.profiles[0][SEGMENT]["max"][0])


def _nothing(source: Source, engine: str, dtype: str | None, own: list[EngineFile]) -> str:
    """Why there is nothing to choose from."""
    if source.record is not None and not own:
        return f"it is an engine for '{source.record.engine}', built by {source.record.flavour} {source.record.version}"
    if own:
        made = ", ".join(sorted({file.record.dtype for file in own}))
        return f"its engine files compute in {made}{f', not in {dtype}' if dtype else ', which has to be asked for'}"
    if source.bundle is None:
        return "it runs engine files, which rmt-build compiles and adds to a bundle"
    return "the bundle has no engine file for it"


def _told(reasons: dict[str, str]) -> list[str]:
    """Reasons with the files that they are of; one that several files share is said once."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(of)}: {reason}" for reason, of in names.items()]


def _no_gpu(engine: str, device: int) -> bool:
    package = PACKAGES[engine][0]
    return machine.gpu_refusal(device, package.extra, package.title) is not None


def _advice(source: Source, engine: str, dtype: str | None, device: int) -> str:
    """What to build, ready to paste where this machine has a GPU."""
    bundle = shlex.quote(str(source.path)) if source.bundle is not None else "NAME.rmt"
    if dtype in QUANTIZED and (source.bundle is None or source.bundle.graph(engine, dtype) is None):
        return f"First add a graph to build it from: rmt-calibrate {bundle} --engine {engine} --dtype {dtype}"
    line = f"rmt-build {bundle} --engine {{}} --dtype {dtype or DTYPES[0]}"
    if _no_gpu(engine, device):
        if engine == RTX:
            return f"To build one, for GPUs of 8.9 and 12.0: {line.format(engine)} --compute-capability 89,120"
        return f"To build one, on a machine with a GPU of the kind that is to run it: {line.format(engine)}"
    if engine != RTX:
        return f"To build one for GPU {device}: {line.format(engine)}"
    try:
        capability = machine.capability(device)
    except EngineError as err:
        return f"What to build is not known: {err}"
    if capability not in engine_fit.rtx_targets():
        return (
            f"TensorRT-RTX does not run on compute capability {engine_fit.dotted([capability])}, which GPU {device} has. To "
            f"build one with TensorRT: {line.format('tensorrt')}"
        )
    return f"To build one for GPU {device}: {line.format(engine)} --compute-capability {capability}"


def _names(bundle: Bundle) -> list[str]:
    """Names of the bundle's engines without suffix, of a record or an engine file."""
    inside = [Path(name) for name in bundle.manifest.files if Path(name).parent == Path(FOLDER)]
    return sorted({path.stem for path in inside if path.suffix in (SUFFIX, RECORD)})


def _of_bundle(bundle: Bundle, name: str) -> EngineFile:
    """One engine of a bundle, its record read and compared with the manifest. Errors: FormatError."""
    files = bundle.manifest.files
    record_name, engine_name = f"{FOLDER}/{name}{RECORD}", f"{FOLDER}/{name}{SUFFIX}"
    if record_name not in files or engine_name not in files:
        lacks = record_name if record_name not in files else engine_name
        raise FormatError(
            f"the bundle's manifest has no {lacks}, and an engine and its record go together. Build the engine again with "
            f"rmt-build"
        )
    record = read_record(bundle.file(record_name), bundle.spec)
    claimed, entry = (record.file, record.size, record.sha256), files[engine_name]
    if claimed != (f"{name}{SUFFIX}", entry.size, entry.sha256):
        raise FormatError(
            f"{record_name} is about another file than {engine_name} in the manifest (name, size or hash differ). Copy the "
            f"bundle again, or build the engine again with rmt-build"
        )
    path = bundle.path / engine_name
    if path.is_symlink() or not path.resolve().is_relative_to(bundle.path.resolve()):
        raise FormatError(
            f"{path} leads out of the bundle through a link, and is not read. Copy the whole folder again"
        )
    return EngineFile(record, path)
