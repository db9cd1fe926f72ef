"""Records of engines that are missing, damaged, altered or a stranger's: refused before anything in them is believed."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_records import (
    CLASSIFIER,
    DATA,
    SPEC,
    S,
    add_engines,
    bundle_of,
    initial_of,
    on_machine,
    record_of,
    rtx_machine,
    write_engine,
)
from spoil import alter, put

from rmt_trt import RMTRuntime
from rmt_trt.engine_check import RECORD_LIMIT, read_record
from rmt_trt.errors import EngineError, FormatError
from rmt_trt.initial_state import INITIAL_KEY, SPEC_KEY, to_metadata
from rmt_trt.runtime.engine_files import listed, runnable
from rmt_trt.runtime.source import open_source

NAME = "tensorrt-rtx-fp16-all-sm89-b8"
AGAIN = "Build the engine again with rmt-build"


def spoiled(folder: Path, change: Callable[[dict[str, Any]], object], spec: Any = CLASSIFIER) -> Path:
    """The path of a record in which something was changed, beside its engine file."""
    path = write_engine(folder, record_of(spec)).with_suffix(".json")
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


# The record beside an engine by itself.


def test_an_engine_without_its_record(tmp_path: Path) -> None:
    path = write_engine(tmp_path, record_of())
    path.with_suffix(".json").unlink()
    with pytest.raises(
        FormatError, match=rf"{NAME}\.engine has no {NAME}\.json beside it, which says what .*Copy both files out of"
    ):
        RMTRuntime(path)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_an_engine_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.engine"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(FormatError, match=r"x\.engine is no file; expected an engine that rmt-build wrote"):
        RMTRuntime(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "describes no engine of rmt-trt. Build the engine again with rmt-build"),
        (b'{"format": "another"}', "describes no engine of rmt-trt. Build the engine again with rmt-build"),
        (b'{"format": "rmt-trt-engine", "format_version": 2}', "has format version 2; this rmt-trt reads version 1. Update"),
        (b'{"format": "rmt-trt-engine", "format_version": 1, "x": 3}', "has the unknown fields ['x']; it was altered."),
    ],
)  # fmt: skip
def test_a_record_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_engine(tmp_path, record_of())
    path.with_suffix(".json").write_bytes(content)
    with pytest.raises(FormatError, match=rf"{NAME}\.json .*{re.escape(message)}"):
        RMTRuntime(path)


def test_a_record_of_a_size_that_none_has_is_not_read(tmp_path: Path) -> None:
    path = write_engine(tmp_path, record_of())
    with path.with_suffix(".json").open("wb") as file:
        file.truncate(RECORD_LIMIT + 1)
    with pytest.raises(
        FormatError, match=rf"{NAME}\.json has {RECORD_LIMIT + 1} bytes; the record of an engine, .* at most"
    ):
        RMTRuntime(path)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("engine", "cuda", "expected 'tensorrt' or 'tensorrt-rtx'"),
        ("flavour", "os", "expected 'tensorrt_rtx'"),
        ("dtype", "fp64", "expected 'fp32' or 'fp16'"),
        ("role", "prefill", "expected 'step'"),
        ("head", "last", "expected 'all' or 'none'"),
        ("file", "../x.engine", "expected a plain name that ends in .engine"),
        ("file", "/etc/passwd", "expected a plain name that ends in .engine"),
        ("file", ".engine", "expected a plain name that ends in .engine"),
        ("size", 0, "expected a number of bytes up to"),
        ("size", 1 << 60, "expected a number of bytes up to"),
        ("size", True, "it was altered"),
        ("sha256", "A" * 64, "expected 64 hexadecimal digits"),
        ("version", "1.7'; rm -rf '", "expected a version"),
        ("compute_capabilities", [], "expected compute capabilities such as 89, each once"),
        ("compute_capabilities", [89, 89], "expected compute capabilities such as 89, each once"),
        ("compute_capabilities", [8], "expected compute capabilities such as 89, each once"),
        ("os", "", "expected a name as Python's `platform` gives it"),
        ("machine", "\u001b[2J", "expected a name as Python's `platform` gives it"),
        ("hardware_compatible", "ampere_plus", "expected 'none'"),
        ("profiles", [], "expected 1 to 16 profiles"),
        ("profiles", [{}] * 17, "expected 1 to 16 profiles"),
        ("metadata", {SPEC_KEY: 3, INITIAL_KEY: ""}, "expected the step spec and the initial state as text"),
        ("decomposable", ["n"] * (1 << 16 | 1), "expected at most 65536 names"),
        ("seconds", float("inf"), "expected a time"),
        ("seconds", -1.0, "expected a time"),
        ("stripped", 1, "it was altered"),
    ],
)
def test_a_field_that_no_engine_has(tmp_path: Path, field: str, value: Any, expected: str) -> None:
    path = spoiled(tmp_path, lambda record: record.update({field: value}))
    with pytest.raises(FormatError, match=rf"{NAME}\.json: '{field}' is .*{re.escape(expected)}.*uild .*again"):
        RMTRuntime(path.with_suffix(".engine"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "carries no step spec in its metadata"),
        ({SPEC_KEY: "{}", INITIAL_KEY: ""}, "the step spec in its metadata cannot be read"),
        ({SPEC_KEY: "[" * 100_000, INITIAL_KEY: ""}, "the step spec in its metadata cannot be read"),
        ({INITIAL_KEY: "%"}, "the initial state in its metadata is no base64"),
        ({INITIAL_KEY: base64.b64encode(bytes(16)).decode()}, "the initial state is no readable safetensors file"),
        (
            {INITIAL_KEY: to_metadata(SPEC, initial_of(SPEC))[INITIAL_KEY]},
            "initial state 'memory' is missing; expected (2, 3) float32",
        ),
    ],
)
def test_a_step_spec_or_a_memory_that_cannot_be_read(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    def change(record: dict[str, Any]) -> None:
        record["metadata"] = {**record["metadata"], **metadata} if metadata else {}

    path = spoiled(tmp_path, change)
    with pytest.raises(FormatError, match=rf"{NAME}\.json:? .*{re.escape(message)}"):
        RMTRuntime(path.with_suffix(".engine"))


def tensor(record: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    (found,) = (table for table in record[kind] if table["name"] == name)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["inputs"].pop(0), "has the inputs ['table', 'segment']; its step spec says ['hidden', 'table', 'segment']"),
        (lambda r: r["inputs"].reverse(), "has the inputs ['segment', 'table', 'hidden']; its step spec says"),
        (lambda r: r["outputs"].pop(), "has the outputs ['new_hidden', 'new_table']; its step spec says ['new_hidden', 'new_"),
        (lambda r: r.update(head="none"), "has the outputs ['new_hidden', 'new_table', 'logits']; its step spec says ["),
        (lambda r: r.update(inputs=[{}] * 5000), "has the inputs [None, None,"),
        (lambda r: tensor(r, "inputs", "table").update(dtype="float32"), "'table' is 'float32' of shape [-1, 3, 2]; its step spec says float16"),
        (lambda r: tensor(r, "inputs", "segment").update(dtype="int32"), "'segment' is 'int32' of shape [-1, -1]; its step spec says int64"),
        (lambda r: tensor(r, "outputs", "logits").update(dtype="float16"), "'logits' is 'float16' of shape [-1, -1, 50]; its step spec says float32"),
        (lambda r: tensor(r, "inputs", "hidden").update(shape=[1, 4]), "'hidden' is 'float32' of shape [1, 4]; its step spec says float32 of shape (-1, 4)"),
        (lambda r: tensor(r, "inputs", "hidden").update(shape=[-1, 5]), "'hidden' is 'float32' of shape [-1, 5]; its step spec says"),
        (lambda r: tensor(r, "inputs", "hidden").update(shape=[-1, -1]), "'hidden' is 'float32' of shape [-1, -1]; its step spec says"),
        (lambda r: tensor(r, "inputs", "segment").update(shape=[-1, 11]), "of shape (-1, -1 or 12), where -1 varies"),
        (lambda r: tensor(r, "inputs", "hidden").update(shape=[-1, 4.0]), "'hidden' is 'float32' of shape [-1, 4.0]; its step spec says"),
        (lambda r: tensor(r, "outputs", "logits").update(shape=[-1, -1, 1 << 40]), "'logits' is 'float32' of shape [-1, -1, 1099511627776]"),
        (lambda r: tensor(r, "outputs", "new_table").update(shape="a"), "'new_table' is 'float16' of shape 'a'; its step spec says"),
        (lambda r: tensor(r, "outputs", "logits").update(more=1), "'logits' is 'float32' of shape"),
    ],
)  # fmt: skip
def test_inputs_and_outputs_that_are_not_the_models(tmp_path: Path, change: Any, message: str) -> None:
    path = spoiled(tmp_path, change, SPEC)
    with pytest.raises(FormatError, match=rf"{NAME}\.json: .*{re.escape(message)}.*{AGAIN}"):
        RMTRuntime(path.with_suffix(".engine"))


def sizes(record: dict[str, Any], name: str) -> dict[str, Any]:
    found = record["profiles"][0][name]
    assert isinstance(found, dict)
    return found


def batches(least: int, best: int, most: int) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        for name in ("memory", "segment"):
            for key, batch in zip(("min", "opt", "max"), (least, best, most), strict=True):
                sizes(record, name)[key][0] = batch

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (batches(4, 8, 8), "profile 1 takes 4 to 8 documents, tuned for 8; a runtime steps any number from 1 on"),
        (batches(0, 8, 8), "profile 1 takes 0 to 8 documents"),
        (batches(1, 9, 8), "profile 1 takes 1 to 8 documents, tuned for 9"),
        (batches(1, 1, 1 << 30), "profile 1 takes 1 to 1073741824 documents"),
        (lambda r: sizes(r, "segment").update(max=[8, S - 1]), "profile 1 takes segments of 1 to 11 tokens, tuned for 12; the model's have 1 to 12"),
        (lambda r: sizes(r, "segment").update(min=[1, 2]), "profile 1 takes segments of 2 to 12 tokens, tuned for 12; the model's"),
        (lambda r: sizes(r, "segment").update(opt=[8, 13]), "profile 1 takes segments of 1 to 12 tokens, tuned for 13; the model's"),
        (lambda r: sizes(r, "segment").update(max=[8, S, 1]), "profile 1, 'segment' is {'max': [8, 12, 1], 'min': [1, 1], 'opt': [8, 12]}; expected min, opt and max with 2 sizes each"),
        (lambda r: sizes(r, "segment").update(max=[8, True]), "profile 1, 'segment' is"),
        (lambda r: sizes(r, "segment").pop("opt"), "profile 1, 'segment' is"),
        (lambda r: r["profiles"][0].update(segment="all"), "profile 1, 'segment' is 'all'; expected min, opt and max"),
        (lambda r: r["profiles"][0].pop("memory"), "profile 1 is for ['segment']; the engine has the inputs ['memory', 'segment']"),
        (lambda r: r["profiles"][0].update(more={}), "profile 1 is for ['memory', 'more', 'segment']"),
        (lambda r: sizes(r, "memory").update(max=[8, 2, 4]), "profile 1, 'memory': its shapes are ((1, 2, 3), (8, 2, 3), (8, 2, 4)); expected"),
        (lambda r: sizes(r, "memory").update(max=[4, 2, 3]), "profile 1, 'memory': its shapes are ((1, 2, 3), (8, 2, 3), (4, 2, 3)); expected"),
        (lambda r: r["profiles"].append({}), "profile 2 is for []; the engine has the inputs"),
    ],
)  # fmt: skip
def test_profiles_that_do_not_take_what_a_runtime_steps(tmp_path: Path, change: Any, message: str) -> None:
    path = spoiled(tmp_path, change)
    with pytest.raises(FormatError, match=rf"{NAME}\.json: {re.escape(message)}.*{AGAIN}"):
        RMTRuntime(path.with_suffix(".engine"))


# Engines of a bundle.


def unreadable(bundle: Path) -> str:
    """What is said of the one engine file of a bundle that cannot be believed."""
    files, reasons = listed(open_source(bundle))
    assert files == ()
    assert list(reasons) == ["x.engine"]
    return reasons["x.engine"]


def test_a_record_that_was_altered_in_a_bundle(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, record_of(name="x"))
    (bundle / "engines/x.json").write_text((bundle / "engines/x.json").read_text().replace("fp16", "fp32"))
    assert "x.json is not the file that was exported (SHA-256 differs). Copy the bundle again" in unreadable(bundle)


@pytest.mark.parametrize("missing", ["engines/x.json", "engines/x.engine"])
def test_an_engine_and_its_record_go_together_in_a_manifest(tmp_path: Path, missing: str) -> None:
    bundle = bundle_of(tmp_path, record_of(name="x"))
    alter(bundle, lambda manifest: manifest["files"].pop(missing))
    assert f"manifest has no {missing}, and an engine and its record go together. {AGAIN}" in unreadable(bundle)


@pytest.mark.parametrize("change", [{"size": 5}, {"sha256": "0" * 64}, {"file": "y.engine"}])
def test_a_record_of_another_file_in_a_bundle(tmp_path: Path, change: dict[str, Any]) -> None:
    bundle = bundle_of(tmp_path, record_of(name="x"))
    put(bundle, "engines/x.json", replace(record_of(name="x"), **change).to_json().encode())
    assert "engines/x.json is about another file than engines/x.engine in the manifest" in unreadable(bundle)


def test_an_engine_of_another_model_in_a_bundle(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, record_of(SPEC.with_(fingerprint="0" * 64), name="x"))
    assert f"carries another step spec than the bundle: it is an engine of another model. {AGAIN}" in unreadable(bundle)


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_an_engine_that_leads_out_of_the_bundle(tmp_path: Path, linked: str) -> None:
    bundle = bundle_of(tmp_path, record_of(name="x"))
    part = bundle / ("engines/x.engine" if linked == "file" else "engines")
    part.rename(tmp_path / "outside")
    part.symlink_to(tmp_path / "outside")
    assert re.search(r"x\.engine leads out of the bundle through a link|no regular file inside", unreadable(bundle))


def test_a_damaged_record_does_not_stop_the_others(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, record_of(name="x"), record_of(name="y"))
    put(bundle, "engines/x.json", b"{}")
    source = open_source(bundle)
    with on_machine(rtx_machine()) as facts:
        assert runnable(source, "tensorrt-rtx", None, 0)["all"].path.name == "y.engine"
        facts.capability = 86
        with pytest.raises(
            EngineError, match=r"y\.engine: it was built for .*; x\.engine: .*describes no engine"
        ) as error:
            runnable(source, "tensorrt-rtx", None, 0)
    assert "rmt-build" in str(error.value)


def test_a_record_with_large_states_is_read_in_its_bundle(tmp_path: Path) -> None:
    """What a lone engine may not bring, a bundle whose spec says so may."""
    spec = CLASSIFIER.with_(states=(replace(CLASSIFIER.states[0], shape=(13 << 20,)),))
    noise = np.random.default_rng(0).integers(1, 1 << 30, 13 << 20, np.int32).view(np.float32)
    path = write_engine(tmp_path, record_of(spec, initial={"memory": np.abs(noise)})).with_suffix(".json")
    assert path.stat().st_size > RECORD_LIMIT
    with pytest.raises(FormatError, match="at most"):
        read_record(path)
    assert read_record(path, spec).size == len(DATA)


def test_engines_can_be_added_beside_a_damaged_one(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, record_of(name="x"))
    put(bundle, "engines/x.json", b"{}")
    add_engines(bundle, record_of(name="x"))
    assert listed(open_source(bundle))[1] == {}
