"""Engine files that are cut or altered, and machines that cannot run them: each is refused in words of its own."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx
from engine_records import (
    DATA,
    Facts,
    Judge,
    bundle_of,
    on_machine,
    record_of,
    rtx_machine,
    rtx_names,
    tensorrt_machine,
    write_engine,
)

from rmt_trt import ContractError
from rmt_trt.commands.engines_table import gpu_facts
from rmt_trt.engine_record import EngineRecord
from rmt_trt.errors import EngineError, FormatError
from rmt_trt.runtime import cuda, machine
from rmt_trt.runtime.engine_files import engine_files, read_checked, refusal, refusal_of, runnable
from rmt_trt.runtime.engines import choose
from rmt_trt.runtime.providers import providers
from rmt_trt.runtime.source import open_source

NAME = "tensorrt-rtx-fp16-all-sm89-b8"


# The engine file itself.


def test_a_truncated_engine(tmp_path: Path) -> None:
    path = write_engine(tmp_path, record_of(), DATA[:-1])
    (file,) = engine_files(open_source(path))
    message = (
        rf"the file has {len(DATA) - 1} bytes, and its record says {len(DATA)}: it was cut or altered\. Copy it again"
    )
    with on_machine(rtx_machine()), pytest.raises(EngineError, match=rf"{NAME}\.engine: {message}"):
        runnable(open_source(path), "tensorrt-rtx", None, 0)
    with pytest.raises(FormatError, match=rf"{NAME}\.engine: {message}"):
        read_checked(file)


def test_an_altered_engine_is_not_loaded(tmp_path: Path) -> None:
    path = write_engine(tmp_path, record_of(), DATA[:-1] + b"!")
    with on_machine(rtx_machine()):
        found = runnable(open_source(path), "tensorrt-rtx", None, 0)
    with pytest.raises(
        FormatError, match=rf"{NAME}\.engine is not the engine that its record describes \(SHA-256 differs\).*Copy both"
    ):
        read_checked(found["all"])


@pytest.mark.parametrize("kind", ["gone", "folder"])
def test_an_engine_that_went_away(tmp_path: Path, kind: str) -> None:
    path = write_engine(tmp_path, record_of())
    (file,) = engine_files(open_source(path))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    with pytest.raises(FormatError, match=rf"{NAME}\.engine: the file is missing, or no regular file\. Copy it again"):
        read_checked(file)


# Engines of another machine.


def reason(folder: Path, record: EngineRecord, facts: Facts) -> str:
    """What a machine says against an engine by itself."""
    (file,) = engine_files(open_source(write_engine(folder, record)))
    with on_machine(facts):
        return refusal_of(file, 0) or ""


def test_an_engine_of_another_system(tmp_path: Path) -> None:
    record = record_of(engine="tensorrt", os="Windows", machine="AMD64")
    assert reason(tmp_path, record, tensorrt_machine()) == (
        "it was built on Windows AMD64, and this machine is Linux x86_64: engines do not run across. Build it on such a "
        "machine"
    )


def test_an_engine_for_another_gpu_and_what_to_build(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, record_of(capabilities=(86, 120)))
    with on_machine(rtx_machine()):
        told = refusal(open_source(bundle), "tensorrt-rtx", None, 0)
    assert told == (
        f"tensorrt-rtx-fp16-all-sm86-sm120-b8.engine: it was built for compute capability 8.6 or 12.0; GPU 0 has 8.9. To "
        f"build one for GPU 0: rmt-build {bundle} --engine tensorrt-rtx --dtype fp16 --compute-capability 89"
    )


def test_tensorrt_rtx_does_not_run_on_every_gpu(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, record_of())
    with on_machine(rtx_machine(capability=90)) as facts:
        told = refusal(open_source(bundle), "tensorrt-rtx", "fp16", 0) or ""
        del facts.packages["tensorrt_rtx"]
        assert refusal(open_source(bundle), "tensorrt-rtx", "fp16", 0) == told
    assert "8.9; GPU 0 has 9.0. TensorRT-RTX does not run on compute capability 9.0, which GPU 0 has" in told
    assert told.endswith(f"rmt-build {bundle} --engine tensorrt --dtype fp16")


@pytest.mark.parametrize("compatible", [False, True])
def test_a_package_that_is_not_installed(tmp_path: Path, compatible: bool) -> None:
    told = reason(tmp_path, record_of(engine="tensorrt", version_compatible=compatible), rtx_machine())
    assert told.startswith("it needs the Python package 'tensorrt': pip install 'rmt-trt[tensorrt]'")
    assert ("rmt-trt[tensorrt-lean] runs it too" in told) == compatible
    told = reason(tmp_path, record_of(), tensorrt_machine())
    assert told == "it needs the Python package 'tensorrt_rtx': pip install 'rmt-trt[tensorrt-rtx]'"


@pytest.mark.parametrize(
    ("record", "package", "here", "message"),
    [
        ({"engine": "tensorrt"}, "tensorrt", "11.3.0.9", "tensorrt 11.4.0.106 built it, and tensorrt 11.3.0.9 is installed here; TensorRT runs an engine only in the version that built it. Install that: pip install 'tensorrt==11.4.0.106', or build it again here"),
        ({}, "tensorrt_rtx", "1.8.0.1", "tensorrt_rtx 1.7.1.116 built it, and tensorrt_rtx 1.8.0.1 is installed here; TensorRT-RTX runs an engine only in the release that built it. Install that: pip install 'tensorrt-rtx==1.7.1.116', or"),
        ({"engine": "tensorrt", "version_compatible": True}, "tensorrt", "10.16.1.11", "a version-compatible engine runs in later versions of the same major one, and those of 10 in 11. Install such a one: pip install 'tensorrt==11.4.0.106'"),
        ({"engine": "tensorrt"}, "tensorrt_lean", "11.4.0.106", "tensorrt_lean 11.4.0.106 runs version-compatible engines only, and it is not one. Install the whole of TensorRT, pip install 'tensorrt==11.4.0.106', or build it with --version-compatible"),
        ({"engine": "tensorrt"}, "tensorrt_dispatch", "11.4.0.106", "tensorrt_dispatch 11.4.0.106 runs version-compatible engines only, and it is not one"),
    ],
)  # fmt: skip
def test_a_package_of_another_version(tmp_path: Path, record: Any, package: str, here: str, message: str) -> None:
    facts = Facts()
    facts.install(package, here)
    assert message in reason(tmp_path, record_of(**record), facts)


def test_every_package_that_is_there_gives_its_reason(tmp_path: Path) -> None:
    facts = tensorrt_machine()
    facts.install("tensorrt_lean", "11.4.0.106")
    told = reason(tmp_path, record_of(engine="tensorrt", version="11.5.0.1"), facts)
    assert "tensorrt 11.5.0.1 built it, and tensorrt 11.4.0.106 is installed here" in told
    assert "; tensorrt_lean 11.4.0.106 runs version-compatible engines only" in told


def test_an_engine_without_weights(tmp_path: Path) -> None:
    told = reason(tmp_path, record_of(stripped=True), rtx_machine())
    assert (
        told
        == "it holds no weights, and this version of rmt-trt does not put them back. Build it without --strip-weights"
    )


def test_a_machine_without_a_driver_says_what_the_engine_needs(tmp_path: Path) -> None:
    told = reason(tmp_path, record_of(capabilities=(89, 120)), rtx_machine(gpu="there is no usable CUDA driver"))
    assert told == (
        "there is no usable CUDA driver. It needs a GPU of compute capability 8.9 or 12.0, and tensorrt_rtx 1.7.1.116"
    )
    record = record_of(engine="tensorrt", hardware_compatible="ampere_plus", version_compatible=True)
    told = reason(tmp_path, record, rtx_machine(gpu="no driver"))
    assert (
        told == "no driver. It needs a GPU of compute capability 8.0 or higher, and tensorrt 11.4.0.106 or a later one"
    )


def test_no_build_is_advised_where_the_gpu_is_what_is_missing(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, record_of(name="x"), record_of(name="y"))
    with on_machine(rtx_machine(gpu="no driver")):
        told = refusal(open_source(bundle), "tensorrt-rtx", None, 0)
    assert told == (
        "x.engine, y.engine: no driver. It needs a GPU of compute capability 8.9, and tensorrt_rtx 1.7.1.116"
    )


@pytest.mark.parametrize(("wanted", "newer"), [(13, " to 580 or newer"), (99, "")])
def test_a_driver_that_is_too_old_for_the_package(tmp_path: Path, wanted: int, newer: str) -> None:
    told = reason(tmp_path, record_of(), rtx_machine(driver=(12, 9), cuda=wanted))
    assert told == (
        f"tensorrt_rtx is here for CUDA {wanted}, and the driver runs CUDA 12.9 at the most: it is too old. Update the "
        f"NVIDIA driver{newer}"
    )
    assert reason(tmp_path, record_of(), rtx_machine(driver=(13, 0), cuda=12)) == ""
    assert reason(tmp_path, record_of(), rtx_machine(driver=(12, 0), cuda=None)) == ""


@pytest.mark.parametrize(
    ("found", "messages"),
    [
        (("OLD_CUDA_DRIVER",), ["OLD_CUDA_DRIVER, the driver is too old for it: update the NVIDIA driver"]),
        (
            ("UNSUPPORTED_CC", "INSUFFICIENT_GPU_MEMORY"),
            ["UNSUPPORTED_CC, it was not built for this GPU", "end what else"],
        ),
        ((), ["it gives no reason"]),
    ],
)
def test_what_tensorrt_rtx_says_of_an_engine_is_passed_on(
    tmp_path: Path, found: tuple[str, ...], messages: list[str]
) -> None:
    facts = Facts()
    facts.install("tensorrt_rtx", "1.7.1.116", **rtx_names(Judge("INVALID", *found)))
    told = reason(tmp_path, record_of(), facts)
    assert told.startswith("TensorRT-RTX 1.7.1.116 says that it is not valid here: ")
    for message in messages:
        assert message in told


def test_the_real_tensorrt_rtx_is_shown_a_file_that_is_no_engine(tmp_path: Path) -> None:
    facts = Facts(packages={"tensorrt_rtx": tensorrt_rtx})
    told = reason(tmp_path, record_of(version=tensorrt_rtx.__version__), facts)
    assert told.endswith("MALFORMED_ENGINE, it is no engine of TensorRT-RTX: build the engine again")


def test_every_diagnosis_of_the_real_tensorrt_rtx_has_its_advice(tmp_path: Path) -> None:
    for name in tensorrt_rtx.EngineInvalidityDiagnostics.__members__:
        facts = Facts()
        facts.install("tensorrt_rtx", "1.7.1.116", **rtx_names(Judge("INVALID", name)))
        assert re.search(rf"not valid here: {name}, .+: .+", reason(tmp_path, record_of(), facts))


def test_a_library_that_cannot_look_at_an_engine(tmp_path: Path) -> None:
    def fails(logger: Any) -> Any:
        raise RuntimeError("out\nof order")

    facts = Facts()
    facts.install("tensorrt_rtx", "1.7.1.116", **{**rtx_names(Judge("VALID")), "Runtime": fails})
    assert reason(tmp_path, record_of(), facts) == "TensorRT-RTX 1.7.1.116 could not look at it: out of order"


# What a source lacks altogether.


def test_an_engine_for_another_flavour(tmp_path: Path) -> None:
    source = open_source(write_engine(tmp_path, record_of()))
    with on_machine(tensorrt_machine()):
        told = refusal(source, "tensorrt", None, 0) or ""
    assert told.startswith(
        "it is an engine for 'tensorrt-rtx', built by tensorrt_rtx 1.7.1.116. To build one for GPU 0: "
    )
    assert told.endswith("rmt-build NAME.rmt --engine tensorrt --dtype fp16")


def test_a_dtype_that_no_engine_has(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, record_of(dtype="int8"), record_of(dtype="fp32"))
    with on_machine(rtx_machine()):
        told = refusal(open_source(bundle), "tensorrt-rtx", "bf16", 0) or ""
        assert told.startswith(
            "its engine files compute in fp32, int8, not in bf16. To build one for GPU 0: rmt-build "
        )
        assert told.endswith("--dtype bf16 --compute-capability 89")
    (tmp_path / "other").mkdir()
    bundle = bundle_of(tmp_path / "other", record_of(dtype="int8"))
    with on_machine(rtx_machine()):
        told = refusal(open_source(bundle), "tensorrt-rtx", None, 0) or ""
    assert told.startswith("its engine files compute in int8, which has to be asked for. ")


@pytest.mark.parametrize("gpu", [None, "no driver"])
def test_a_bundle_without_engines_says_what_to_build(tmp_path: Path, gpu: str | None) -> None:
    (tmp_path / "a folder").mkdir()
    bundle = bundle_of(tmp_path / "a folder")
    with on_machine(rtx_machine(gpu=gpu)):
        told = {engine: refusal(open_source(bundle), engine, None, 0) or "" for engine in ("tensorrt", "tensorrt-rtx")}
    for engine, line in told.items():
        assert line.startswith("the bundle has no engine file for it. To build one")
        command = shlex.split(line.partition(": ")[2])
        assert command[:6] == ["rmt-build", str(bundle), "--engine", engine, "--dtype", "fp16"]
    assert told["tensorrt-rtx"].endswith("--compute-capability 89" + ("" if gpu is None else ",120"))


def test_other_engines_refuse_an_engine_by_itself_in_words_of_their_own(tmp_path: Path) -> None:
    source = open_source(write_engine(tmp_path, record_of()))
    for engine, message in {
        "cpu": "it runs a graph, and this is a TensorRT engine by itself. Open the bundle",
        "torch": "it runs a checkpoint (model.pt), and this is a TensorRT engine",
        "cuda": "it runs a bundle's graphs for CUDA",
    }.items():
        with pytest.raises(EngineError, match=re.escape(message)):
            choose(source, engine, None, 0)


# The facts themselves.


@pytest.mark.parametrize("device", [1, 7])
def test_a_gpu_of_an_index_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: int) -> None:
    devices = SimpleNamespace(get_all_devices=lambda: [0])
    monkeypatch.setattr(machine, "require", lambda *asked: None)  # cuda.core need not be here
    monkeypatch.setattr(cuda, "library", lambda: SimpleNamespace(Device=devices))
    assert machine.gpu_refusal(0, "tensorrt", "it") is None
    told = machine.gpu_refusal(device, "tensorrt", "it")
    assert told == f"device {device} was asked for; the CUDA driver sees 1, numbered from 0"


def test_a_driver_that_does_not_answer_is_a_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may fall off between two questions."""

    class Device:
        def __init__(self, index: int) -> None:
            raise RuntimeError("CUDA_ERROR_UNKNOWN: who\nknows")

    monkeypatch.setattr(cuda, "library", lambda: SimpleNamespace(Device=Device))
    ask = machine.capability
    bundle = bundle_of(tmp_path, record_of(name="x"), record_of(engine="tensorrt", name="y"))
    with on_machine(rtx_machine()), pytest.MonkeyPatch.context() as inside:
        inside.setattr(machine, "capability", ask)
        told = {engine: refusal(open_source(bundle), engine, None, 0) or "" for engine in ("tensorrt", "tensorrt-rtx")}
        facts, found = gpu_facts(0), [provider.reason for provider in providers(0)]
    lost = "the compute capability of GPU 0 cannot be read. The driver says: CUDA_ERROR_UNKNOWN: who knows"
    assert told["tensorrt-rtx"] == f"x.engine: {lost}. What to build is not known: {lost}"
    assert told["tensorrt"].startswith(f"y.engine: {lost}. To build one for GPU 0: ")
    assert facts == {"found": False, "reason": lost}
    assert found


def test_the_library_that_looks_for_a_gpu_is_named_with_the_extra_of_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    told = machine.gpu_refusal(0, "tensorrt-rtx", "it")
    assert told is not None
    assert told.startswith("it needs the Python package 'cuda.core'")
    assert told.endswith("pip install 'rmt-trt[tensorrt-rtx]'")


def test_a_package_whose_libraries_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_broken.py").write_text("raise OSError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert machine.installed("tensorrt_broken")
    with pytest.raises(
        EngineError, match=r"'tensorrt_broken', whose libraries .*libnvinfer.*--force-reinstall 'rmt-trt\[x\]'"
    ):
        machine.module("tensorrt_broken", "x", "it")


def test_the_cuda_of_a_package_stands_in_the_name_of_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"a": ["tensorrt_cu13"], "b": ["tensorrt-lean-cu12"], "c": ["tensorrt"], "d": ["cuda_core"]}
    monkeypatch.setattr(machine, "_distributions", lambda: known)
    assert [machine.built_for_cuda(name) for name in "abcde"] == [13, 12, None, None, None]


def test_an_engine_name_that_is_none_is_the_callers_mistake(tmp_path: Path) -> None:
    source = open_source(write_engine(tmp_path, record_of()))
    with pytest.raises(ContractError, match="engine is 'trt'; expected 'auto' or one of"):
        choose(source, "trt", None, 0)
