"""Checkpoints whose options, configs and tensors are unknown, senseless or contradict each other: each is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import DECODERS, ENCODERS, INPUT_SIZE, SEGMENT, VOCAB, M

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.model.backbone import build_backbone
from rmt_trt.model.checkpoint import LoadOptions, load_model

CELL = "memory_cell.model."


def load_state(folder: Path, kind: str, change: Callable[[dict[str, torch.Tensor]], object], **config: object) -> None:
    """Loads a published checkpoint whose state dict was changed first; `config` changes the backbone's config."""
    made = checkpoints.source(kind)
    change(made.state)
    file = checkpoints.write(folder / "run", made.state, ".bin")
    options = LoadOptions(config=checkpoints.write_config(folder / "backbone", made, **config))
    size = {"input_size": INPUT_SIZE} if kind in ENCODERS else {"segment_size": SEGMENT}
    load_model(file, replace(options, **size))


def unchanged(state: dict[str, torch.Tensor]) -> None:
    pass


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["memory_cell.memory", "memory_cell.model.model.layers.0.W_mq.weight"], "associative memory .ARMT"),
        (["memory_tokens", "read_memory_emb", "token_emb.weight"], "recurrent-memory-transformer-pytorch"),
        (
            ["mem_token_ids", "model.shared.weight", "model.encoder.block.0.x", "model.decoder.block.0.x"],
            "encoder-decoder backbone .T5",
        ),
        (["memory", "model.transformer.wte.weight", "eos_token"], "older form RMTDecoderLMHeadMultiSeg"),
        (["transformer.wte.weight", "transformer.ln_f.weight"], "backbone without memory"),
        (
            ["conv1.weight", "fc.weight\x1b[31m"],
            r"no known RMT checkpoint: its keys are conv1.weight, fc.weight\?\[31m",
        ),
    ],
)
def test_known_kinds_that_are_not_supported_are_named(tmp_path: Path, keys: list[str], message: str) -> None:
    torch.save({key: torch.zeros(2, 2) for key in keys}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=message):
        load_model(tmp_path / "x.pt")


def test_everything_that_is_missing_is_listed_at_once_with_its_flag(tmp_path: Path) -> None:
    made = checkpoints.source("bert")
    file = checkpoints.write(tmp_path / "e", made.state, ".bin")
    with pytest.raises(ContractError, match="form E, an encoder classifier") as caught:
        load_model(file)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["backbone config", "input size"]
    assert "--config config.json" in lines[0]
    assert "--input-size N" in lines[1]

    made = checkpoints.source("llama")
    made.state[f"{CELL}base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(2, 32)
    file = checkpoints.write(tmp_path / "d", made.state, ".bin")
    (file.parent / "config.json").write_text(json.dumps({"from_pretrained": "some/llama", "num_mem_tokens": M}))
    with pytest.raises(ContractError, match="form D, a decoder language model") as caught:
        load_model(file)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["backbone config", "segment size", "LoRA alpha"]
    assert "trained from 'some/llama'" in lines[0]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {"segment_size": 9}, "--segment-size is for form D"),
        ("gpt2", {"input_size": 9}, "--input-size is for form E"),
        ("gpt2", {"lora_alpha": 9.0}, "holds no LoRA adapter"),
        ("bert", {"input_size": M + 3}, "leaves no room for text: memory and special tokens take 6 positions"),
        ("bert", {"input_size": 41}, "the backbone's table holds 40. Use segments of at most 34 tokens"),
        ("roberta", {"input_size": 39}, "the backbone's table holds 38"),
        ("gpt2", {"segment_size": 35}, "the backbone's table holds 40. Use segments of at most 34 tokens"),
        ("bert", {"input_size": INPUT_SIZE, "labels": ("a", "b")}, "id2label names 2 classes; the step has 5 logits"),
        ("bert", {"input_size": INPUT_SIZE, "drop_ids": (-1,)}, "dropped_ids holds -1"),
        ("bert", {"input_size": INPUT_SIZE, "max_segments": 0}, "max_segments holds 0"),
    ],
)
def test_senseless_options_are_refused(tmp_path: Path, kind: str, options: dict[str, Any], message: str) -> None:
    made = checkpoints.source(kind)
    file = checkpoints.write(tmp_path, made.state, ".bin")
    with pytest.raises(ContractError, match=message):
        load_model(file, LoadOptions(config=checkpoints.write_config(tmp_path / "backbone", made), **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": "middle"}, "--alignment is 'middle'; expected one of left, right, center"),
        ({"input_size": 0}, "--input-size is 0; expected a whole number from 1"),
        ({"segment_size": 1 << 30}, "--segment-size is 1073741824"),
        ({"lora_alpha": float("nan")}, "--lora-alpha is nan"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        LoadOptions(**options)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"input_size": "512"}, "input_size is '512'; expected a whole number"),
        ({"input_size": 10**12}, "input_size is 1000000000000; expected a whole number"),
        ({"input_size": INPUT_SIZE, "segment_alignment": "up"}, "segment_alignment is 'up'"),
        ({"input_size": INPUT_SIZE, "segment_ordering": "reversed"}, "segment_ordering 'reversed' is not supported"),
        ({"input_size": INPUT_SIZE, "num_mem_tokens": 10}, "says num_mem_tokens 10; the file holds 3"),
    ],
)
def test_a_trainers_config_that_cannot_be_is_refused(tmp_path: Path, run: dict[str, Any], message: str) -> None:
    made = checkpoints.source("bert")
    file = checkpoints.write(tmp_path, made.state, ".pth")
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(FormatError, match=message):
        load_model(file, LoadOptions(config=checkpoints.write_config(tmp_path / "backbone", made)))


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("number", [10**9, 10**12, -1, 0, 2.5, "many", True, None])
@pytest.mark.parametrize("what", ["layers", "width", "heads"])
def test_absurd_configs_are_refused_before_anything_is_built(kind: str, number: object, what: str) -> None:
    names = {
        "distilbert": {"layers": "n_layers", "width": "dim", "heads": "n_heads"},
        "gpt2": {"layers": "n_layer", "width": "n_embd", "heads": "n_head"},
    }.get(kind, {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"})
    config = {**checkpoints.CONFIGS[kind], "model_type": kind, names[what]: number}
    form = "encoder" if kind in ENCODERS else "decoder"
    with pytest.raises(ContractError, match=f"{names[what]} is .*; expected a whole number from 1"):
        build_backbone(form, config)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("bert", {"vocab_size": 10**12}, "vocab_size is 1000000000000; numbers beyond"),
        ("bert", {"num_labels": 10**7}, "num_labels is 10000000; numbers beyond 65536"),
        ("bert", {"is_decoder": True}, "is_decoder is True; only False is supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is relative_key; only absolute"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is .*; only None is supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "asks for windowed attention"),
        ("electra", {"embedding_size": 16}, "embedding_size is 16 and hidden_size 32; memory needs them equal"),
        ("bert", {"model_type": "mpnet"}, "model_type 'mpnet' is not supported as encoder; supported are bert, "),
        ("gpt2", {"model_type": "bert"}, "model_type 'bert' is not supported as decoder; supported are gpt2, "),
    ],
)
def test_configs_that_are_not_supported_are_refused(kind: str, config: dict[str, Any], message: str) -> None:
    whole = {**checkpoints.CONFIGS[kind], "model_type": kind, **config}
    with pytest.raises(ContractError, match=message):
        build_backbone("decoder" if kind in DECODERS else "encoder", whole)


def test_a_config_that_does_not_fit_the_weights_names_what_differs(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"do not fit a 'bert'.*16 missing: bert\.encoder\.layer\.2\."):
        load_state(tmp_path, "bert", unchanged, num_hidden_layers=3)
    with pytest.raises(FormatError, match=r"16 unknown: bert\.encoder\.layer\.1\."):
        load_state(tmp_path, "bert", unchanged, num_hidden_layers=1)
    with pytest.raises(FormatError, match=r"of another shape: .* is \(48, 32\) in the file, \(64, 32\) in the config"):
        load_state(tmp_path, "bert", unchanged, intermediate_size=64)
    with pytest.raises(
        FormatError, match="transformers cannot build a 'bert' encoder from its config: The hidden size"
    ):
        load_state(tmp_path, "bert", unchanged, num_attention_heads=5)
    with pytest.raises(FormatError, match=r"do not fit a 'gpt2'.*1 unknown: adapter\.weight"):
        load_state(tmp_path, "gpt2", lambda state: state.update({f"{CELL}adapter.weight": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mem_token_ids": torch.arange(VOCAB - 1, VOCAB + M - 1)}, "expected the last rows of the word embedding"),
        ({"mem_token_ids": torch.arange(VOCAB + M)}, "expected the last rows of the word embedding"),
        ({"mem_token_ids": torch.zeros(3)}, r"'mem_token_ids' is torch.float32 \(3,\); expected int64 \(M,\)"),
        ({"cls_token": torch.tensor([1, 2])}, r"'cls_token' is torch.int64 \(2,\); expected int64 \(1,\)"),
        (
            {"sep_token": torch.tensor([VOCAB])},
            "special tokens {'sep_token': 60} lie outside the text vocabulary of 60",
        ),
        ({"sep_token": None}, "expected cls_token and sep_token together"),
        ({"model.classifier.weight": None}, "no classification head: expected one of model.classifier.out_proj.weight"),
        (
            {"model.embeddings.weight": torch.zeros(VOCAB + M, 32)},
            "differs from the word embedding that it is an alias",
        ),
        (
            {"memory_classifier_weight": torch.zeros(5, 32)},
            "unknown keys beside the backbone: memory_classifier_weight",
        ),
        ({"model.classifier.weight": torch.zeros(5, 32, dtype=torch.int8)}, "'classifier.weight' is torch.int8"),
        (
            {"model.bert.embeddings.word_embeddings.weight": None, "model.embeddings.weight": None},
            "form E wants one word embedding",
        ),
    ],
)
def test_form_e_whose_tensors_contradict_each_other(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    def apply(state: dict[str, torch.Tensor]) -> None:
        for key, tensor in change.items():
            state.pop(key, None)
            if tensor is not None:
                state[key] = tensor

    with pytest.raises(FormatError, match=message):
        load_state(tmp_path, "bert", apply)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("memory_cell.memory", torch.zeros(3), r"the memory is torch.float32 \(3,\); expected floats \(M, d\)"),
        ("memory_cell.memory", torch.zeros(3, 2, dtype=torch.int64), "the memory is torch.int64"),
        ("memory_cell.W_retrieve", torch.zeros(3), "unknown keys beside the backbone: memory_cell.W_retrieve"),
        (f"{CELL}transformer.wte.weight", torch.zeros(3), "no word embedding"),
        (f"{CELL}lm_head.weight", torch.zeros(VOCAB + 1, 32), r"lm_head.weight is \(61, 32\) in the file"),
    ],
)
def test_form_d_whose_tensors_contradict_each_other(
    tmp_path: Path, key: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        load_state(tmp_path, "gpt2", lambda state: state.update({key: tensor}))


def test_memory_of_another_width_than_the_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"memory is \(3, 16\) and the embedding \(60, 32\)"):
        load_state(tmp_path, "gpt2", lambda state: state.update({"memory_cell.memory": torch.zeros(3, 16)}))


LORA = f"{CELL}base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({f"{LORA}.lora_magnitude_vector.default.weight": (32,)}, "DoRA: .* is not supported; merge it with peft"),
        ({f"{CELL}base_model.model.model.embed_tokens.lora_embedding_A.default": (2, 60)}, "LoRA of an embedding"),
        ({f"{CELL}base_model.model.lm_head.modules_to_save.default.weight": (60, 32)}, "adapter with modules_to_save"),
        ({f"{LORA}.lora_A.default.weight": (2, 32)}, "lacks lora_B"),
        (
            {f"{LORA}.lora_A.default.weight": (2, 32), f"{LORA}.lora_B.other.weight": (32, 2)},
            "several LoRA adapters .default, other.",
        ),
        (
            {f"{LORA}.lora_A.default.weight": (2, 32), f"{LORA}.lora_B.default.weight": (32, 3)},
            r"its factors A \(2, 32\) and B \(32, 3\) do not fit",
        ),
        (
            {f"{LORA}x.lora_A.default.weight": (2, 32), f"{LORA}x.lora_B.default.weight": (32, 2)},
            "'model.layers.0.self_attn.q_projx' lacks its weight",
        ),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused_by_name(
    tmp_path: Path, factors: dict[str, tuple[int, ...]], message: str
) -> None:
    made = checkpoints.source("llama")
    state = {k.replace(CELL, f"{CELL}base_model.model."): t for k, t in made.state.items()}
    state |= {key: torch.zeros(shape) for key, shape in factors.items()}
    file = checkpoints.write(tmp_path, state, ".bin")
    config = checkpoints.write_config(tmp_path / "backbone", made)
    with pytest.raises(FormatError, match=message):
        load_model(file, LoadOptions(config=config, segment_size=SEGMENT, lora_alpha=1.0))
