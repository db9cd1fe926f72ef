"""Lone ONNX graphs and other files of strangers, and saved states that are cut, altered or another model's."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.numpy

from rmt_trt import ContractError, EngineError, FormatError, RMTRuntime
from rmt_trt.bundle import INITIAL, MANIFEST, STEP, Bundle
from rmt_trt.files import sha256

DOCUMENT = np.arange(50) % 90 + 5
SPEC, FIRST = "rmt_trt.spec", "rmt_trt.initial_state"
Change = Callable[[onnx.ModelProto], object]


def run_graph(path: Path) -> Any:
    with RMTRuntime(path, engine="cpu", threads=1) as runtime:
        return runtime.run(DOCUMENT)


def write_graph(folder: Path, change: Change) -> Path:
    """A BERT's graph, changed."""
    model = onnx.load(models.made("bert").bundle / STEP)
    change(model)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def metadata(key: str, change: Callable[[str], str]) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        for entry in model.metadata_props:
            if entry.key == key:
                entry.value = change(entry.value)

    return apply


def spec(**changes: Any) -> Change:
    return metadata(SPEC, lambda text: json.dumps({**json.loads(text), **changes}))


def state_spec(value: np.ndarray | None = None, **changes: Any) -> Change:
    """Changes the state's spec; with a value, the initial state too."""

    def apply(model: onnx.ModelProto) -> None:
        metadata(SPEC, lambda t: json.dumps({**json.loads(t), "states": [{**json.loads(t)["states"][0], **changes}]}))(
            model
        )
        if value is not None:
            encoded = base64.b64encode(safetensors.numpy.save({"memory": value})).decode()
            metadata(FIRST, lambda text: encoded)(model)

    return apply


def external(location: str, **more: int) -> Change:
    """Moves the largest weight into a file of its own."""

    def apply(model: onnx.ModelProto) -> None:
        weight = max(model.graph.initializer, key=lambda value: len(value.raw_data))
        fields = {"location": location, "offset": 0, "length": len(weight.raw_data), **more}
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for name, value in fields.items():
            weight.external_data.add(key=name, value=str(value))

    return apply


def custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain, model.graph.node[0].op_type = "evil", "Evil"


GRAPHS: dict[str, tuple[Change, str]] = {
    "no metadata": (
        lambda model: model.ClearField("metadata_props"),
        "carries no step spec in its metadata, so it was not written by rmt-export. Export the model with rmt-export",
    ),
    "spec no JSON": (metadata(SPEC, lambda text: text[:-5]), "the step spec in its metadata cannot be read"),
    "spec a list": (metadata(SPEC, lambda text: "[]"), "step spec is list; expected a JSON object"),
    "spec deep": (metadata(SPEC, lambda text: "[" * 100_000), "the step spec in its metadata cannot be read"),
    "spec absurd": (spec(vocab_size=10**12), "vocab_size holds 1000000000000; expected a whole number"),
    "spec unknown": (spec(evil=1), "step spec has unknown fields ['evil']"),
    "other number of logits": (spec(num_logits=6, id2label=[]), "the graph's 'logits' is tensor(float) of shape"),
    "other kind of logits": (spec(logits="lm"), "the graph's 'logits' is tensor(float) of shape"),
    "other state name": (state_spec(input="mem"), "the graph has the inputs ['memory', 'segment']; its spec says ['mem', 'segment']"),
    "other state shape": (state_spec(shape=[4, 31]), "initial state 'memory' is (4, 32) float32; expected (4, 31)"),
    "other state shape, twice": (
        state_spec(np.zeros((4, 31), np.float32), shape=[4, 31]),
        "the graph's 'memory' is tensor(float) of shape ('batch', 4, 32); its spec says tensor(float) of shape (any, any or 4, any or 31)",
    ),
    "other state dtype, twice": (
        state_spec(np.zeros((4, 32), np.float16), dtype="float16"),
        "the graph's 'memory' is tensor(float) of shape ('batch', 4, 32); its spec says tensor(float16)",
    ),
    "base64 none": (metadata(FIRST, lambda text: "!!!"), "the initial state in its metadata is no base64"),
    "base64 of letters beyond ASCII": (metadata(FIRST, lambda text: "é"), "the initial state in its metadata is no base64"),
    "base64 cut": (metadata(FIRST, lambda text: text[:101]), "the initial state in its metadata is no base64"),
    "base64 empty": (metadata(FIRST, lambda text: ""), "the initial state is no readable safetensors file"),
    "base64 absurd": (metadata(FIRST, lambda text: "A" * (8 << 20)), "6291456 bytes of initial state; the spec allows"),
    "data above the folder": (external("../secret.data"), "External data path escapes model directory"),
    "data at an absolute path": (external("/etc/passwd"), "Absolute path not allowed for external data location"),
    "data through a link": (external("link.data"), "External data path escapes model directory"),
    "data missing": (external("gone.data"), "gone.data"),
    "data longer than its file": (external("beside.data", length=10**15), "external data size mismatch"),
    "data before its file": (external("beside.data", offset=-5), "out of bounds"),
    "an operator of somebody": (custom_operator, "No opset import for domain 'evil'"),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(1 << 16))
    (folder / "beside.data").write_bytes(bytes(1 << 16))
    (folder / "link.data").symlink_to(tmp_path / "secret.data")
    change, message = GRAPHS[name]
    path = write_graph(folder, change)
    with pytest.raises(FormatError, match=re.escape(message)) as info:
        run_graph(path)
    assert str(path) in str(info.value)


def test_the_graph_that_these_tests_change_runs(tmp_path: Path) -> None:
    path = write_graph(tmp_path, external("beside.data"))
    weight = max(onnx.load(models.made("bert").bundle / STEP).graph.initializer, key=lambda value: len(value.raw_data))
    (tmp_path / "beside.data").write_bytes(weight.raw_data)
    assert np.array_equal(run_graph(path).logits, run_graph(models.made("bert").bundle).logits)


def test_an_onnx_runtime_that_reads_outside_the_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(
        EngineError, match=r"ONNX Runtime 1\.23\.2 reads external data outside .* pip install 'onnxruntime>="
    ):
        run_graph(models.made("bert").bundle)
    with pytest.raises(EngineError, match=r"ONNX Runtime 1\.23\.2 reads external data outside"):
        run_graph(models.made("bert").bundle / STEP)


@pytest.mark.parametrize("location", ["../secret.data", "/etc/passwd"])
def test_external_data_outside_a_bundle_is_refused_though_the_hash_is_right(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.data").write_bytes(bytes(1 << 16))
    bundle = tmp_path / "model.rmt"
    bundle.mkdir()
    source = models.made("bert").bundle
    (bundle / INITIAL).write_bytes((source / INITIAL).read_bytes())
    write_graph(tmp_path, external(location)).rename(bundle / STEP)
    manifest = json.loads((source / MANIFEST).read_text())
    manifest["files"][STEP] = {"size": (bundle / STEP).stat().st_size, "sha256": sha256(bundle / STEP)}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"ONNX Runtime .* refuses .*step\.onnx: .*[Ee]xternal data"):
        run_graph(bundle)


FILES: dict[str, tuple[str, bytes, type[Exception], str]] = {
    "text named .onnx": ("a.onnx", b"hello there\n", FormatError, "refuses"),
    "empty .onnx": ("a.onnx", b"", FormatError, "refuses"),
    "an engine": ("a.engine", b"ftrt", FormatError, "a.engine has no a.json beside it"),
    "a text": (
        "a.txt",
        b"hello",
        FormatError,
        "a.txt is none of what a runtime opens: a bundle folder (NAME.rmt), an .onnx",
    ),
    "text named .pt": ("a.pt", b"hello there\n", FormatError, "a.pt is no checkpoint"),
    "a pickle that runs code": ("a.bin", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", FormatError, "a.bin"),
    "text named .safetensors": ("a.safetensors", b"hello there\n", FormatError, "a.safetensors"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_no_runtime_opens(tmp_path: Path, name: str) -> None:
    file, content, kind, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(kind, match=re.escape(message)):
        RMTRuntime(tmp_path / file)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_graph_is_a_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.onnx"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(FormatError, match=r"a\.onnx is no file; expected an ONNX graph"):
        RMTRuntime(path)


@pytest.fixture(scope="module")
def language() -> Iterator[RMTRuntime]:
    with models.made("gpt2").open() as runtime:
        yield runtime


@pytest.fixture
def saved(language: RMTRuntime, tmp_path: Path) -> Path:
    """A state after 50 tokens, 10 of them pending."""
    language.run(DOCUMENT, logits="loglik").state.save(tmp_path / "whole.state")
    return tmp_path / "whole.state"


def rewrite(path: Path, tensors: dict[str, Any], facts: dict[str, Any], entries: dict[str, Any]) -> None:
    """Changes a saved state; None takes something out."""
    with safetensors.safe_open(path, "numpy") as file:
        old = file.metadata()
    values = {**safetensors.numpy.load_file(path), **tensors}
    told = {**old, "facts": json.dumps({**json.loads(old["facts"]), **facts}), **entries}
    keep = {name: value for name, value in values.items() if value is not None}
    path.write_bytes(safetensors.numpy.save(keep, {name: value for name, value in told.items() if value is not None}))


ZEROS = np.zeros((4, 32), np.float32)
STATES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "shape": ({"state.0": ZEROS[1:]}, {}, {}, "state 'memory' is (3, 32) float32; expected (4, 32) float32, all finite"),
    "dtype": ({"state.0": ZEROS.astype(np.float64)}, {}, {}, "state 'memory' is (4, 32) float64; expected (4, 32) float32"),
    "nan": ({"state.0": ZEROS * np.float32("nan")}, {}, {}, "state 'memory' is (4, 32) float32; expected (4, 32) float32, all"),
    "no memory": ({"state.0": None}, {}, {}, "is no readable state (KeyError('state.0'))"),
    "no pending": ({"pending": None}, {}, {}, "is no readable state (KeyError('pending'))"),
    "pending beyond the vocabulary": ({"pending": np.full(10, 96)}, {}, {}, "run from 96 to 96; expected ids from 0 to 95"),
    "pending below": ({"pending": np.full(10, -1)}, {}, {}, "pending tokens run from -1 to -1; expected ids from 0"),
    "too many pending": ({"pending": np.full(20, 5)}, {}, {}, "pending tokens are (20,) int64; expected fewer than 20 int64 ids"),
    "pending of two axes": ({"pending": np.full((1, 10), 5)}, {}, {}, "pending tokens are (1, 10) int64; expected fewer"),
    "pending of floats": ({"pending": np.zeros(10)}, {}, {}, "pending tokens are (10,) float64; expected fewer"),
    "fewer pending": ({"pending": np.full(9, 5)}, {}, {}, "2 segments of 20 and 9 pending tokens make 49. The state was"),
    "logits of another size": ({"last_logits": ZEROS[0]}, {}, {}, "last logits are (32,) float32; expected (96,) float32"),
    "logits of another dtype": ({"last_logits": np.zeros(96)}, {}, {}, "last logits are (96,) float64; expected (96,) float32"),
    "logits nan": ({"last_logits": np.full(96, np.nan, np.float32)}, {}, {}, "expected (96,) float32, none of them nan"),
    "position below": ({}, {"position": -1}, {}, "position is -1; expected a whole number of at least 0"),
    "position fraction": ({}, {"position": 50.0}, {}, "position is 50.0; expected a whole number"),
    "position true": ({}, {"position": True}, {}, "position is True; expected a whole number"),
    "position absurd": ({}, {"position": 10**30}, {}, f"position is {10**30}; expected a whole number"),
    "position elsewhere": ({}, {"position": 70}, {}, "position 70, tokens_read 50; 2 segments of 20 and 10 pending"),
    "segments text": ({}, {"segments": "2"}, {}, "segments is '2'; expected a whole number"),
    "tokens_read below the position": ({}, {"tokens_read": 10}, {}, "position 50, tokens_read 10; 2 segments"),
    "loglik no number": ({}, {"loglik_sum": "zz"}, {}, "is no readable state (ValueError('invalid hexadecimal"),
    "loglik nan": ({}, {"loglik_sum": "nan"}, {}, "loglik_sum is nan; expected a finite number"),
    "loglik absurd": ({}, {"loglik_sum": "0x1p99999"}, {}, "is no readable state (OverflowError("),
    "loglik a list": ({}, {"loglik_sum": [1]}, {}, "is no readable state (TypeError("),
    "another format": ({}, {}, {"format": "x"}, "is a safetensors file, but no state saved by rmt-trt"),
    "of the future": ({}, {}, {"format_version": "2"}, "has state format version '2'; this rmt-trt reads 1. Update rmt-trt"),
    "another model": ({}, {}, {"fingerprint": "0" * 64}, "was saved by another model (fingerprint 000000000000..., this"),
    "no fingerprint": ({}, {}, {"fingerprint": None}, "is no readable state (KeyError('fingerprint'))"),
    "facts a list": ({}, {}, {"facts": "[]"}, "is no readable state (TypeError("),
    "facts deep": ({}, {}, {"facts": "[" * 100_000}, "is no readable state (RecursionError("),
    "facts empty": ({}, {}, {"facts": "{}"}, "is no readable state (KeyError("),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_an_altered_state_is_refused(language: RMTRuntime, saved: Path, name: str) -> None:
    tensors, facts, entries, message = STATES[name]
    rewrite(saved, tensors, facts, entries)
    with pytest.raises(FormatError, match=re.escape(message)) as info:
        language.load_state(saved)
    assert str(saved) in str(info.value)


def test_a_state_that_was_only_rewritten_goes_on(language: RMTRuntime, saved: Path) -> None:
    rewrite(saved, {}, {}, {})
    out = language.run(DOCUMENT, state=language.load_state(saved), logits="loglik")
    assert out.loglik_sum == language.run(np.r_[DOCUMENT, DOCUMENT], logits="loglik").loglik_sum


def test_a_state_of_another_model_is_refused_from_disk_and_in_memory(language: RMTRuntime, tmp_path: Path) -> None:
    with models.made("bert").open() as other:
        state = other.run(DOCUMENT, alignment="left").state
    state.save(tmp_path / "other.state")
    message = r"was saved by another model \(fingerprint .*\)\. A state fits the weights that made it only; start anew"
    with pytest.raises(FormatError, match=message):
        language.load_state(tmp_path / "other.state")
    with pytest.raises(FormatError, match=rf"the document: the state {message}"):
        language.run(DOCUMENT, state=state)
    with pytest.raises(FormatError, match=rf"document 1 of the batch: the state {message}"):
        language.run([DOCUMENT, DOCUMENT], state=[None, state])


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_truncated_state_is_refused(language: RMTRuntime, saved: Path, size: int) -> None:
    os.truncate(saved, size if size >= 0 else saved.stat().st_size - 1)
    with pytest.raises(
        FormatError, match=r"whole\.state is no readable state .* it was cut, altered, or is another file"
    ):
        language.load_state(saved)


def test_a_state_of_ten_gigabytes_is_refused_by_its_size(language: RMTRuntime, saved: Path) -> None:
    os.truncate(saved, 10 << 30)
    with pytest.raises(FormatError, match=r"has 10737418240 bytes; a saved state has at most .*It is not read"):
        language.load_state(saved)


def test_files_that_are_no_state(language: RMTRuntime, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello there, this is a text")
    with pytest.raises(FormatError, match=r"text is no readable state"):
        language.load_state(tmp_path / "text")
    with pytest.raises(FormatError, match=r"is a safetensors file, but no state saved by rmt-trt"):
        language.load_state(models.made("gpt2").bundle / INITIAL)
    with pytest.raises(FormatError, match=r"none cannot be read \(No such file or directory\); expected a saved state"):
        language.load_state(tmp_path / "none")
    with pytest.raises(FormatError, match=r"is not a regular file; expected a saved state"):
        language.load_state(tmp_path)
    with pytest.raises(ContractError, match="the path is None; expected the path of a file"):
        language.load_state(None)  # type: ignore[arg-type]


def flipped(data: bytes, seed: int) -> bytes:
    """Up to five bytes replaced, most of them in the first 500, where headers are."""
    generator = np.random.default_rng(seed)
    changed = bytearray(data)
    for _ in range(int(generator.integers(1, 6))):
        end = min(len(data), 500) if generator.random() < 0.8 else len(data)
        changed[int(generator.integers(end))] = int(generator.integers(256))
    return bytes(changed)


def test_flipped_bytes_in_a_state_are_refused_or_do_no_harm(language: RMTRuntime, saved: Path) -> None:
    whole, refused = saved.read_bytes(), 0
    for seed in range(300):
        saved.write_bytes(flipped(whole, seed))
        try:
            assert np.isfinite(language.load_state(saved).memory).all()
        except FormatError:
            refused += 1
    assert refused > 200


def test_flipped_bytes_in_a_manifest_are_refused_or_do_no_harm(tmp_path: Path) -> None:
    path = models.made("bert").bundle / MANIFEST
    whole, refused = path.read_bytes(), 0
    for seed in range(300):
        (tmp_path / MANIFEST).write_bytes(flipped(whole, seed))
        try:
            assert Bundle(tmp_path).spec.states
        except FormatError:
            refused += 1
    assert refused > 200
