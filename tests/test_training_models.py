"""Training in all its forms: decoders, LoRA round pretrained weights, parts of a batch, several processes, what stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from rmt_trt.commands.train import app
from rmt_trt.errors import ContractError, EngineError, FormatError
from rmt_trt.model.checkpoint import load_model
from rmt_trt.model.delta import load_delta, save_delta
from rmt_trt.model.pretrained import find_base, load_base, special_ids
from rmt_trt.training.adapters import plain
from rmt_trt.training.loop import start, train
from rmt_trt.training.options import TrainOptions
from rmt_trt.training.resume import load_run, save_run

CPU = torch.device("cpu")
TEXT = Path(__file__).parent / "data" / "coriolanus.txt"
TINY = TrainOptions(
    layers=1, width=32, heads=2, segment_length=16, num_memory=2, stages=(1, 2), batch=16, eval_rows=32, eval_every=3,
    steps=6, warmup=2, threshold=0.0, patience=2,
)  # fmt: skip


def losses(options, device=CPU):
    return [(report.step, report.loss, report.accuracy) for report in train(start(options, device)) if report]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained BERT of one small layer, as Hugging Face saves it, with a tokenizer of its own."""
    where = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = "Daniel John Mary Sandra bathroom bedroom garden hallway kitchen office went moved travelled journeyed back to the Where is"
    tokenizer.train_from_iterator(
        [*TEXT.read_text().splitlines(), words], trainers.WordLevelTrainer(special_tokens=special)
    )
    tokenizer.save(str(where / "tokenizer.json"))
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40, hidden_dropout_prob=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(where)
    return where


@pytest.fixture
def pretrained(folder):
    return replace(TINY, backbone=str(folder), text=str(TEXT), segment_length=0, lora=4, lora_alpha=8.0, bptt=0)


def test_two_runs_of_one_seed_have_equal_losses_and_another_seed_has_others():
    first = losses(TINY)
    assert first == losses(TINY)
    assert first != losses(replace(TINY, seed=1))


def test_a_decoder_learns_to_say_the_answer():
    options = replace(
        TINY, form="decoder", layers=2, stages=(1,), threshold=1.0, batch=64, steps=120, eval_every=40,
        learning_rate=3e-3, warmup=20, eval_rows=128,
    )  # fmt: skip
    run = start(options, CPU)
    reports = [report for report in train(run) if report]
    assert reports[0].loss > 2 > 0.2 > reports[-1].loss  # of 333 words, not of six classes
    assert reports[-1].accuracy > 0.9
    assert run.model.config.spec().logits == "lm"


@pytest.mark.parametrize("form", ["encoder", "decoder"])
def test_a_batch_in_parts_and_segments_computed_again_change_rounding_alone(form):
    options = replace(TINY, form=form)
    whole = losses(options)
    for other in (replace(options, accumulate=4), replace(options, checkpointing=True)):
        found = losses(other)
        assert [step for step, *_ in found] == [step for step, *_ in whole]
        assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in whole], abs=1e-4)


def test_without_memory_nothing_is_carried_and_no_model_is_written(tmp_path):
    run = start(replace(TINY, num_memory=0), CPU)
    list(train(run))
    segments = torch.randint(4, 300, (2, 3, 16))
    other = segments.clone()
    other[0] = torch.randint(4, 300, (3, 16))
    run.unrolled.eval()
    with torch.no_grad():
        assert torch.equal(run.unrolled(segments), run.unrolled(other))
    flags = "--layers 1 --width 32 --heads 2 --segment-length 16 --num-memory 0 --stages 1 --batch 8 --eval-rows 8 --steps 2"
    result = CliRunner().invoke(app, [str(tmp_path / "run"), *flags.split(), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "no model.pt is made of it" in result.output
    assert not (tmp_path / "run" / "model.pt").exists()


def test_lora_trains_factors_memory_head_norms_and_biases_alone(pretrained, folder):
    run = start(pretrained, CPU)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    list(train(run))
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "memory" in changed
    assert "backbone.classifier.weight" in changed
    assert any(".lora_B." in name for name in changed)
    assert not any("base_layer.weight" in name or "embeddings.weight" in name for name in changed)
    stored = load_file(folder / "model.safetensors")
    kept = run.model.state_dict()["backbone.bert.encoder.layer.0.attention.self.query.base_layer.weight"]
    assert torch.equal(kept, stored["encoder.layer.0.attention.self.query.weight"])


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
    memory = one = model.memory[None].expand(5, -1, -1)
    with torch.no_grad():
        for segment in segments:
            memory, logits = model(memory, segment)
            one, expected = trained(one, segment)
        start_logits = start(pretrained, CPU).model(model.memory[None].expand(5, -1, -1), segments[0])[1]
    assert torch.allclose(logits, expected, atol=1e-4)
    assert (logits - start_logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors, about: tensors.pop("memory"), "is no delta of version 1"),
        (lambda tensors, about: about.update(version=2), "is no delta of version 1"),
        (lambda tensors, about: about.update(digest="0" * 64), "belongs to weights of backbone"),
        (lambda tensors, about: about.update(lora_alpha="4"), "lora_alpha '4'"),
        (lambda tensors, about: about.update(backbone="nowhere"), "neither 'fresh' nor one of"),
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
    from safetensors import safe_open

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
    options = TrainOptions(backbone="minilm", text=str(TEXT), lora=2, batch=2, eval_rows=2, steps=1, stages=(1,))
    run = start(options, CPU)
    assert run.model.config.segment_length == 512 - 10 - 3
    kept = run.model.backbone.get_input_embeddings().weight
    assert torch.equal(kept, base.weights["embeddings.word_embeddings.weight"])
    assert find_base("minilm").name == "model"


def test_a_resumed_run_with_adapters_has_the_same_losses(pretrained, tmp_path):
    whole = losses(pretrained)
    run = start(pretrained, CPU)
    for report in train(run):
        if report:
            break
    save_run(tmp_path / "resume.pt", run)
    resumed = load_run(tmp_path / "resume.pt", CPU)
    assert [(r.step, r.loss, r.accuracy) for r in train(resumed) if r] == whole[1:]


def test_a_text_that_changed_is_refused_when_a_run_goes_on(pretrained, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT.read_bytes())
    run = start(replace(pretrained, text=str(text)), CPU)
    save_run(tmp_path / "resume.pt", run)
    text.write_bytes(TEXT.read_bytes() + b" One more sentence stands here.\n")
    with pytest.raises(FormatError, match="Put the same text and backbone back"):
        load_run(tmp_path / "resume.pt", CPU)


def test_a_gradient_that_is_no_number_ends_the_run_and_the_file_to_resume_from_is_older(tmp_path, monkeypatch):
    from rmt_trt.training import loop

    flags = "--layers 1 --width 32 --heads 2 --segment-length 16 --num-memory 2 --stages 1 --batch 8 --eval-rows 8 --steps 8"
    real = torch.nn.utils.clip_grad_norm_

    def poisoned(parameters, *args, **kwargs):
        poisoned.calls += 1
        norm = real(parameters, *args, **kwargs)
        return norm * float("nan") if poisoned.calls == 5 else norm

    poisoned.calls = 0
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    assert loop.train_step is not None
    monkeypatch.setattr("rmt_trt.commands.train_view.SAVE_SECONDS", 0.0)
    result = CliRunner().invoke(app, [str(tmp_path / "run"), *flags.split(), "--eval-every", "2", "--device", "cpu"])
    assert isinstance(result.exception, EngineError)
    assert "training diverged: the loss is nan in the steps up to 6" in str(result.exception)
    assert "is the run as it was at the last evaluation before" in str(result.exception)
    assert torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["step"] == 4
    assert load_model(tmp_path / "run" / "model.pt")


def test_two_processes_train_as_one(tmp_path):
    flags = "--layers 1 --width 32 --heads 2 --segment-length 16 --num-memory 2 --stages 1,2 --threshold 0 --batch 16"
    rest = "--eval-rows 32 --eval-every 3 --steps 6 --warmup 2 --memory-noise 0 --device cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "rmt_trt.commands.train", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, *flags.split(), *rest.split()],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = (tmp_path / "two" / "train.log").read_text()
    assert "2 x cpu" in log
    single = CliRunner().invoke(app, [str(tmp_path / "one"), *flags.split(), *rest.split()])
    assert single.exit_code == 0, single.output
    rows = [
        [line.split(",")[:5] for line in (tmp_path / name / "metrics.csv").read_text().splitlines()[1:]]
        for name in ("one", "two")
    ]
    assert len(rows[0]) == 2
    for one, two in zip(*rows, strict=True):
        assert one[:3] == two[:3]
        assert float(one[3]) == pytest.approx(float(two[3]), abs=1e-4)
        assert float(one[4]) == pytest.approx(float(two[4]), abs=0.04)
