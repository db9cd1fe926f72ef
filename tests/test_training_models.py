"""Training in all its forms: decoders, LoRA round pretrained weights, parts of a batch, several processes, what stops it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_bert import small_bert
from typer.testing import CliRunner

from rmt_trt.commands.train import app
from rmt_trt.errors import EngineError, FormatError
from rmt_trt.model.checkpoint import load_model
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
    return small_bert(tmp_path_factory.mktemp("base"))


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


def test_segments_computed_again_drop_out_the_same(pretrained):
    options = replace(pretrained, dropout=0.3, memory_noise=0.2, learning_rate=1e-2, stages=(3,))
    again = losses(replace(options, checkpointing=True))
    assert [loss for _, loss, _ in again] == pytest.approx([loss for _, loss, _ in losses(options)], abs=1e-4)


ONE_RUN = """
import sys
from pathlib import Path
import torch
from rmt_trt.training.loop import start, train
from rmt_trt.training.options import TrainOptions
from rmt_trt.training.resume import load_run, save_run
torch.set_num_threads(1)
folder, text, file = sys.argv[1:]
run = start(TrainOptions(
    backbone=folder, text=text, form="encoder", lora=4, num_memory=2, stages=(1, 3), threshold=0.0, patience=1, steps=6,
    eval_every=2, eval_rows=8, batch=8, accumulate=2, checkpointing=True, dtype="bf16", dropout=0.2, memory_noise=0.2, bptt=2,
), torch.device("cpu"))
for report in train(run):
    if report is not None:
        print(report.step, report.segments, report.loss, report.accuracy)
        if file and report.step == 2:
            save_run(Path(file), run)
            break
for report in train(load_run(Path(file), torch.device("cpu"))) if file else ():
    if report is not None:
        print(report.step, report.segments, report.loss, report.accuracy)
"""


def test_another_process_has_the_same_losses_also_when_it_resumes(folder, tmp_path):
    def begun(file, seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", ONE_RUN, str(folder), str(TEXT), file]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )

    first, second = begun("", "1"), begun(str(tmp_path / "resume.pt"), "2")
    out, error = first.communicate(timeout=120)
    assert len(out.splitlines()) == 3, error
    assert second.communicate(timeout=120)[0] == out


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
    with pytest.raises(FormatError, match="Put the same text, tokenizer and backbone back"):
        load_run(tmp_path / "resume.pt", CPU)


def test_a_tokenizer_that_changed_is_refused_when_a_run_goes_on(folder, tmp_path):
    tokenizer, path = tmp_path / "tokenizer.json", tmp_path / "resume.pt"
    tokenizer.write_bytes((folder / "tokenizer.json").read_bytes())
    save_run(path, start(replace(TINY, text=str(TEXT), tokenizer=str(tokenizer)), CPU))
    assert load_run(path, CPU).step == 0
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    with pytest.raises(FormatError, match="Put the same text, tokenizer and backbone back"):
        load_run(path, CPU)


def test_a_device_without_enough_memory_says_what_takes_less(tmp_path, monkeypatch):
    def full(run, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")

    monkeypatch.setattr("rmt_trt.training.loop.train_step", full)
    result = CliRunner().invoke(app, [str(tmp_path / "run"), "--layers", "1", "--steps", "1", "--device", "cpu"])
    assert isinstance(result.exception, EngineError)
    assert "(CUDA out of memory. Tried to allocate 2 GiB.)" in str(result.exception)
    assert "(--accumulate), with segments computed again (--checkpointing)" in str(result.exception)


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
    assert "is the run as it was when it was last saved" in str(result.exception)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["step"] == 4
    assert load_model(tmp_path / "run" / "model.pt")


def test_two_processes_train_as_one(tmp_path):
    flags = "--layers 1 --width 32 --heads 2 --segment-length 16 --num-memory 2 --stages 1,2 --threshold 0 --batch 16"
    rest = "--eval-rows 32 --eval-every 3 --steps 6 --warmup 2 --memory-noise 0 --device cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "rmt_trt.commands.train", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    arguments = [*command, *flags.split(), *rest.split()]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as launcher:
        try:
            _, said = launcher.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # which ends its workers too; killed, it would leave them behind
            raise
    assert launcher.returncode == 0, said[-2000:]
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


def test_a_fresh_backbone_drops_out_too():
    assert losses(replace(TINY, dropout=0.3)) != losses(TINY)
