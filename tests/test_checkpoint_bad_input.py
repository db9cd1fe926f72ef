"""Checkpoints from strangers: every refusal is one clear message, no code of theirs runs, no size is believed."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import DECODERS, ENCODERS, INPUT_SIZE, SEGMENT, VOCAB, M
from hypothesis import given, settings
from hypothesis import strategies as st

from rmt_trt.errors import ContractError, FormatError, RMTError
from rmt_trt.model.backbone import build_backbone
from rmt_trt.model.checkpoint import LoadOptions, load_model, save_model
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.step import build_model

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
