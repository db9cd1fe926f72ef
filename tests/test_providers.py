"""ONNX Runtime's TensorRT providers are found or not, with what speaks against them; they are never started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import tensorrt_rtx
from engine_records import Facts, on_machine, record_of, write_engine

from rmt_trt.commands import info
from rmt_trt.errors import EngineError
from rmt_trt.runtime import machine
from rmt_trt.runtime import providers as module
from rmt_trt.runtime.providers import LIBRARY, NV_RTX, PLUGIN, TENSORRT, linked_tensorrt, providers

RTX_KINDS = "7.5, 8.0, 8.6, 8.9, 12.0, 12.1"


def machine_with(folder: Path, *names: str, linked: int | None = 10, **facts: Any) -> Facts:
    """A machine whose ONNX Runtime has these providers, that for TensorRT linked with one of its major versions."""
    found = Facts(**facts)
    (folder / "capi").mkdir(exist_ok=True)
    if linked is not None:
        (folder / "capi" / LIBRARY).write_bytes(b"\x7fELF\0libcudart.so.13\0libnvinfer.so.%d\0" % linked)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a provider was started")

    found.install(
        "onnxruntime", "1.31.1", __file__=str(folder / "__init__.py"), get_available_providers=lambda: list(names),
        InferenceSession=never, register_execution_provider_library=never,
    )  # fmt: skip
    return found


def install_rtx(facts: Facts) -> None:
    facts.install("tensorrt_rtx", "1.7.1.116", ComputeCapability=tensorrt_rtx.ComputeCapability)


def asked(facts: Facts, name: str) -> tuple[bool, str | None]:
    with on_machine(facts):
        (provider,) = (found for found in providers(0) if found.name == name)
    return provider.found, provider.reason


def test_both_providers_are_known_to_the_installed_onnxruntime() -> None:
    assert {TENSORRT, NV_RTX} <= set(onnxruntime.get_all_providers())


def test_without_onnxruntime_neither_is_found(tmp_path: Path) -> None:
    for name in (TENSORRT, NV_RTX):
        assert asked(Facts(), name) == (False, "it needs the Python package 'onnxruntime': pip install 'rmt-trt[gpu]'")


def test_a_build_without_a_provider_says_which_has_it(tmp_path: Path) -> None:
    facts = machine_with(tmp_path, "CPUExecutionProvider")
    found, reason = asked(facts, TENSORRT)
    assert not found
    assert reason is not None
    assert reason.startswith(
        "the installed onnxruntime 1.31.1 has no such provider. It is in the other build: pip uninstall"
    )
    found, reason = asked(facts, NV_RTX)
    assert not found
    assert reason is not None
    assert reason.endswith("its plugin is not installed: pip install onnxruntime-ep-nv-tensorrt-rtx")


@pytest.mark.parametrize("name", [TENSORRT, NV_RTX])
def test_a_provider_that_is_found_needs_a_gpu(tmp_path: Path, name: str) -> None:
    facts = machine_with(tmp_path, name, gpu="there is no usable CUDA driver")
    assert asked(facts, name) == (True, "there is no usable CUDA driver")
    assert facts.loaded == ["onnxruntime"]


def test_the_tensorrt_provider_needs_the_version_that_it_was_linked_with(tmp_path: Path) -> None:
    facts = machine_with(tmp_path, TENSORRT)
    assert asked(facts, TENSORRT) == (
        True, "it needs TensorRT 10, which is not installed: pip install 'tensorrt==10.*'",
    )  # fmt: skip
    facts.install("tensorrt", "11.4.0.106")
    assert asked(facts, TENSORRT) == (
        True, "it needs TensorRT 10, and tensorrt 11.4.0.106 is installed. Install the other: pip install 'tensorrt==10.*'",
    )  # fmt: skip
    facts.install("tensorrt", "10.16.1.11")
    assert asked(facts, TENSORRT) == (True, None)
    facts.driver = (12, 4)
    assert "tensorrt is here for CUDA 13, and the driver runs CUDA 12.4" in (asked(facts, TENSORRT)[1] or "")


def test_of_a_provider_that_does_not_say_its_version_any_tensorrt_is_taken(tmp_path: Path) -> None:
    facts = machine_with(tmp_path, TENSORRT, linked=None)
    assert asked(facts, TENSORRT) == (True, "it needs the Python package 'tensorrt': pip install 'rmt-trt[tensorrt]'")
    facts.install("tensorrt", "11.4.0.106")
    assert asked(facts, TENSORRT) == (True, None)


@pytest.mark.parametrize("how", ["built in", "plugin"])
def test_the_rtx_provider_is_built_in_or_a_plugin_and_keeps_the_rules_of_its_engine(tmp_path: Path, how: str) -> None:
    facts = machine_with(tmp_path, *([NV_RTX] if how == "built in" else []))
    if how == "plugin":
        facts.install(PLUGIN, "0.4.0")
    assert asked(facts, NV_RTX) == (True, None)
    install_rtx(facts)
    assert asked(facts, NV_RTX) == (True, None)
    facts.capability = 90
    for _ in range(2):
        assert asked(facts, NV_RTX) == (
            True,
            f"TensorRT-RTX does not run on compute capability 9.0, which GPU 0 has; it runs on {RTX_KINDS}",
        )
        facts.packages.pop("tensorrt_rtx", None)
    facts.capability, facts.driver = 89, (12, 9)
    assert f"{PLUGIN} is here for CUDA 13, and the driver runs CUDA 12.9" in (asked(facts, NV_RTX)[1] or "")


@pytest.mark.parametrize("name", [TENSORRT, NV_RTX])
def test_a_driver_that_does_not_answer_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def lost(*args: Any) -> Any:
        raise EngineError("the driver is lost")

    facts = machine_with(tmp_path, TENSORRT, NV_RTX)
    facts.install("tensorrt", "10.16.1.11")
    with on_machine(facts), pytest.MonkeyPatch.context() as inside:
        inside.setattr(machine, "driver_cuda", lost)
        inside.setattr(machine, "capability", lost)
        assert {p.name: p.reason for p in providers(0)}[name] == "the driver is lost"


@pytest.mark.parametrize(
    ("content", "version"),
    [
        (b"..libnvinfer.so.10\0..", 10), (b"libnvinfer.so.11\0", 11), (b"libnvinfer_plugin.so.10\0", None),
        (b"libnvinfer.so.10.1\0", None), (b"", None),
    ],
)  # fmt: skip
def test_the_linked_version_is_read_from_the_file(tmp_path: Path, content: bytes, version: int | None) -> None:
    (tmp_path / "lib.so").write_bytes(content)
    assert linked_tensorrt(tmp_path / "lib.so") == version


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: _large(path)])
def test_a_file_that_is_no_library_says_nothing(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "lib.so")
    assert linked_tensorrt(tmp_path / "lib.so") is None


def _large(path: Path) -> None:
    path.write_bytes(b"libnvinfer.so.10\0")
    with path.open("ab") as file:
        file.truncate(module.LIBRARY_LIMIT + 1)


def test_rmt_info_shows_them_as_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_engine(tmp_path, record_of())
    monkeypatch.setenv("COLUMNS", "200")

    def shown(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rmt-info", str(path), *options])
        with pytest.raises(SystemExit):
            info.main()
        return capsys.readouterr().out

    with on_machine(machine_with(tmp_path, TENSORRT, gpu="no driver")):
        text, values = shown(), json.loads(shown("--json"))["providers"]
    assert values[TENSORRT] == {"found": True, "reason": "no driver", "ever_run_by_rmt_trt": False}
    assert values[NV_RTX]["found"] is False
    assert "detected only: rmt-trt does not use them, and never ran them" in text
    assert "NV TensorRT-RTX" in text
