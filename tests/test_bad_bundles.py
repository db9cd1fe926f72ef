"""Manifests that are missing, cut, altered or written by a stranger: refused before anything in them is believed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from spoil import alter, copy_bundle, open_and_run, put

from rmt_trt import FormatError, RMTRuntime
from rmt_trt.bundle import FILE_LIMIT, INITIAL, MANIFEST, STEP, Bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return copy_bundle(tmp_path)


def test_the_bundle_that_these_tests_spoil_runs(bundle: Path) -> None:
    assert np.array_equal(open_and_run(bundle).logits, open_and_run(models.made("bert").bundle).logits)
    put(bundle, INITIAL, (bundle / INITIAL).read_bytes())
    assert open_and_run(bundle).segments == 3


def test_a_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"none\.rmt cannot be opened \(No such file or directory\); expected a bundle"
    ):
        RMTRuntime(tmp_path / "none.rmt")
    with pytest.raises(FormatError, match=r"none\.rmt is no folder; expected a bundle written by rmt-export"):
        Bundle(tmp_path / "none.rmt")


def test_a_plain_file_for_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "model.rmt").write_text("hello")
    with pytest.raises(FormatError, match=r"model\.rmt is none of what a runtime opens: a bundle folder"):
        RMTRuntime(tmp_path / "model.rmt")


def test_an_empty_folder_for_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "model.rmt").mkdir()
    with pytest.raises(
        FormatError, match=r"manifest\.json cannot be read \(No such file.*expected a bundle's manifest"
    ):
        RMTRuntime(tmp_path / "model.rmt")


def test_a_dangling_link_for_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "model.rmt").symlink_to(tmp_path / "gone")
    with pytest.raises(FormatError, match=r"model\.rmt cannot be opened \(No such file or directory\)"):
        RMTRuntime(tmp_path / "model.rmt")


CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not valid JSON"),
    "text": (b"hello", "is not valid JSON"),
    "half": (b'{"format": "rmt-trt-bundle", "files": {', "is not valid JSON"),
    "bytes": (b"\xff\xfe\x00", "is not valid JSON"),
    "deep lists": (b"[" * 100_000, "is not valid JSON"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON"),
    "number of 10000 digits": (b"1" * 10_000, "is not valid JSON"),
    "list": (b"[]", 'is no manifest of an rmt-trt bundle (no "format": "rmt-trt-bundle"). Export the model'),
    "null": (b"null", "is no manifest of an rmt-trt bundle"),
    "other JSON": (b'{"model_type": "bert"}', "is no manifest of an rmt-trt bundle"),
    "no version": (b'{"format": "rmt-trt-bundle"}', "has format version None; this rmt-trt"),
    "nothing else": (
        b'{"format": "rmt-trt-bundle", "format_version": 1}',
        "lacks ['files', 'graphs', 'spec']; it was cut",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_manifest_that_is_none(bundle: Path, name: str) -> None:
    content, message = CONTENTS[name]
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(FormatError, match=re.escape(message)) as info:
        RMTRuntime(bundle)
    assert str(bundle / MANIFEST) in str(info.value)


def test_a_manifest_of_ten_gigabytes_is_refused_by_its_size(bundle: Path) -> None:
    os.truncate(bundle / MANIFEST, 10 << 30)  # sparse: takes no room on the disk
    with pytest.raises(FormatError, match=r"has 10737418240 bytes; a bundle's manifest has at most .*It is not read"):
        RMTRuntime(bundle)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_manifest_is_a_regular_file(bundle: Path, tmp_path: Path, kind: str) -> None:
    (bundle / MANIFEST).rename(tmp_path / "elsewhere.json")
    if kind == "link":
        (bundle / MANIFEST).symlink_to(tmp_path / "elsewhere.json")
    elif kind == "folder":
        (bundle / MANIFEST).mkdir()
    else:
        os.mkfifo(bundle / MANIFEST)  # reading one would wait for ever
    with pytest.raises(FormatError, match=r"manifest\.json is (a link, and a bundle holds its own|not a regular file)"):
        RMTRuntime(bundle)


def in_file(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["files"][STEP].update(changes)


def in_spec(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["spec"].update(changes)


def in_state(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["spec"]["states"][0].update(changes)


def in_graph(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["graphs"][0].update(changes)


def at_top(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m.update(changes)


def extra_file(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["files"].update({name: m["files"][STEP]})


OUTSIDE = "only relative paths inside the bundle are read"
MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "future version": (at_top(format_version=2), "has format version 2; this rmt-trt"),
    "version true": (at_top(format_version=True), "has format version True; this rmt-trt"),
    "version text": (at_top(format_version="1"), "has format version '1'; this rmt-trt"),
    "unknown field": (at_top(engines=[]), "has unknown fields ['engines']; it was altered, or written by a newer rmt-trt"),
    "unknown file field": (in_file(mode=511), "file 'step.onnx' has unknown fields ['mode']"),
    "unknown graph field": (in_graph(run="sh"), "a graph has unknown fields ['run']"),
    "unknown spec field": (in_spec(evil=1), "step spec has unknown fields ['evil']; was it written by a newer rmt-trt?"),
    "unknown state field": (in_state(evil=1), "state has unknown fields ['evil']"),
    "files a list": (at_top(files=[]), "'files' is list; the file was altered. Copy it again"),
    "files null": (at_top(files=None), "'files' is NoneType"),
    "graphs an object": (at_top(graphs={}), "'graphs' is dict"),
    "graphs of text": (at_top(graphs=["step.onnx"]), "a graph is str; expected a JSON object"),
    "no graph": (at_top(graphs=[]), "names no graph with role 'step'"),
    "spec null": (at_top(spec=None), "'spec' is NoneType"),
    "made_by a list": (at_top(made_by=[]), "'made_by' is list"),
    "verification text": (at_top(verification="passed"), "'verification' is str"),
    "model a number": (at_top(model=5), "'model' is int"),
    "no files": (at_top(files={}), "uses the file 'initial_state.safetensors' without stating its size and hash"),
    "5000 files": (lambda m: m["files"].update({f"f{i}": m["files"][STEP] for i in range(5000)}), "names more than 4096"),
    "size absurd": (in_file(size=10**18), f"file 'step.onnx' claims {10**18} bytes; expected a whole number up to {FILE_LIMIT}"),
    "size below": (in_file(size=-1), "claims -1 bytes; expected a whole number"),
    "size fraction": (in_file(size=1.5), "claims 1.5 bytes; expected a whole number"),
    "size true": (in_file(size=True), "claims True bytes; expected a whole number"),
    "size text": (in_file(size="9"), "claims '9' bytes; expected a whole number"),
    "size of another file": (in_file(size=9), "step.onnx has {size} bytes; the manifest says 9. It was cut or altered"),
    "hash short": (in_file(sha256="00"), "file 'step.onnx' has no SHA-256 of 64 hexadecimal digits"),
    "hash a number": (in_file(sha256=0), "file 'step.onnx' has no SHA-256 of 64 hexadecimal digits"),
    "hash of another file": (in_file(sha256="0" * 64), "step.onnx is not the file that was exported (SHA-256 differs)"),
    "segment_length absurd": (in_spec(segment_length=10**12), "segment_length holds 1000000000000; expected a whole number"),
    "segment_length below": (in_spec(segment_length=-20), "segment_length holds -20; expected"),
    "segment_length fraction": (in_spec(segment_length=20.0), "segment_length holds 20.0; expected"),
    "segment_length true": (in_spec(segment_length=True), "segment_length holds True; expected"),
    "segment_length text": (in_spec(segment_length="20"), "segment_length holds '20'; expected"),
    "vocab_size absurd": (in_spec(vocab_size=10**12), "vocab_size holds 1000000000000; expected a whole number"),
    "num_logits absurd": (in_spec(num_logits=10**12), "num_logits holds 1000000000000; expected a whole number"),
    "max_segments below": (in_spec(max_segments=-1), "max_segments holds -1; expected a whole number"),
    "dropped_ids text": (in_spec(dropped_ids="0,1"), "dropped_ids is '0,1'; expected whole numbers"),
    "id2label a number": (in_spec(id2label=5), "id2label is 5; expected the names of the classes"),
    "fingerprint a list": (in_spec(fingerprint=[1]), "fingerprint is [1]; expected text"),
    "form unknown": (in_spec(form="rnn"), "form is 'rnn'; expected one of encoder, decoder, custom"),
    "spec of the future": (in_spec(version=2), "step spec has version 2; this rmt-trt reads version 1"),
    "states text": (in_spec(states="memory"), "'states' is str; expected a list of 1 to"),
    "states of text": (in_spec(states=["memory"]), "state is str; expected a JSON object"),
    "shape overflows": (in_state(shape=[2**28, 2**28, 2**28]), "has shape (268435456, 268435456, 268435456); expected"),
    "shape absurd": (in_state(shape=[2**62]), "holds 4611686018427387904; expected a whole number"),
    "shape of 1000 axes": (in_state(shape=[1] * 1000), "expected 1 to 8 axes"),
    "shape below": (in_state(shape=[-4, 32]), "shape of state 'memory' holds -4; expected"),
    "shape fraction": (in_state(shape=[4.0, 32]), "shape of state 'memory' holds 4.0; expected"),
    "shape true": (in_state(shape=[True, 32]), "shape of state 'memory' holds True; expected"),
    "shape of text": (in_state(shape=["4", "32"]), "shape of state 'memory' holds '4'; expected"),
    "shape empty": (in_state(shape=[]), "has shape (); expected 1 to 8 axes"),
    "state dtype": (in_state(dtype="object"), "state 'memory' has dtype 'object'; expected one of"),
    "state named segment": (in_state(input="segment"), "state input is 'segment'; expected a tensor name other than"),
    "path up": (extra_file("../step.onnx"), f"names the file '../step.onnx'; {OUTSIDE}"),
    "path up inside": (extra_file("graphs/../../x"), OUTSIDE),
    "path absolute": (extra_file("/etc/passwd"), f"names the file '/etc/passwd'; {OUTSIDE}"),
    "path with backslash": (extra_file("..\\step.onnx"), OUTSIDE),
    "path with drive": (extra_file("C:step.onnx"), OUTSIDE),
    "path in two spellings": (extra_file("./step.onnx"), OUTSIDE),
    "path of the folder": (extra_file("."), OUTSIDE),
    "path empty": (extra_file(""), OUTSIDE),
    "path with a null byte": (extra_file("step\0"), OUTSIDE),
    "path with an escape": (extra_file("\x1b[2J"), OUTSIDE),
    "path too long": (extra_file("a" * 5000), OUTSIDE),
    "path of the manifest": (extra_file(MANIFEST), OUTSIDE),
    "graph outside": (in_graph(file="../step.onnx"), "uses the file '../step.onnx' without stating its size and hash"),
    "graph not listed": (in_graph(file="graphs/x.onnx"), "uses the file 'graphs/x.onnx' without stating its size and hash"),
    "graph a list": (in_graph(file=["step.onnx"]), "expected a name and a list of names"),
    "graph data not listed": (in_graph(data=["../weights"]), "uses the file '../weights' without stating its size and hash"),
    "graph data text": (in_graph(data="step.onnx"), "expected a name and a list of names"),
    "graph data of numbers": (in_graph(data=[1]), "data is [1]; expected names of files"),
    "graph role": (in_graph(role="train"), "role is 'train'; expected one of"),
    "graph engine": (in_graph(engine="sh"), "engine is 'sh'; expected one of"),
    "graph dtype": (in_graph(dtype=None), "dtype is None; expected one of"),
    "graph opset": (in_graph(opset="20"), "opset is '20'; expected a whole number"),
    "graph file missing": (lambda m: (extra_file("x.onnx")(m), in_graph(file="x.onnx")(m)), "x.onnx is missing, or no regular"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_altered_manifest_is_refused(bundle: Path, name: str) -> None:
    change, message = MANIFESTS[name]
    alter(bundle, change)
    with pytest.raises(FormatError, match=re.escape(message.format(size=(bundle / STEP).stat().st_size))) as info:
        open_and_run(bundle)
    assert str(bundle) in str(info.value)


OTHER_VALUES: dict[str, Any] = {
    "form": "custom", "segment_length": 21, "vocab_size": 95, "alignment": "left", "dropped_ids": [0],
    "id2label": ["b", "a", "c", "d", "e"], "max_segments": 9, "fingerprint": "0" * 64,
}  # fmt: skip


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_a_manifest_whose_spec_differs_from_the_graphs_own_is_refused(bundle: Path, field: str) -> None:
    alter(bundle, in_spec(**{field: OTHER_VALUES[field]}))
    with pytest.raises(
        FormatError, match=r"step\.onnx: the graph carries another step spec than the bundle's manifest"
    ):
        open_and_run(bundle)


@pytest.mark.parametrize("change", [{"num_logits": 6, "id2label": []}, {"logits": "lm"}], ids=["num_logits", "logits"])
def test_a_spec_that_does_not_fit_the_graph_is_refused(bundle: Path, change: dict[str, Any]) -> None:
    alter(bundle, in_spec(**change))
    with pytest.raises(FormatError, match=r"the graph's 'logits' is tensor\(float\) of shape .*; its spec says"):
        open_and_run(bundle)
