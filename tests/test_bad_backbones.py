"""Pretrained backbones and deltas that were edited, or made to do harm: refused in one line, and nothing in them is run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_bert import small_bert
from texts import EXCERPT

from rmt_trt import ContractError, FormatError
from rmt_trt.commands import train
from rmt_trt.model.checkpoint import load_model
from rmt_trt.model.delta import save_delta
from rmt_trt.training.loop import start
from rmt_trt.training.options import TrainOptions

LORA = f"--backbone base --text {EXCERPT} --lora 4 --num-memory 2 --stages 1 --batch 8 --eval-rows 8 --steps 2 --device cpu"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained BERT, to be copied."""
    return small_bert(tmp_path_factory.mktemp("base"))


@pytest.fixture
def trained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[Path], None]], tuple[int, str]]:
    """Runs rmt-train on a copy of the backbone that was spoiled: its exit code and what stands on standard error."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")

    def call(spoil: Callable[[Path], None]) -> tuple[int, str]:
        spoil(Path("base"))
        monkeypatch.setattr(sys, "argv", ["rmt-train", "out", *LORA.split()])
        with pytest.raises(SystemExit) as info:  # noqa: PT012
            train.main()
            raise SystemExit(0)
        return int(info.value.code or 0), capsys.readouterr().err

    return call


class Code:
    """A pickle of it would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Code()}, folder / "pytorch_model.bin")


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")


def other_specials(folder: Path) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    for token in value["added_tokens"]:
        token["id"] += 10**6
    path.write_text(json.dumps(value), encoding="utf-8")


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a vocabulary of 10^9": (config(vocab_size=10**9), "vocab_size is 1000000000; numbers beyond 16777216 are refused"),
    "a vocabulary of 10^7": (config(vocab_size=10**7), "do not fit its config: 1 are missing or of another shape"),
    "1,024 layers": (config(num_hidden_layers=1024), "do not fit its config: 16368 are missing"),
    "a config nested 500 deep": (config(more=nested(500)), "more is nested more than 32 deep; such a config is refused"),
    "no number": (config(layer_norm_eps=float("nan")), "layer_norm_eps is nan; expected a finite number"),
    "weights that run code": (pickled, "Nothing in it was run"),
    "weights that are no numbers": (not_finite, "hold infinities or what is no number: bert.embeddings.LayerNorm.bias"),
    "special tokens beyond the embedding": (other_specials, "the ids 1000002, 1000003 and 1000000; the model embeds ids"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_pretrained_backbone_that_was_edited_is_refused(trained, name):
    spoil, message = SPOILED[name]
    code, err = trained(spoil)
    assert (code, len(err.splitlines())) == (1, 1), err
    assert message in err
    assert not list(Path().glob("out/*"))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"return_dict": False}, {"torchscript": True}, {"chunk_size_feed_forward": 7},
        {"auto_map": {"AutoModel": "code.Model", "AutoConfig": "code.Config"}, "trust_remote_code": True},
    ],
)  # fmt: skip
def test_what_a_config_says_of_code_and_outputs_is_passed_over(trained, changes):
    Path("base/code.py").write_text("from pathlib import Path\nPath('ran').touch()\n", encoding="utf-8")
    code, err = trained(config(**changes))
    assert code == 0, err
    assert Path("out/delta.safetensors").exists()
    assert not Path("ran").exists()


@pytest.fixture(scope="module")
def delta(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of it."""
    flags = {"stages": (1,), "batch": 8, "eval_rows": 8, "steps": 2, "num_memory": 2, "lora": 4, "text": str(EXCERPT)}
    run = start(TrainOptions(backbone=str(base), **flags), torch.device("cpu"))
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    save_delta(path, run.model, run.base, 8.0)
    return path


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("", {"backbone": "x" * 10_000}, "was trained on a backbone that is not here"),
        ("", {"lora_alpha": float("nan")}, "lora_alpha 'nan'"),
        ("model", {"prefix_ids": "x"}, "prefix_ids is 'x'; expected a list of token ids"),
        ("model", {"prefix_ids": [2.5]}, r"prefix_ids is '\(2\.5,\)'; expected a list of token ids"),
        ("model", {"prefix_ids": [10**6]}, r"prefix_ids are \(1000000,\); expected token ids below"),
        ("model", {"segment_length": 10**9}, "segment_length holds 1000000000"),
        ("backbone", {"num_hidden_layers": 1024}, "do not fit its config"),
        ("backbone", {"layer_norm_eps": float("inf")}, "layer_norm_eps is inf; expected a finite number"),
    ],
)
def test_a_delta_that_was_edited_is_refused_by_its_name(delta, tmp_path, part, changes, message):
    with safe_open(delta, "pt") as file:
        about = json.loads(file.metadata()["rmt_trt_delta"])
    place = {"": about, "model": about["model"], "backbone": about["model"]["backbone"]}[part]
    place.update(changes)
    save_file(load_file(delta), tmp_path / "d.safetensors", metadata={"rmt_trt_delta": json.dumps(about)})
    with pytest.raises((FormatError, ContractError), match=rf"d\.safetensors.*{message}"):
        load_model(tmp_path / "d.safetensors")
