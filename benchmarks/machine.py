"""What a benchmark runs on: names and versions, and the meters of memory and energy."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import rmt_trt
from rmt_trt.errors import EngineError

INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "cuda-core", "onnx", "triton", "numpy")


def require_device(device: int) -> None:
    """Errors: EngineError, when PyTorch, in which the peers and meters are written, sees no such GPU."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device >= found:
        raise EngineError(
            f"rmt-bench is asked for GPU {device}, and PyTorch {torch.__version__} sees {found} here. Measure on the CPU with "
            f"--engine cpu, or install a PyTorch that is built for this GPU"
        )


def describe(device: int | None) -> dict[str, Any]:
    """Names and versions. device: GPU index, or None for a CPU run."""
    found: dict[str, Any] = {
        "rmt-trt": rmt_trt.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {},
    }
    for name in LIBRARIES:
        try:
            found["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device is not None:
        import torch

        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "driver": _driver(),
        }
    return found


def _cpu_name() -> str:
    names = [value for key, value in _cpu_facts() if key == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """Sets of instructions of the processor that products in less than 32 bits may use."""
    flags = next((value.split() for key, value in _cpu_facts() if key in ("flags", "Features")), [])
    return [name for name in INSTRUCTIONS if name in flags]


def _cpu_facts() -> list[tuple[str, str]]:
    """Lines of /proc/cpuinfo as key and value; nothing where the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    parts = [line.partition(":") for line in lines]
    return [(key.strip(), value.strip()) for key, _, value in parts]


def _driver() -> str | None:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        version = nvml.nvmlSystemGetDriverVersion()
    except Exception:  # the library or the driver's part of it is missing: a name less in the report
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


class Meters:
    """Memory of the process and of the device, and the device's energy. device: GPU index, or None for a CPU run."""

    def __init__(self, device: int | None) -> None:
        self.device = device
        self._nvml: Any = None
        if device is None:
            return
        import torch

        torch.cuda.set_device(device)
        torch.zeros(1, device="cuda")  # the context, which all engines of the process share, is there from now on
        try:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(name)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except Exception:  # no library, or a device without the counter: energy is then not reported
            self._nvml = None

    def device_bytes(self) -> int | None:
        """Device memory in use, by all processes; None without a GPU."""
        if self.device is None:
            return None
        import torch

        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)

    def host_bytes(self) -> int:
        """Resident memory of this process."""
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        return 0

    def joules(self) -> float | None:
        """The device's energy counter; None where there is none."""
        if self._nvml is None:
            return None
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def release(self) -> None:
        """Gives back what PyTorch keeps for itself, so that the next measurement begins alike."""
        if self.device is None:
            return
        import gc

        import torch

        torch._dynamo.reset()  # compiled steps keep their buffers until then
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
