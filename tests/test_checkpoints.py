"""Published checkpoints are read so that they compute what their source model computes, and model.pt goes round."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import (
    DECODERS,
    ENCODERS,
    INPUT_SIZE,
    LABELS,
    MORE_DECODERS,
    MORE_ENCODERS,
    SEGMENT,
    SPECIAL,
    VOCAB,
    M,
)

from rmt_trt.model.checkpoint import LoadedModel, LoadOptions, load_model, save_model
from rmt_trt.model.recurrence import recurrence
from rmt_trt.model.step import model_spec

TEXT = INPUT_SIZE - M - 3  # text tokens in a segment of form E


def options_for(made: checkpoints.Source, folder: Path, **more: object) -> LoadOptions:
    options = LoadOptions(config=checkpoints.write_config(folder / "backbone", made))
    if made.encoder:
        return replace(options, input_size=INPUT_SIZE, **more)
    return replace(options, segment_size=SEGMENT, **more)


def load(made: checkpoints.Source, folder: Path, container: str = ".bin", **more: object) -> LoadedModel:
    return load_model(checkpoints.write(folder / "run", made.state, container), options_for(made, folder, **more))


def document(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 50, length).tolist()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm())


def assert_same_answers(loaded: LoadedModel, made: checkpoints.Source, tokens: list[int], cut: list[list[int]]) -> None:
    expected, got = checkpoints.published_run(made, cut), list(recurrence(loaded.model, tokens))
    assert len(got) == len(expected)
    for (memory, logits), (memory_wanted, logits_wanted) in zip(got, expected, strict=True):
        assert relative_error(memory, memory_wanted) < 1e-4
        assert relative_error(logits, logits_wanted) < 1e-4
    start = checkpoints.published_run(made, cut[-1:])[0][1]  # the last segment alone: without memory of the others
    assert relative_error(start, expected[-1][1]) > 1e-2, "memory has no say: nothing is compared"


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("container", [".pth", ".bin", ".safetensors", "sharded", "sharded-bin"])
def test_form_e_computes_what_the_source_computes(tmp_path: Path, kind: str, container: str) -> None:
    made = checkpoints.source(kind)
    loaded = load(made, tmp_path, container)
    assert loaded.spec.segment_length == TEXT
    tokens = document(1, 2 * TEXT + 5)
    assert_same_answers(loaded, made, tokens, [tokens[:5], tokens[5 : 5 + TEXT], tokens[5 + TEXT :]])


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("container", [".pth", ".bin", ".safetensors", "sharded", "sharded-bin"])
def test_form_d_computes_what_the_source_computes(tmp_path: Path, kind: str, container: str) -> None:
    made = checkpoints.source(kind)
    loaded = load(made, tmp_path, container)
    assert loaded.spec.segment_length == SEGMENT
    tokens = document(2, 2 * SEGMENT + 4)
    assert_same_answers(loaded, made, tokens, [tokens[:10], tokens[10:20], tokens[20:]])


@pytest.mark.parametrize("kind", [*ENCODERS, *MORE_ENCODERS, *DECODERS, *MORE_DECODERS])
def test_the_step_itself_agrees_with_the_source_model(tmp_path: Path, kind: str) -> None:
    made = checkpoints.source(kind)
    model = load(made, tmp_path).model
    text = document(3, 7)
    (memory, logits), (memory_after, logits_after) = checkpoints.published_run(made, [text, text])
    with torch.no_grad():
        new_memory, new_logits = model(model.memory[None], torch.tensor([text]))
        assert relative_error(new_memory[0], memory) < 1e-4
        assert relative_error(new_logits[0], logits) < 1e-4
        new_memory, new_logits = model(memory[None], torch.tensor([text]))
    assert relative_error(new_memory[0], memory_after) < 1e-4
    assert relative_error(new_logits[0], logits_after) < 1e-4


def test_form_e_without_special_tokens_is_memory_and_text_alone(tmp_path: Path) -> None:
    made = checkpoints.source("bert")
    del made.state["cls_token"], made.state["sep_token"]
    loaded = load(made, tmp_path)
    size = INPUT_SIZE - M
    assert (loaded.spec.segment_length, loaded.spec.dropped_ids) == (size, (0,))
    tokens = document(8, 2 * size)
    assert_same_answers(loaded, made, tokens, [tokens[:size], tokens[size:]])


def test_spec_of_form_e_says_what_the_published_code_does(tmp_path: Path) -> None:
    spec = load(checkpoints.source("bert"), tmp_path).spec
    assert (spec.form, spec.logits, spec.num_logits, spec.alignment) == ("encoder", "classifier", LABELS, "right")
    assert spec.vocab_size == VOCAB
    assert spec.states[0].shape == (M, 32)
    assert spec.dropped_ids == (0, *SPECIAL["bert"].values())
    assert len(spec.fingerprint) == 64


def test_spec_of_form_d_says_what_the_published_code_does(tmp_path: Path) -> None:
    spec = load(checkpoints.source("llama"), tmp_path).spec
    assert (spec.form, spec.logits, spec.num_logits, spec.alignment) == ("decoder", "lm", VOCAB, "left")
    assert (spec.vocab_size, spec.dropped_ids) == (VOCAB, ())


def test_roberta_keeps_the_ids_that_are_listed_twice(tmp_path: Path) -> None:
    made = checkpoints.source("roberta")
    assert load(made, tmp_path).spec.dropped_ids == (1,)
    assert load(made, tmp_path, drop_ids=(0, 1, 2)).spec.dropped_ids == (0, 1, 2)


def test_memory_is_the_last_rows_of_the_embedding_and_is_cut_off(tmp_path: Path) -> None:
    made = checkpoints.source("bert")
    model = load(made, tmp_path).model
    words = made.state["model.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(model.memory.detach(), words[VOCAB:])
    assert torch.equal(model.backbone.get_input_embeddings().weight.detach(), words[:VOCAB])


def test_vocabulary_comes_from_the_tensor_not_from_the_config(tmp_path: Path) -> None:
    made = checkpoints.source("bert")
    file = checkpoints.write(tmp_path, made.state, ".bin")
    config = checkpoints.write_config(tmp_path / "backbone", made, vocab_size=VOCAB + M, num_labels=2)
    loaded = load_model(file, LoadOptions(config=config, input_size=INPUT_SIZE))
    assert (loaded.spec.vocab_size, loaded.spec.num_logits) == (VOCAB, LABELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_half_precision_weights_are_held_as_float32(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    made = checkpoints.source(kind, dtype=dtype)
    file = checkpoints.write(tmp_path, made.state, ".bin")
    config = checkpoints.write_config(tmp_path / "backbone", made, torch_dtype=str(dtype).removeprefix("torch."))
    size = {"input_size": INPUT_SIZE} if kind in ENCODERS else {"segment_size": SEGMENT}
    loaded = load_model(file, LoadOptions(config=config, **size))
    assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.float32}
    size = loaded.spec.segment_length
    tokens = document(4, 2 * size)
    assert_same_answers(loaded, made, tokens, [tokens[:size], tokens[size:]])


def test_head_that_differs_from_the_embedding_stays_apart(tmp_path: Path) -> None:
    made = checkpoints.source("gpt2")
    head = "memory_cell.model.lm_head.weight"
    made.state[head] = made.state[head] + 1
    model = load(made, tmp_path).model
    assert torch.equal(model.backbone.lm_head.weight.detach(), made.state[head])
    assert torch.equal(
        model.backbone.transformer.wte.weight.detach(), made.state["memory_cell.model.transformer.wte.weight"]
    )


def test_head_that_is_absent_is_tied(tmp_path: Path) -> None:
    made = checkpoints.source("qwen2")
    wanted = made.state.pop("memory_cell.model.lm_head.weight")
    backbone = load(made, tmp_path).model.backbone
    assert backbone.lm_head.weight is backbone.model.embed_tokens.weight
    assert torch.equal(backbone.lm_head.weight.detach(), wanted)


OLD_CONSTANTS = {
    "bert": {"model.bert.embeddings.position_ids": torch.arange(40)[None]},
    "gpt2": {
        "memory_cell.model.transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "memory_cell.model.transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    },
    "gpt_neox": {
        "memory_cell.model.gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "memory_cell.model.gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.zeros(4),
    },
    "llama": {"memory_cell.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)},
}


@pytest.mark.parametrize("kind", OLD_CONSTANTS)
def test_constants_that_older_files_carry_are_left_out(tmp_path: Path, kind: str) -> None:
    made = checkpoints.source(kind)
    wanted = load(made, tmp_path / "new").spec
    made.state.update(OLD_CONSTANTS[kind])
    assert load(made, tmp_path / "old").spec == wanted


@pytest.mark.parametrize("wrap", ["state_dict", "model", "module"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_of_trainers_are_taken_off(tmp_path: Path, wrap: str, prefix: str) -> None:
    made = checkpoints.source("distilbert")
    plain = load(made, tmp_path / "plain")
    torch.save({wrap: {prefix + key: value for key, value in made.state.items()}}, tmp_path / "x.pt")
    assert load_model(tmp_path / "x.pt", options_for(made, tmp_path)).spec == plain.spec


def test_trainer_folder_with_the_numbers_that_trainers_store(tmp_path: Path) -> None:
    made = checkpoints.source("bert")
    run = {
        "model_type": "encoder",  # the trainer's own argument, not the backbone's
        "model_cls": "modeling_rmt:RMTEncoderForSequenceClassification",
        "from_pretrained": "bert-base-cased",
        "input_size": INPUT_SIZE,
        "num_mem_tokens": M,
        "max_n_segments": 7,
        "segment_alignment": "left",
        "segment_ordering": "regular",
    }
    torch.save(
        {"model_state_dict": made.state, "best": np.float64(0.5), "optimizer_state_dict": {"state": {}, "lr": 0.1}},
        tmp_path / "model_best.pth",
    )
    (tmp_path / "config.json").write_text(json.dumps(run))
    config = checkpoints.write_config(tmp_path / "backbone", made)
    spec = load_model(tmp_path, LoadOptions(config=config)).spec
    assert (spec.segment_length, spec.alignment, spec.max_segments) == (TEXT, "left", 7)
    spec = load_model(tmp_path, LoadOptions(config=config, input_size=20, alignment="center", max_segments=2)).spec
    assert (spec.segment_length, spec.alignment, spec.max_segments) == (20 - M - 3, "center", 2), "flags win"


@pytest.mark.parametrize("container", [".bin", ".safetensors"])
def test_newer_trainer_folder_has_its_config_one_level_above(tmp_path: Path, container: str) -> None:
    made = checkpoints.source("gpt2")
    file = checkpoints.write(tmp_path / "run" / "model_best", made.state, container)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"segment_size": SEGMENT, "max_n_segments": -1}))
    options = LoadOptions(config=checkpoints.write_config(tmp_path / "backbone", made))
    specs = [load_model(path, options).spec for path in (tmp_path / "run", file.parent, file)]
    assert specs[0].segment_length == SEGMENT
    assert specs[0] == specs[1] == specs[2]


def test_backbone_config_beside_the_weights_is_found(tmp_path: Path) -> None:
    made = checkpoints.source("bert")
    checkpoints.write(tmp_path, made.state, ".safetensors")
    names = [f"place {i}" for i in range(LABELS)]
    checkpoints.write_config(tmp_path, made, id2label=dict(enumerate(names)))
    assert load_model(tmp_path, LoadOptions(input_size=INPUT_SIZE)).spec.id2label == tuple(names)
    labels = ("a", "b", "c", "d", "e")
    assert load_model(tmp_path, LoadOptions(input_size=INPUT_SIZE, labels=labels)).spec.id2label == labels


def test_tokenizer_beside_the_weights_is_taken_unless_another_is_given(tmp_path: Path) -> None:
    made = checkpoints.source("bert")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text('{"version": "beside"}')
    (tmp_path / "tokenizer.json").write_text('{"version": "given"}')
    assert load(made, tmp_path).tokenizer == '{"version": "beside"}'
    assert load(made, tmp_path, tokenizer=tmp_path).tokenizer == '{"version": "given"}'


def lora_state(
    made: checkpoints.Source, layers: tuple[str, ...], rank: int, base_layer: bool
) -> dict[str, torch.Tensor]:
    """The state dict that peft writes around the backbone, with random factors on some layers."""
    prefix = "memory_cell.model."
    state = {"memory_cell.memory": made.state["memory_cell.memory"]}
    for key, tensor in made.state.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            layer = name.rpartition(".")[0]
            if base_layer and layer in layers:
                name = f"{layer}.base_layer.{name.rpartition('.')[2]}"
            state[f"{prefix}base_model.model.{name}"] = tensor
    for layer in layers:
        weight = made.backbone.get_submodule(layer).weight
        fan_in, fan_out = weight.shape if made.kind == "gpt2" else tuple(reversed(weight.shape))
        stem = f"{prefix}base_model.model.{layer}"
        state[f"{stem}.lora_A.default.weight"] = torch.randn(rank, fan_in)
        state[f"{stem}.lora_B.default.weight"] = torch.randn(fan_out, rank)
    return state


@pytest.mark.parametrize("base_layer", [False, True])
@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("gpt2", ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj")),
        ("llama", ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")),
    ],
)
def test_lora_is_merged_as_w_plus_scale_b_a(
    tmp_path: Path, kind: str, layers: tuple[str, ...], base_layer: bool
) -> None:
    made = checkpoints.source(kind)
    state = lora_state(made, layers, rank=2, base_layer=base_layer)
    file = checkpoints.write(tmp_path, state, ".bin")
    loaded = load_model(file, options_for(made, tmp_path, lora_alpha=6.0))
    for layer in layers:
        stem = f"memory_cell.model.base_model.model.{layer}"
        delta = 3.0 * state[f"{stem}.lora_B.default.weight"] @ state[f"{stem}.lora_A.default.weight"]
        weight = made.backbone.get_submodule(layer).weight
        with torch.no_grad():
            weight += delta.T if kind == "gpt2" else delta
        torch.testing.assert_close(loaded.model.backbone.get_submodule(layer).weight, weight)
    tokens = document(6, 14)
    assert_same_answers(loaded, made, tokens, [tokens[:10], tokens[10:]])


def test_lora_alpha_comes_from_the_trainers_config(tmp_path: Path) -> None:
    made = checkpoints.source("llama")
    layer = "model.layers.0.self_attn.q_proj"
    file = checkpoints.write(tmp_path, lora_state(made, (layer,), 2, True), ".bin")
    by_flag = load_model(file, options_for(made, tmp_path, lora_alpha=32.0)).spec
    (tmp_path / "config.json").write_text(
        json.dumps({"use_lora": True, "lora_attn_alpha": 32, "segment_size": SEGMENT})
    )
    assert load_model(file, LoadOptions(config=tmp_path / "backbone")).spec == by_flag


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_model_pt_goes_round_bit_for_bit_and_needs_no_option(tmp_path: Path, kind: str) -> None:
    first = load(checkpoints.source(kind), tmp_path, max_segments=7)
    file = tmp_path / "model.pt"
    save_model(file, first.model, '{"version": "1.0"}')
    again = load_model(file)
    assert (again.spec, again.tokenizer) == (first.spec, '{"version": "1.0"}')
    assert model_spec(again.model) == first.spec
    for (memory, logits), (memory_wanted, logits_wanted) in zip(
        recurrence(again.model, document(7, 33)), recurrence(first.model, document(7, 33)), strict=True
    ):
        assert torch.equal(memory, memory_wanted)
        assert torch.equal(logits, logits_wanted)
    assert torch.load(file, weights_only=True)["format"] == "rmt-trt-model"
    assert [path.name for path in tmp_path.glob(".model.pt*")] == []


def test_model_pt_stores_tied_weights_once_and_no_rows_that_were_cut_off(tmp_path: Path) -> None:
    for kind in ("gpt2", "bert"):
        model = load(checkpoints.source(kind), tmp_path / kind).model
        save_model(tmp_path / f"{kind}.pt", model)
        values = sum(tensor.numel() for tensor in model.parameters())
        assert (tmp_path / f"{kind}.pt").stat().st_size < 4 * values + 40_000


def test_options_on_top_of_model_pt(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", load(checkpoints.source("bert"), tmp_path).model)
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded = load_model(
        tmp_path / "model.pt",
        LoadOptions(
            alignment="left",
            drop_ids=(3,),
            labels=tuple("abcde"),
            max_segments=9,
            tokenizer=tmp_path / "tokenizer.json",
        ),
    )
    spec = loaded.spec
    assert (spec.alignment, spec.dropped_ids, spec.id2label, spec.max_segments) == ("left", (3,), tuple("abcde"), 9)
    assert loaded.tokenizer == "{}"
    assert loaded.model.config.alignment == "left"


def test_saving_that_is_interrupted_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    model = load(checkpoints.source("gpt2"), tmp_path).model
    folder = tmp_path / "out"
    folder.mkdir()
    save_model(folder / "model.pt", model)
    before = (folder / "model.pt").read_bytes()
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import sys, torch\n"
        "from rmt_trt.model import checkpoint\n"
        "loaded = checkpoint.load_model(sys.argv[1])\n"
        "def slow(value, file):\n"
        "    file.write_bytes(b'half'); print('writing', flush=True)\n"
        "    import time; time.sleep(60)\n"
        "checkpoint.torch.save = slow\n"
        "checkpoint.save_model(sys.argv[1], loaded.model)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder / "model.pt")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len(list(folder.iterdir())) == 2, "it is writing beside the old file"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in stderr
    assert [path.name for path in folder.iterdir()] == ["model.pt"]
    assert (folder / "model.pt").read_bytes() == before
