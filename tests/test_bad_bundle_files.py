"""Files of a bundle that are cut, altered, links, or a stranger's with the right hash: refused when they are used."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import safetensors.numpy
from spoil import alter, copy_bundle, open_and_run, put

from rmt_trt import FormatError
from rmt_trt.bundle import INITIAL, MANIFEST, STEP, TOKENIZER, Bundle

ZEROS = np.zeros((models.M, models.WIDTH), np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return copy_bundle(tmp_path)


@pytest.mark.parametrize("name", [INITIAL, STEP, TOKENIZER, "verification.json"])
@pytest.mark.parametrize("place", [0, -1, None], ids=["first", "last", "middle"])
def test_one_altered_byte_is_found_in_every_file(bundle: Path, name: str, place: int | None) -> None:
    if name == TOKENIZER:
        put(bundle, TOKENIZER, b'{"version": "1.0"}')
    assert set(Bundle(bundle).manifest.files) <= {INITIAL, STEP, TOKENIZER, "verification.json"}
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(FormatError, match=rf"{re.escape(name)} is not the file that was exported \(SHA-256 differs\)"):
        open_and_run(bundle) if name in (INITIAL, STEP, TOKENIZER) else Bundle(bundle).report()


@pytest.mark.parametrize("name", [INITIAL, STEP])
@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_file_is_found_by_its_size(bundle: Path, name: str, size: int) -> None:
    whole = (bundle / name).stat().st_size
    os.truncate(bundle / name, size)
    with pytest.raises(
        FormatError, match=rf"{re.escape(name)} has {size} bytes; the manifest says {whole}\. It was cut"
    ):
        open_and_run(bundle)


@pytest.mark.parametrize("how", ["deleted", "link", "link inside", "folder", "through a linked folder"])
def test_a_file_is_a_regular_one_inside_the_folder(bundle: Path, tmp_path: Path, how: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle / STEP).rename((bundle if how == "link inside" else outside) / "real.onnx")
    if how == "folder":
        (bundle / STEP).mkdir()
    elif how == "through a linked folder":
        (bundle / "graphs").symlink_to(outside)
        entry = json.loads((bundle / MANIFEST).read_text())["files"][STEP]
        alter(
            bundle,
            lambda m: (m["files"].update({"graphs/real.onnx": entry}), m["graphs"][0].update(file="graphs/real.onnx")),
        )
    elif how != "deleted":
        (bundle / STEP).symlink_to((bundle if how == "link inside" else outside) / "real.onnx")
    with pytest.raises(
        FormatError, match=r"is missing, or no regular file inside the bundle\. Copy the whole folder again"
    ):
        open_and_run(bundle)


@pytest.mark.parametrize("content", [b"", b"hello there\n", None], ids=["empty", "text", "half"])
def test_a_graph_that_is_none_though_its_hash_is_right(bundle: Path, content: bytes | None) -> None:
    whole = (bundle / STEP).read_bytes()
    put(bundle, STEP, whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(FormatError, match=r"ONNX Runtime .* refuses .*step\.onnx: .*export the model again"):
        open_and_run(bundle)


def header(dtype: str, size: int) -> bytes:
    text = json.dumps({"memory": {"dtype": dtype, "shape": [4, 32], "data_offsets": [0, size]}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


NAN = np.where(np.arange(ZEROS.size).reshape(ZEROS.shape) == 5, np.nan, ZEROS).astype(np.float32)
INITIALS: dict[str, tuple[Any, str]] = {
    "shape": (
        {"memory": ZEROS[:, 1:]},
        "initial state 'memory' is (4, 31) float32; expected (4, 32) float32, all finite",
    ),
    "rank": ({"memory": ZEROS[None]}, "initial state 'memory' is (1, 4, 32) float32; expected (4, 32)"),
    "nan": ({"memory": NAN}, "initial state 'memory' is (4, 32) float32; expected (4, 32) float32, all finite"),
    "double": ({"memory": ZEROS.astype(np.float64)}, "initial state 'memory' is (4, 32) float64; expected"),
    "half": ({"memory": ZEROS.astype(np.float16)}, "initial state 'memory' is (4, 32) float16; expected"),
    "name": ({"mem": ZEROS}, "initial state 'memory' is missing; expected (4, 32) float32"),
    "empty": (b"", "the initial state is no readable safetensors file"),
    "text": (b"hello there", "the initial state is no readable safetensors file"),
    "header of 2**62 bytes": (
        (2**62).to_bytes(8, "little") + b"{}",
        "the initial state is no readable safetensors file",
    ),
    "header broken": ((10).to_bytes(8, "little") + b"{" * 10, "the initial state is no readable safetensors file"),
    "bfloat16": (header("BF16", 256), "the initial state is no readable safetensors file"),
    "offsets beyond": (header("F32", 512)[:-100], "the initial state is no readable safetensors file"),
    "too long": (bytes(5 << 20), "has 5242880 bytes; the initial state has at most"),
    "pickle": (b"\x80\x04cos\nsystem\n", "the initial state is no readable safetensors file"),
}


@pytest.mark.parametrize("name", INITIALS)
def test_an_initial_state_that_is_none_though_its_hash_is_right(bundle: Path, name: str) -> None:
    content, message = INITIALS[name]
    put(bundle, INITIAL, content if isinstance(content, bytes) else safetensors.numpy.save(content))
    with pytest.raises(FormatError, match=re.escape(message)) as info:
        open_and_run(bundle)
    assert str(bundle / INITIAL) in str(info.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"[]", b"[" * 100_000, b'{"version": "1.0", "model": {"type": "evil"}}'],
    ids=["empty", "text", "list", "deep", "unknown model"],
)
def test_a_broken_tokenizer_is_named_when_text_comes_and_ids_still_run(bundle: Path, content: bytes) -> None:
    put(bundle, TOKENIZER, content)
    assert open_and_run(bundle).segments == 3
    with pytest.raises(FormatError, match=r"model\.rmt: its tokenizer\.json cannot be read"):
        open_and_run(bundle, "hello")


def test_a_tokenizer_that_is_no_text(bundle: Path) -> None:
    put(bundle, TOKENIZER, b"\xff\xfe")
    with pytest.raises(FormatError, match=r"tokenizer\.json is not UTF-8 text"):
        open_and_run(bundle)


def test_text_that_gives_no_token_is_an_empty_document(bundle: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"hello": 5, "[UNK]": 6}, "unk_token": "[UNK]"}
    put(
        bundle,
        TOKENIZER,
        json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}).encode(),
    )
    assert open_and_run(bundle, "hello you").tokens == 2
    with pytest.raises(ValueError, match="the document is empty: it has no token"):
        open_and_run(bundle, "  \n ")


def test_a_tokenizer_of_another_vocabulary_is_found(bundle: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"hello": 500}, "unk_token": "hello"}
    put(bundle, TOKENIZER, json.dumps({"version": "1.0", "model": model}).encode())
    with pytest.raises(ValueError, match="token 0 is 500; the vocabulary has ids 0 to 95"):
        open_and_run(bundle, "hello")


def test_files_that_the_manifest_does_not_name_are_ignored(bundle: Path) -> None:
    (bundle / "evil.py").write_text("raise SystemExit")
    (bundle / TOKENIZER).write_text("no tokenizer")
    (bundle / "link").symlink_to("/etc")
    assert np.array_equal(open_and_run(bundle).logits, open_and_run(models.made("bert").bundle).logits)


def test_a_verification_report_that_is_none(bundle: Path) -> None:
    put(bundle, "verification.json", b"[]")
    with pytest.raises(FormatError, match=r"verification\.json is list; expected a JSON object"):
        Bundle(bundle).report()
