"""model.pt, the checkpoint of rmt-trt itself: damaged, altered, or asked to hold what it cannot."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import VOCAB, M
from hypothesis import given, settings
from hypothesis import strategies as st

from rmt_trt.errors import ContractError, FormatError, RMTError
from rmt_trt.model.checkpoint import LoadOptions, load_model, save_model
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.step import build_model


def own_model() -> Any:
    torch.manual_seed(0)
    return build_model(
        ModelConfig(
            form="encoder",
            backbone={**checkpoints.CONFIGS["bert"], "model_type": "bert", "num_labels": 5},
            num_memory=M,
            segment_length=12,
            vocab_size=VOCAB,
            width=32,
            num_logits=5,
            prefix_ids=(51,),
        )
    )


def changed_own(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A model.pt whose top-level value was changed."""
    save_model(path, own_model(), "{}")
    value = torch.load(path, weights_only=True)
    change(value)
    torch.save(value, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=2), "has format version '2'; this rmt-trt reads version 1"),
        (lambda v: v.update(format_version=torch.ones(3)), "has format version 'tensor"),
        (lambda v: v.pop("spec"), "'spec' is NoneType; expected a dict"),
        (lambda v: v.update(model=[1]), "'model' is list; expected a dict"),
        (lambda v: v["state_dict"].pop("memory"), "lacks 'memory'"),
        (
            lambda v: v["state_dict"].update(x=torch.zeros(1)),
            r"'state_dict' holds x \(torch.float32\); expected float32",
        ),
        (lambda v: v["state_dict"].update(memory=torch.zeros(3, 32).half()), r"holds memory \(torch.float16\)"),
        (lambda v: v["state_dict"]["memory"].add_(1), "not those that its fingerprint was taken of"),
        (lambda v: v["spec"].update(fingerprint="0" * 64), "not those that its fingerprint was taken of"),
        (lambda v: v["spec"].update(segment_length=11), "step spec and its model config disagree"),
        (lambda v: v["spec"].update(colour=1), r"unknown fields \['colour'\]"),
        (lambda v: v["model"].update(colour=1), "not a JSON object with the fields"),
        (lambda v: v["model"].update(backbone=torch.zeros(1)), "holds more than JSON values"),
        (lambda v: v["model"].update(prefix_ids=[VOCAB]), "prefix_ids are .60,.; expected token ids below 60"),
        (lambda v: v["model"].update(suffix_ids=["a"]), "suffix_ids is .*; expected a list of token ids"),
        (lambda v: v["model"].update(pad_id=-1), "pad_id is -1; expected a token id below 60"),
        (lambda v: v["model"]["backbone"].update(num_hidden_layers=3), "16 missing"),
        (lambda v: v["model"]["backbone"].update(hidden_size=10**9), "hidden_size is 1000000000; expected"),
        (lambda v: v.update(tokenizer="{"), r"'tokenizer' is not the text of a tokenizer\.json"),
        (lambda v: v.update(tokenizer=5), r"'tokenizer' is not the text of a tokenizer\.json"),
    ],
)
def test_a_model_pt_that_is_damaged_says_where(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    file = changed_own(tmp_path / "model.pt", change)
    with pytest.raises(RMTError, match=message):
        load_model(file)


def test_a_model_pt_whose_logits_are_not_those_of_its_weights_is_refused(tmp_path: Path) -> None:
    def lie(value: dict[str, Any]) -> None:
        value["model"]["num_logits"] = value["spec"]["num_logits"] = 7

    with pytest.raises(FormatError, match="its config says 7 logits; its weights give 5"):
        load_model(changed_own(tmp_path / "model.pt", lie))


def test_options_that_model_pt_answers_itself_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", own_model())
    with pytest.raises(ContractError, match="says for itself what --config, --input-size would set; leave it out"):
        load_model(tmp_path / "model.pt", LoadOptions(config=tmp_path, input_size=5))


def test_what_model_pt_cannot_hold_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"holds float32 weights; this model has torch.float16. Call model.float"):
        save_model(tmp_path / "model.pt", own_model().half())
    with pytest.raises(ContractError, match=r"the tokenizer is not the text of a tokenizer\.json"):
        save_model(tmp_path / "model.pt", own_model(), "no json")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_nothing_half(tmp_path: Path) -> None:
    model = own_model()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # a file may not grow beyond this
    try:
        with pytest.raises(FormatError, match=r"cannot write .*model\.pt.*Nothing was left behind"):
            save_model(tmp_path / "model.pt", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def own_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, str]:
    file = tmp_path_factory.mktemp("own") / "model.pt"
    save_model(file, own_model(), "{}")
    return file.with_name("changed.pt"), file.read_bytes(), load_model(file).spec.fingerprint


@settings(max_examples=60, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), pickled=st.booleans())
def test_a_changed_byte_is_refused_or_changes_no_weight(
    own_bytes: tuple[Path, bytes, str], place: float, byte: int, pickled: bool
) -> None:
    file, data, fingerprint = own_bytes
    changed = bytearray(data)
    changed[int(place * (6000 if pickled else len(data)))] = byte  # the pickle stands first
    file.write_bytes(changed)
    try:
        loaded = load_model(file)
    except RMTError:
        return
    assert loaded.spec.fingerprint == fingerprint
