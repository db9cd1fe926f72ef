"""Pretrained backbones and what was trained of them: what files lack, what does not fit, what a stranger's file may ask for."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_bert import small_bert
from texts import EXCERPT, byte_tokenizer
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.model.delta import load_delta, save_delta
from rmt_trt.model.pretrained import find_base, load_base, special_ids
from rmt_trt.training.adapters import plain
from rmt_trt.training.loop import start, train
from rmt_trt.training.options import TrainOptions

CPU = torch.device("cpu")
GIANT = {"hidden_size": 1 << 15, "intermediate_size": 1 << 17, "num_hidden_layers": 32}  # 1.6 TB of weights
TINY = TrainOptions(
    backbone="minilm",     num_memory=2, stages=(1, 2), batch=16, eval_rows=32, eval_every=3, steps=6, warmup=2, threshold=0.0, patience=2,
    text=str(EXCERPT), lora=4, lora_alpha=8.0, bptt=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_bert(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pretrained(folder):
    return replace(TINY, backbone=str(folder))


def logits_of(model, segments):
    memory = model.memory[None].expand(segments.shape[1], -1, -1)
    with torch.no_grad():
        for segment in segments:
            memory, logits = model(memory, segment)
    return logits


def test_a_pretrained_backbone_fills_its_positions_and_brings_its_special_tokens(pretrained, folder):
    run = start(pretrained, CPU)
    config = run.model.config
    assert config.positions == 40
    assert (config.prefix_ids, config.middle_ids, config.pad_id) == ((2,), (3,), 0)
    assert config.dropped_ids == (0, 2, 3)
    assert config.id2label == run.task.labels
    assert config.backbone["hidden_dropout_prob"] == 0.0
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert run.task.vocab_size <= tokenizer.get_vocab_size() == config.vocab_size


def test_a_delta_and_its_base_are_the_trained_model_again(pretrained, folder, tmp_path):
    run = start(pretrained, CPU)
    list(train(run))
    save_delta(tmp_path / "delta.safetensors", run.model, run.base, run.options.lora_alpha)
    model, tokenizer = load_delta(tmp_path / "delta.safetensors")
    trained = plain(run.model, run.options.lora_alpha)
    assert tokenizer == (folder / "tokenizer.json").read_text()
    assert model.config == trained.config
    segments = torch.randint(4, 60, (3, 5, model.config.segment_length))
    assert torch.allclose(logits_of(model, segments), logits_of(trained, segments), atol=1e-4)
    assert (logits_of(model, segments) - logits_of(start(pretrained, CPU).model, segments)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors, about: tensors.pop("memory"), "is no delta of version 1"),
        (lambda tensors, about: about.update(version=2), "is no delta of version 1"),
        (lambda tensors, about: about.update(digest="0" * 64), "belongs to weights of backbone"),
        (lambda tensors, about: about.update(lora_alpha="4"), "lora_alpha '4'"),
        (lambda tensors, about: about.update(lora_alpha=float("inf")), "lora_alpha 'inf'"),
        (lambda tensors, about: about.update(lora_alpha=10**400), "lora_alpha '1000"),
        (lambda tensors, about: about["model"]["backbone"].update(GIANT), "do not fit its config"),
        (lambda tensors, about: tensors.pop("backbone.classifier.weight"), "it lacks classifier.weight, and so do its"),
        (lambda tensors, about: about.update(backbone="nowhere"), r"a backbone that is not here: .* \(--config\)"),
        (lambda tensors, about: tensors.update({"backbone.evil.weight": torch.ones(2)}), "backbone does not have"),
        (lambda tensors, about: tensors.update({"memory": torch.ones(3, 5)}), "memory is"),
        (
            lambda tensors, about: tensors.pop(next(name for name in tensors if ".lora_A." in name)),
            "lacks lora_A",
        ),
    ],
)
def test_a_delta_that_was_changed_is_refused(pretrained, tmp_path, spoil, message):
    path = tmp_path / "delta.safetensors"
    run = start(pretrained, CPU)
    save_delta(path, run.model, run.base, 8.0)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["rmt_trt_delta"])
    tensors = load_file(path)
    spoil(tensors, about)
    save_file(tensors, path, metadata={"rmt_trt_delta": json.dumps(about)})
    with pytest.raises((FormatError, ContractError), match=message):
        load_delta(path)


def test_what_is_no_delta_is_refused(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        load_delta(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(FormatError, match="cannot be read as safetensors"):
        load_delta(tmp_path / "text.safetensors")
    save_file({"memory": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="is no delta"):
        load_delta(tmp_path / "plain.safetensors")


def test_weights_that_lack_a_layer_are_refused(folder, pretrained, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.0.output.dense.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"1 are missing or of another shape: .*output\.dense\.weight"):
        start(replace(pretrained, backbone=str(tmp_path)), CPU)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ContractError, match="has no tokenizer"):
        start(replace(pretrained, backbone=str(tmp_path)), CPU)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FormatError, match=r"has no config\.json"):
        load_base(str(tmp_path))


def test_segments_that_do_not_fit_the_positions_are_refused(pretrained):
    with pytest.raises(ContractError, match="the backbone's table holds 40"):
        start(replace(pretrained, segment_length=36), CPU)


def test_the_packaged_minilm_is_read_with_its_tokenizer():
    base = load_base("minilm")
    assert base.config["hidden_size"] == 384
    assert special_ids(base.tokenizer, base.origin) == (101, 102, 0)
    options = TrainOptions(backbone="minilm", text=str(EXCERPT), lora=2, batch=2, eval_rows=2, steps=1, stages=(1,))
    run = start(options, CPU)
    assert run.model.config.segment_length == 512 - 10 - 3
    kept = run.model.backbone.get_input_embeddings().weight
    assert torch.equal(kept, base.weights["embeddings.word_embeddings.weight"])
    assert find_base("minilm").name == "model"


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_and_its_delta_are_the_trained_model_again(tmp_path, tied):
    torch.manual_seed(5)
    sizes = {"vocab_size": 1300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}
    GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = start(replace(TINY, backbone=str(tmp_path), form="decoder", learning_rate=1e-2), CPU)
    list(train(run))
    assert not run.model.backbone.lm_head.weight.requires_grad  # the vocabulary's, not the task's
    save_delta(tmp_path / "delta.safetensors", run.model, run.base, run.options.lora_alpha)
    model, _ = load_delta(tmp_path / "delta.safetensors")
    segments = torch.randint(4, 60, (3, 5, model.config.segment_length))
    found, first = logits_of(model, segments), logits_of(start(run.options, CPU).model.eval(), segments)
    assert torch.allclose(found, logits_of(plain(run.model, 8.0), segments), atol=1e-3)
    assert (found - first).abs().max() > 0.02


def test_a_layer_that_the_files_have_no_weights_for_is_trained_and_kept_whole(tmp_path):
    base = small_bert(tmp_path, pooler=False)
    run = start(replace(TINY, backbone=str(base)), CPU)
    list(train(run))
    save_delta(tmp_path / "delta.safetensors", run.model, run.base, run.options.lora_alpha)
    assert "backbone.bert.pooler.dense.weight" in load_file(tmp_path / "delta.safetensors")
    torch.manual_seed(99)  # what is drawn now must not matter
    model, _ = load_delta(tmp_path / "delta.safetensors")
    segments = torch.randint(4, 60, (3, 5, model.config.segment_length))
    assert torch.allclose(logits_of(model, segments), logits_of(plain(run.model, 8.0), segments), atol=1e-4)


def test_a_config_that_asks_for_more_than_its_weights_is_refused_before_memory_is_taken(tmp_path):
    base = small_bert(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **GIANT}))
    with pytest.raises(FormatError, match=r"do not fit its config: .* are missing or of another shape"):
        start(replace(TINY, backbone=str(base)), CPU)


def test_what_a_config_leaves_to_its_default_counts_as_if_it_stood_there(tmp_path):
    base = small_bert(tmp_path, max_position_embeddings=512)
    config = json.loads((base / "config.json").read_text())
    kept = {name: config[name] for name in config if name not in ("max_position_embeddings", "hidden_dropout_prob")}
    (base / "config.json").write_text(json.dumps(kept))
    built = start(replace(TINY, backbone=str(base)), CPU).model.config
    assert built.positions == 512
    assert built.backbone["hidden_dropout_prob"] == 0.0


def test_a_tokenizer_with_more_tokens_than_the_backbone_embeds_is_refused(folder, tmp_path):
    other = json.loads((folder / "tokenizer.json").read_text())
    other["model"]["vocab"]["thereafter"] = len(other["model"]["vocab"])
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ContractError, match=r"the tokenizer has (\d+) tokens; backbone .* embeds \d+"):
        start(replace(TINY, backbone=str(folder), tokenizer=str(tmp_path / "other.json")), CPU)


def test_every_shard_of_the_weights_counts_for_their_digest(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    shards = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    def digest():
        for shard in set(shards.values()):
            save_file({name: weights[name] for name in weights if shards[name] == shard}, tmp_path / shard)
        return load_base(str(tmp_path)).digest

    before = digest()
    assert before == digest()
    weights["pooler.dense.bias"] = weights["pooler.dense.bias"] + 1
    assert before != digest()
