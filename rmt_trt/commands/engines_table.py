"""What rmt-info shows of engine files, of the GPU, and of ONNX Runtime's TensorRT providers."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.table import Table

from rmt_trt.commands.app import printable
from rmt_trt.contract import SEGMENT
from rmt_trt.engine_record import EngineRecord
from rmt_trt.errors import EngineError
from rmt_trt.runtime import machine
from rmt_trt.runtime.engine_files import EngineFile, listed, refusal_of
from rmt_trt.runtime.engine_fit import dotted
from rmt_trt.runtime.providers import Provider
from rmt_trt.runtime.source import Source

NAME_WIDTH = 24  # so that the table fits into 80 columns


def gpu_facts(device: int) -> dict[str, Any]:
    """`found`, and the GPU's name, compute capability and newest CUDA, or the `reason` why it cannot be used."""
    reason = machine.gpu_refusal(device, "tensorrt", "a look at the GPU")
    if reason is not None:
        return {"found": False, "reason": reason}
    try:
        major, minor = machine.driver_cuda()
        name, capability = machine.gpu_name(device), machine.capability(device)
    except EngineError as err:
        return {"found": False, "reason": str(err)}
    return {"found": True, "name": name, "compute_capability": capability, "driver_cuda": f"{major}.{minor}"}


def gpu_line(device: int, facts: dict[str, Any]) -> str:
    if not facts["found"]:
        return f"GPU {device}: none that can be used: {printable(facts['reason'])}"
    return (
        f"GPU {device}: {printable(facts['name'])}, compute capability {dotted([facts['compute_capability']])}, driver for "
        f"CUDA {facts['driver_cuda']}"
    )


def engine_rows(source: Source, device: int) -> list[dict[str, Any]]:
    """A row for each engine file as plain values, `reason` being None where GPU `device` of this machine runs it."""
    files, unreadable = listed(source)
    rows = [_row(file, refusal_of(file, device)) for file in files]
    rows += [{"file": name, "runs": False, "reason": reason} for name, reason in unreadable.items()]
    return sorted(rows, key=lambda row: str(row["file"]))


def _row(file: EngineFile, reason: str | None) -> dict[str, Any]:
    record = file.record
    return {
        "file": file.path.name, "runs": reason is None, "reason": reason,
        "engine": record.engine, "dtype": record.dtype, "head": record.head,
        "compute_capabilities": list(record.compute_capabilities), "hardware_compatible": record.hardware_compatible,
        "built_by": f"{record.flavour} {record.version}", "version_compatible": record.version_compatible,
        "os": record.os, "machine": record.machine, "documents": _span(record, 0), "tokens": _span(record, 1),
        "bytes": record.size, "stripped": record.stripped, "decomposable": list(record.decomposable),
        "built_in_seconds": record.seconds,
    }  # fmt: skip


def _span(record: EngineRecord, axis: int) -> list[int]:
    segment = record.profiles[0][SEGMENT]
    return [segment["min"][axis], segment["max"][axis]]


def engine_files_table(rows: list[dict[str, Any]]) -> Table:
    """The files with what each is for; why those do not run that do not is written below."""
    table = Table(title="engine files", title_justify="left", caption_justify="left")
    for name in ("file", "dtype", "head", "GPUs", "built by", "takes", "runs"):
        table.add_column(name)
    for row in rows:
        name = textwrap.fill(printable(row["file"]), NAME_WIDTH)
        runs = "yes" if row["runs"] else "no"
        if "engine" not in row:  # its record cannot be believed
            table.add_row(name, *["?"] * 5, runs)
            continue
        takes = "{}-{} x\n{}-{}".format(*row["documents"], *row["tokens"])
        table.add_row(name, row["dtype"], row["head"], _gpus(row), _built_by(row), takes, runs)
    shared: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"] is not None:
            shared.setdefault(row["reason"], []).append(row["file"])
    lines = ["takes: documents x tokens of each"]
    lines += [f"{', '.join(names)}: {reason}" for reason, names in shared.items()]
    table.caption = "\n".join(map(printable, lines))
    return table


def _gpus(row: dict[str, Any]) -> str:
    also = [] if row["hardware_compatible"] == "none" else [row["hardware_compatible"]]
    return "\n".join([dotted(row["compute_capabilities"], "\n"), *also])


def _built_by(row: dict[str, Any]) -> str:
    return "\n".join([*row["built_by"].split(), *(name for name in ("version_compatible", "stripped") if row[name])])


def providers_json(found: tuple[Provider, ...]) -> dict[str, Any]:
    return {p.name: {"found": p.found, "reason": p.reason, "ever_run_by_rmt_trt": False} for p in found}


def providers_table(found: tuple[Provider, ...]) -> Table:
    table = Table(
        title="ONNX Runtime's TensorRT providers", title_justify="left",
        caption="detected only: rmt-trt does not use them, and never ran them", caption_justify="left",
    )  # fmt: skip
    for name in ("provider", "found", "why it cannot start here"):
        table.add_column(name)
    for provider in found:
        table.add_row(provider.title, "yes" if provider.found else "no", printable(provider.reason or ""))
    return table
