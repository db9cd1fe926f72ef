"""Checkpoint files from strangers: every refusal is one clear message, no code of theirs runs, no size is believed."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import INPUT_SIZE

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.model.checkpoint import LoadOptions, load_model


class Runs:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, canary: Path, function: Any = os.system) -> None:
        self.canary, self.function = canary, function

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.function, (f"touch {self.canary}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    canary, file = tmp_path / "canary", tmp_path / "model.bin"
    value = {"mem_token_ids": torch.arange(3), "x": Runs(canary)}
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match=r"asks for '(posix|nt)\.system'. Nothing in it was run"):
        load_model(file)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Runs(canary)))  # noqa: S301 - the canary does sing when somebody does load it
    assert canary.exists()


def test_a_bare_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "model.bin"
    file.write_bytes(pickle.dumps({"x": Runs(canary)}, protocol=2))
    with pytest.raises(FormatError, match="Nothing in it was run"):
        load_model(file)
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_pickled_module_is_refused_with_the_line_that_converts_it(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 3), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match="whole pickled module") as caught:
        load_model(file)
    line = re.search(r'python -c "(.*)"$', str(caught.value))
    assert line is not None
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(line[1])  # noqa: S102 - the message's own line must do what it says
    finally:
        os.chdir(here)
    assert set(torch.load(tmp_path / "state_dict.pt", weights_only=True)) == {"weight", "bias"}


def test_a_torchscript_archive_is_refused_with_the_line_that_converts_it(tmp_path: Path) -> None:
    traced = torch.jit.trace(torch.nn.Linear(2, 3), torch.zeros(1, 2))
    torch.jit.save(traced, tmp_path / "traced.pt")
    with pytest.raises(FormatError, match=r"TorchScript archive.*torch\.jit\.load\('traced\.pt'"):
        load_model(tmp_path / "traced.pt")


@pytest.mark.parametrize("container", [".pth", ".bin", ".safetensors", "legacy"])
@pytest.mark.parametrize("kept", [0.1, 0.6, 0.99])
def test_a_file_that_is_cut_short_says_so(tmp_path: Path, container: str, kept: float) -> None:
    made = checkpoints.source("distilbert")
    if container == "legacy":
        file = tmp_path / "model.bin"
        torch.save(made.state, file, _use_new_zipfile_serialization=False)
    else:
        file = checkpoints.write(tmp_path, made.state, container)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(FormatError, match=r"damaged|cut short"):
        load_model(file, LoadOptions(input_size=INPUT_SIZE))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.pt", b"", "is empty"),
        ("x.pt", b"hello, world", "is no checkpoint: it starts with b'hello, w'"),
        ("x.onnx", b"\x08\x07\x12\x07pytorch", "is no checkpoint"),
        ("x.safetensors", b"\xff" * 64, "is no safetensors file"),
        ("x.safetensors", (1 << 62).to_bytes(8, "little") + b"{}", "is no safetensors file"),
        ("x.pt", b"PK\x03\x04" + bytes(60), "damaged or cut short"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_so(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=message):
        load_model(tmp_path / name)


def test_a_path_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist; expected a checkpoint file"):
        load_model(tmp_path / "model.pt")


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"holds no weights; expected one of model\.safetensors, .*model_best\.pth"):
        load_model(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(FormatError, match="is an exported bundle"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(1)], "holds a list; expected a dict of tensors"),
        ({"epoch": 3, "loss": 0.5}, "holds no tensors by name .top-level keys: epoch, loss."),
        ({"w": torch.zeros(1).expand(1 << 40)}, r"tensor 'w' \(1099511627776,\) is not stored plainly"),
        ({"w": torch.zeros(3).to_sparse()}, "tensor 'w' .* is not stored plainly"),
        ({"w": torch.empty(3, device="meta")}, "tensor 'w' .* is not stored plainly|damaged"),
    ],
)
def test_a_pickle_that_is_no_state_dict_says_so(tmp_path: Path, value: object, message: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=message):
        load_model(tmp_path / "x.pt")


def test_one_storage_under_many_names_is_refused(tmp_path: Path) -> None:
    torch.save(dict.fromkeys((f"w{i}" for i in range(1000)), torch.zeros(1 << 16)), tmp_path / "x.pt")
    with pytest.raises(FormatError, match="made to exhaust memory"):
        load_model(tmp_path / "x.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as plain,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "y.pt").stat().st_size < 20_000
    with pytest.raises(FormatError, match="compressed zip archive"):
        load_model(tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as other:
        other.writestr("word/document.xml", "<x/>")
    with pytest.raises(FormatError, match=r"zip archive without data\.pkl"):
        load_model(tmp_path / "z.pt")


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "a/b.bin", "..", "a\\b.bin", "", "C:x"])
def test_shards_must_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "secret.bin")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(FormatError, match="must be a plain file name in the same folder"):
        load_model(folder)


def test_indexes_that_do_not_fit_their_shards_say_so(tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    for text, message in (
        ("[1]", "holds a JSON list; expected an object"),
        ("{", "is not valid JSON"),
        ("{}", "has no 'weight_map'"),
        ('{"weight_map": {"w": 3}}', "has no 'weight_map'"),
        ('{"weight_map": {"w": "a.bin"}}', "names the shard 'a.bin', which is not there"),
    ):
        index.write_text(text)
        with pytest.raises(FormatError, match=message):
            load_model(tmp_path)
    for name in ("a.bin", "b.bin"):
        torch.save({"w": torch.zeros(1)}, tmp_path / name)
    index.write_text('{"weight_map": {"w": "a.bin", "v": "b.bin"}}')
    with pytest.raises(FormatError, match="'w' lies in more than one shard"):
        load_model(tmp_path)
    index.write_text('{"weight_map": {"w": "a.bin", "v": "a.bin"}}')
    with pytest.raises(FormatError, match="promises 1 tensors that no shard holds: v"):
        load_model(tmp_path)


def test_files_given_by_flag_must_be_what_they_should(tmp_path: Path) -> None:
    made = checkpoints.source("bert")
    file = checkpoints.write(tmp_path / "run", made.state, ".bin")
    config = checkpoints.write_config(tmp_path / "backbone", made)
    with pytest.raises(ContractError, match=r"there is no such file, and no config\.json in such a folder"):
        load_model(file, LoadOptions(config=tmp_path / "nowhere", input_size=INPUT_SIZE))
    (tmp_path / "args.json").write_text('{"input_size": 24}')
    with pytest.raises(ContractError, match=r"not the config\.json of a Hugging Face model"):
        load_model(file, LoadOptions(config=tmp_path / "args.json", input_size=INPUT_SIZE))
    with pytest.raises(FormatError, match=r"tokenizer\.json cannot be read"):
        load_model(file, LoadOptions(config=config, input_size=INPUT_SIZE, tokenizer=tmp_path))
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ContractError, match=r"is not the text of a tokenizer\.json"):
        load_model(file, LoadOptions(config=config, input_size=INPUT_SIZE, tokenizer=tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="is not UTF-8 text"):
        load_model(file, LoadOptions(config=config, input_size=INPUT_SIZE, tokenizer=tmp_path))
