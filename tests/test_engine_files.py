"""Which engine file is chosen where several run, and what is shown of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from engine_records import (
    CLASSIFIER,
    DATA,
    SPEC,
    Facts,
    Judge,
    S,
    add_engines,
    bundle_of,
    initial_of,
    on_machine,
    record_of,
    rtx_machine,
    rtx_names,
    tensorrt_machine,
    write_engine,
)
from spoil import DOCUMENT, copy_bundle, open_and_run

from rmt_trt import RMTRuntime
from rmt_trt.bundle import Bundle
from rmt_trt.commands import info
from rmt_trt.engine_record import EngineRecord
from rmt_trt.errors import EngineError
from rmt_trt.runtime import machine
from rmt_trt.runtime.engine_files import engine_files, package_of, read_checked, refusal, refusal_of, runnable
from rmt_trt.runtime.source import open_source


@pytest.fixture
def trt() -> Iterator[Facts]:
    with on_machine(tensorrt_machine()) as facts:
        yield facts


@pytest.fixture
def rtx() -> Iterator[Facts]:
    with on_machine(rtx_machine()) as facts:
        yield facts


def chosen(bundle: Path, engine: str = "tensorrt", dtype: str | None = None) -> dict[str, str]:
    """The names of the files that are run, by head."""
    found = runnable(open_source(bundle), engine, dtype, 0)
    return {head: file.path.name.removesuffix(".engine") for head, file in found.items()}


def of_trt(name: str, **fields: Any) -> EngineRecord:
    return record_of(engine="tensorrt", name=name, **fields)


@pytest.mark.usefixtures("trt")
def test_the_dtype_comes_first_and_only_an_asked_for_one_is_quantized(tmp_path: Path) -> None:
    kinds = ("fp32", "bf16", "int8", "fp8")
    bundle = bundle_of(tmp_path, *(of_trt(kind, dtype=kind) for kind in kinds))
    assert chosen(bundle) == {"all": "bf16"}
    add_engines(bundle, of_trt("fp16", dtype="fp16"))
    assert chosen(bundle) == {"all": "fp16"}
    for kind in kinds:
        assert chosen(bundle, dtype=kind) == {"all": kind}


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({}, {"hardware_compatible": "same_compute_capability", "batch": 64}),
        ({"hardware_compatible": "same_compute_capability"}, {"hardware_compatible": "ampere_plus", "batch": 64}),
        ({}, {"version_compatible": True, "batch": 64}),
        ({"batch": 64, "capabilities": (80, 89)}, {"batch": 8}),
        ({}, {"capabilities": (80, 89)}),
        ({"dtype": "fp16", "hardware_compatible": "ampere_plus", "version_compatible": True}, {"dtype": "fp32"}),
    ],
)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_a_dtype_the_narrowest_fit_is_taken(
    tmp_path: Path, better: dict[str, Any], worse: dict[str, Any], order: str
) -> None:
    names = dict(zip(("better", "worse"), order, strict=True))  # the names decide nothing
    bundle = bundle_of(tmp_path, of_trt(names["better"], **better), of_trt(names["worse"], **worse))
    assert chosen(bundle) == {"all": names["better"]}


@pytest.mark.usefixtures("trt")
def test_the_engine_without_logits_goes_with_the_one_that_has_them(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, of_trt("all"), of_trt("narrow", head="none", batch=4))
    assert chosen(bundle) == {"all": "all"}
    add_engines(bundle, of_trt("other", head="none", dtype="fp32"))
    assert chosen(bundle) == {"all": "all"}
    add_engines(bundle, of_trt("none", head="none"))
    assert chosen(bundle) == {"all": "all", "none": "none"}
    assert set(chosen(bundle, dtype="fp16")) == {"all", "none"}


@pytest.mark.usefixtures("trt")
def test_an_engine_without_logits_alone_answers_nothing(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, of_trt("none", head="none"))
    with pytest.raises(
        EngineError, match=r"none\.engine: it gives no logits \(head 'none'\)\. To build one .*rmt-build"
    ):
        chosen(bundle)


@pytest.mark.usefixtures("trt")
def test_what_runs_elsewhere_is_passed_over_without_a_word(tmp_path: Path) -> None:
    bundle = bundle_of(
        tmp_path, of_trt("elsewhere", capabilities=(90,)), of_trt("older", version="10.16.1.11"),
        record_of(name="rtx"), of_trt("here", dtype="fp32"),
    )  # fmt: skip
    assert chosen(bundle) == {"all": "here"}
    assert refusal(open_source(bundle), "tensorrt", None, 0) is None


def test_files_that_the_manifest_does_not_name_are_ignored(tmp_path: Path, trt: Facts) -> None:
    bundle = bundle_of(tmp_path, of_trt("b"), of_trt("a"))
    write_engine(bundle / "engines", of_trt("stranger"))
    assert [file.path.name for file in engine_files(open_source(bundle))] == ["a.engine", "b.engine"]


@pytest.mark.parametrize(
    ("engine", "compatible", "built", "here", "runs"),
    [
        ("tensorrt", False, "11.4.0.106", "11.4.0.106", True),
        ("tensorrt", False, "10.14.1.48.post1", "10.14.1.48", True),
        ("tensorrt", False, "11.4.0.106", "11.4.0.107", False),
        ("tensorrt", False, "11.4.0.106", "11.5.0.1", False),
        ("tensorrt", True, "11.4.0.106", "11.5.0.1", True),
        ("tensorrt", True, "11.4.0.106", "11.3.0.200", False),
        ("tensorrt", True, "10.16.1.11", "11.4.0.106", True),
        ("tensorrt", True, "11.4.0.106", "10.16.1.11", False),
        ("tensorrt", True, "11.4.0.106", "12.0.0.1", False),
        ("tensorrt", True, "8.6.1.6", "11.4.0.106", False),
        ("tensorrt-rtx", False, "1.7.1.116", "1.7.1.116", True),
        ("tensorrt-rtx", False, "1.7.1.116", "1.7.2.1", False),
        ("tensorrt-rtx", False, "1.7.1.116", "1.8.0.1", False),
    ],
)  # fmt: skip
def test_which_version_runs_which_engine(
    tmp_path: Path, engine: str, compatible: bool, built: str, here: str, runs: bool
) -> None:
    record = record_of(engine=engine, name="x", version=built, version_compatible=compatible)
    facts = Facts()
    if engine == "tensorrt":
        facts.install("tensorrt", here)
    else:
        facts.install("tensorrt_rtx", here, **rtx_names(Judge("VALID")))
    (file,) = engine_files(open_source(write_engine(tmp_path, record)))
    with on_machine(facts):
        assert (refusal_of(file, 0) is None) == runs


@pytest.mark.parametrize("module", ["tensorrt_lean", "tensorrt_dispatch"])
def test_a_small_runtime_runs_a_version_compatible_engine_where_the_whole_is_too_old(
    tmp_path: Path, module: str
) -> None:
    (file,) = engine_files(open_source(write_engine(tmp_path, of_trt("x", version_compatible=True))))
    facts = Facts()
    facts.install(module, "11.4.0.106")
    with on_machine(facts):
        assert refusal_of(file, 0) is None
        assert package_of(file).module == module
        facts.install("tensorrt", "10.16.1.11")
        assert package_of(file).module == module
        facts.install("tensorrt", "11.5.0.1")
        assert package_of(file).module == "tensorrt"


@pytest.mark.parametrize(
    ("level", "capability", "runs"),
    [
        ("none", 89, True), ("none", 86, False), ("none", 120, False), ("same_compute_capability", 89, True),
        ("same_compute_capability", 90, False), ("ampere_plus", 80, True), ("ampere_plus", 120, True),
        ("ampere_plus", 75, False),
    ],
)  # fmt: skip
def test_which_gpu_runs_which_engine(tmp_path: Path, level: str, capability: int, runs: bool) -> None:
    (file,) = engine_files(open_source(write_engine(tmp_path, of_trt("x", hardware_compatible=level))))
    with on_machine(tensorrt_machine(capability=capability)):
        assert (refusal_of(file, 0) is None) == runs


@pytest.mark.parametrize(
    ("engine", "built", "here", "runs"),
    [
        ("tensorrt-rtx", ("Linux", "x86_64"), ("Windows", "x86_64"), True),
        ("tensorrt-rtx", ("Windows", "AMD64"), ("Linux", "x86_64"), True),
        ("tensorrt-rtx", ("Linux", "x86_64"), ("Linux", "aarch64"), False),
        ("tensorrt", ("Linux", "x86_64"), ("Windows", "x86_64"), False),
        ("tensorrt", ("Linux", "aarch64"), ("Linux", "x86_64"), False),
    ],
)
def test_which_system_runs_which_engine(
    tmp_path: Path, engine: str, built: tuple[str, str], here: tuple[str, str], runs: bool
) -> None:
    record = record_of(engine=engine, name="x", os=built[0], machine=built[1])
    (file,) = engine_files(open_source(write_engine(tmp_path, record)))
    facts = (tensorrt_machine if engine == "tensorrt" else rtx_machine)(system=here)
    with on_machine(facts):
        assert (refusal_of(file, 0) is None) == runs


@pytest.mark.parametrize(("name", "here"), [("AMD64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")])
def test_a_processor_has_one_name_on_every_system(name: str, here: str) -> None:
    assert machine.machine_name(name) == here


@pytest.mark.parametrize("verdict", ["VALID", "SUBOPTIMAL"])
def test_tensorrt_rtx_is_shown_the_header_before_anything_is_loaded(tmp_path: Path, verdict: str) -> None:
    (file,) = engine_files(open_source(write_engine(tmp_path, record_of())))
    facts, judge = rtx_machine(), Judge(verdict)
    facts.install("tensorrt_rtx", "1.7.1.116", **rtx_names(judge))
    with on_machine(facts):
        assert refusal_of(file, 0) is None
    assert judge.headers == [DATA[:64]]


def test_without_a_gpu_no_library_of_tensorrt_is_loaded(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, record_of(), of_trt("x"))
    with on_machine(rtx_machine(gpu="no driver")) as facts:
        for engine in ("tensorrt", "tensorrt-rtx"):
            assert "no driver" in (refusal(open_source(bundle), engine, None, 0) or "")
    assert facts.loaded == []


def of_bert(**fields: Any) -> EngineRecord:
    """A record of an engine of the small BERT."""
    bundle = Bundle(models.made("bert").bundle)
    return record_of(bundle.spec, initial={"memory": bundle.initial()[0]}, **fields)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A bundle that runs, with an engine file that does not."""
    bundle = copy_bundle(tmp_path)
    add_engines(bundle, of_bert(capabilities=(89, 120)))
    return bundle


def test_without_a_gpu_a_bundle_runs_on_the_cpu_and_says_why_not_on_its_engines(bert: Path) -> None:
    with on_machine(Facts(gpu="there is no usable CUDA driver")), RMTRuntime(bert, threads=1) as runtime:
        found = runtime.run(DOCUMENT).logits
        assert runtime.engine == "cpu"
        assert runtime.refused["tensorrt-rtx"] == (
            "tensorrt-rtx-fp16-all-sm89-sm120-b8.engine: there is no usable CUDA driver. It needs a GPU of compute "
            "capability 8.9 or 12.0, and tensorrt_rtx 1.7.1.116"
        )
        assert runtime.refused["tensorrt"].startswith(
            "the bundle has no engine file for it. To build one, on a machine"
        )
    assert np.array_equal(found, open_and_run(models.made("bert").bundle).logits)


def test_an_engine_that_is_asked_for_is_never_replaced_by_another(bert: Path) -> None:
    path = write_engine(bert.parent, of_bert())
    with on_machine(Facts(gpu="there is no usable CUDA driver")):
        for source, engine in ((bert, "tensorrt-rtx"), (path, "tensorrt-rtx"), (path, "auto")):
            with pytest.raises(
                EngineError, match=r"8.*\.engine: there is no usable CUDA driver\. It needs a GPU of"
            ) as error:
                RMTRuntime(source, engine=engine)
            assert str(source) in str(error.value)


def test_a_process_that_sees_no_gpu_loads_no_library_of_tensorrt(bert: Path) -> None:
    program = (
        "import sys\nfrom rmt_trt import RMTRuntime\n"
        f"with RMTRuntime({str(bert)!r}, threads=1) as runtime:\n"
        "    print(runtime.engine, sorted(runtime.refused), [n for n in sys.modules if n.startswith('tensorrt')])"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=bert.parent, env=env, text=True, capture_output=True)
    assert (done.returncode, done.stdout.strip()) == (0, "cpu ['cuda', 'tensorrt', 'tensorrt-rtx'] []"), done.stderr


def test_an_engine_by_itself_brings_its_step_spec_and_its_initial_memory(tmp_path: Path, rtx: Facts) -> None:
    path = write_engine(tmp_path, record_of(CLASSIFIER, dtype="int8"))
    source = open_source(path)
    assert (source.kind, source.path, source.spec, source.tokenizer) == ("engine", path, CLASSIFIER, None)
    assert np.array_equal(source.initial[0], initial_of(CLASSIFIER)["memory"])
    (file,) = engine_files(source)
    assert runnable(source, "tensorrt-rtx", None, 0) == {"all": file}
    assert read_checked(file) == path


def test_an_engine_and_its_record_may_be_renamed_together(tmp_path: Path, rtx: Facts) -> None:
    path = write_engine(tmp_path, record_of())
    for suffix in (".engine", ".json"):
        path.with_suffix(suffix).rename(tmp_path / f"mine{suffix}")
    found = runnable(open_source(tmp_path / "mine.engine"), "tensorrt-rtx", None, 0)
    assert read_checked(found["all"]) == tmp_path / "mine.engine"


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("text", [[-1, -1], [-1, S]])
def test_an_engine_for_full_segments_alone_is_taken(tmp_path: Path, text: list[int]) -> None:
    record = record_of(CLASSIFIER)
    sizes = {**record.profiles[0], "segment": {"min": [1, S], "opt": [8, S], "max": [8, S]}}
    inputs = (record.inputs[0], {**record.inputs[1], "shape": text})
    path = write_engine(tmp_path, replace(record, profiles=(sizes,), inputs=inputs))
    assert list(runnable(open_source(path), "tensorrt-rtx", None, 0)) == ["all"]


def shown(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["rmt-info", str(path), *options])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        info.main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("alone", [False, True])
def test_rmt_info_lists_engine_files_and_why_they_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alone: bool
) -> None:
    here, elsewhere = record_of(CLASSIFIER, batch=4), record_of(CLASSIFIER, capabilities=(86, 120), dtype="fp32")
    path = write_engine(tmp_path, here) if alone else bundle_of(tmp_path, here, elsewhere, spec=CLASSIFIER)
    with on_machine(rtx_machine()):
        text = shown(path, monkeypatch, capsys)
        rows = json.loads(shown(path, monkeypatch, capsys, "--json"))
    assert "GPU 0: NVIDIA Test, compute capability 8.9, driver for CUDA 13.0" in text
    assert rows["gpu"] == {"found": True, "name": "NVIDIA Test", "compute_capability": 89, "driver_cuda": "13.0"}
    first, *others = rows["engine_files"]
    assert (first["file"], first["runs"], first["reason"]) == ("tensorrt-rtx-fp16-all-sm89-b4.engine", True, None)
    assert (first["documents"], first["tokens"], first["head"]) == ([1, 4], [1, S], "all")
    assert (first["built_by"], first["compute_capabilities"]) == ("tensorrt_rtx 1.7.1.116", [89])
    assert len(others) == (0 if alone else 1)
    for row in others:
        assert not row["runs"]
        assert row["reason"] == "it was built for compute capability 8.6 or 12.0; GPU 0 has 8.9"
        assert f"{row['file']}: {row['reason']}" in " ".join(text.split())
    for part in ("sm89-b4.engine", "fp16", "1.7.1.116", "1-4 x"):
        assert part in text


def test_rmt_info_says_what_engines_need_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of(tmp_path, record_of(capabilities=(89, 120)), of_trt("x", version_compatible=True))
    with on_machine(Facts(gpu="the driver is on holiday")):
        text = " ".join(shown(bundle, monkeypatch, capsys).split())
    assert "GPU 0: none that can be used: the driver is on holiday" in text
    for needs in (
        "a GPU of compute capability 8.9 or 12.0, and tensorrt_rtx 1.7.1.116",
        "a GPU of compute capability 8.9, and tensorrt 11.4.0.106 or a later one",
    ):
        assert f"the driver is on holiday. It needs {needs}" in text


def test_rmt_info_shows_an_engine_whose_record_cannot_be_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of(tmp_path, record_of(SPEC.with_(segment_length=13), name="other"), record_of(name="right"))
    with on_machine(rtx_machine()):
        text = " ".join(shown(bundle, monkeypatch, capsys).split())
        rows = json.loads(shown(bundle, monkeypatch, capsys, "--json"))["engine_files"]
    assert [(row["file"], row["runs"]) for row in rows] == [("other.engine", False), ("right.engine", True)]
    assert "it is an engine of another model" in rows[0]["reason"]
    assert "other.engine: " in text
