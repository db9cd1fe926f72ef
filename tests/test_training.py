"""Training: it learns, it resumes exactly, its curriculum moves as documented, and its command refuses bad options."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from rmt_trt.commands.train import app
from rmt_trt.errors import ContractError, EngineError, FormatError
from rmt_trt.model.checkpoint import load_model
from rmt_trt.model.recurrence import recurrence
from rmt_trt.training.loop import start, to_device, train
from rmt_trt.training.options import Curriculum, TrainOptions
from rmt_trt.training.questions import load_questions, make_questions, save_questions
from rmt_trt.training.recall import answer, recall
from rmt_trt.training.records import add_metrics, start_metrics
from rmt_trt.training.resume import load_run, save_run
from rmt_trt.training.tasks.synthetic_batches import make_batch
from rmt_trt.training.tasks.words import PLACES
from rmt_trt.training.unroll import Unrolled

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).parent.parent / "examples" / "memorize"
TINY = TrainOptions(
    layers=1, width=32, heads=2, segment_length=16, num_memory=2, stages=(1, 2), batch=16, eval_rows=32, eval_every=3,
    steps=9, warmup=2, threshold=0.0, patience=2,
)  # fmt: skip
FLAGS = "--layers 1 --width 32 --heads 2 --segment-length 16 --num-memory 2 --stages 1,2 --batch 16 --eval-rows 32 "
TINY_FLAGS = [*FLAGS.split(), "--eval-every", "3", "--steps", "6", "--warmup", "2", "--device", "cpu"]


def _run_to(run, step):
    reports = []
    for report in train(run):
        reports += [report] if report else []
        if run.step == step:
            break
    return reports


def test_a_short_training_learns_the_one_segment_task():
    options = replace(
        TINY, layers=2, num_memory=2, stages=(1,), threshold=1.0, batch=64, steps=120, eval_every=20,
        learning_rate=3e-3, warmup=20, eval_rows=128,
    )  # fmt: skip
    reports = [report for report in train(start(options, CPU)) if report]
    assert [report.step for report in reports] == [20, 40, 60, 80, 100, 120]
    assert reports[0].loss > 1.5
    assert reports[-1].loss < 0.2
    assert reports[-1].accuracy > 0.9


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    options = replace(TINY, memory_noise=0.2, bptt=1, stages=(2, 3))
    whole = start(options, CPU)
    whole_reports = _run_to(whole, 9)

    first = start(options, CPU)
    _run_to(first, 3)
    save_run(tmp_path / "resume.pt", first)
    torch.manual_seed(12345)  # what happens between the two runs must not matter
    second = load_run(tmp_path / "resume.pt", CPU)
    reports = _run_to(second, 9)

    assert second.curriculum == whole.curriculum == Curriculum(1, 1)
    assert second.model.config == whole.model.config
    assert [(r.step, r.loss, r.accuracy) for r in reports] == [
        (r.step, r.loss, r.accuracy) for r in whole_reports if r.step > 3
    ]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    moments = whole.optimizer.state_dict()["state"], second.optimizer.state_dict()["state"]
    for index in moments[0]:
        assert torch.equal(moments[0][index]["exp_avg_sq"], moments[1][index]["exp_avg_sq"])


def test_the_resume_file_holds_plain_values_only(tmp_path):
    run = start(TINY, CPU)
    _run_to(run, 3)
    save_run(tmp_path / "resume.pt", run)
    value = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert value["step"] == 3
    assert value["options"] == TINY.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["resume.pt"]


def test_gradients_flow_through_the_last_segments_only():
    run = start(replace(TINY, num_memory=3), CPU)
    inputs, _ = to_device(make_batch(4, 3, 16, 1), CPU)
    inner = run.model.memory

    def gradient(bptt):
        run.optimizer.zero_grad()
        Unrolled(run.model, bptt)(inputs).square().sum().backward()
        return inner.grad

    assert gradient(2) is None
    full = gradient(0)
    assert full is not None
    assert full.abs().sum() > 0
    assert torch.equal(gradient(3), full)
    with torch.no_grad():
        assert torch.equal(Unrolled(run.model, 1)(inputs), Unrolled(run.model)(inputs))


def test_training_batches_and_documents_are_read_as_the_reference_recurrence_reads_them():
    run = start(TINY, CPU)
    questions = [*make_questions(32, 2, 1), *make_questions(45, 3, 5), *make_questions(11, 1, 9)]
    with torch.no_grad():
        for parameter in run.model.parameters():  # so that text and memory sway the logits
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for group in (questions[:2], questions[2:5], questions[5:]):
        expected = [list(recurrence(run.model, q.tokens().tolist()))[-1][1] for q in group]
        assert len(group) == 1 or (torch.stack(expected).amax(0) - torch.stack(expected).amin(0)).max() > 0.1
        assert torch.allclose(torch.from_numpy(answer(run.model, group)), torch.stack(expected), atol=1e-4)


def test_recall_counts_right_answers_by_number_of_segments():
    run = start(TINY, CPU)
    with torch.no_grad():
        run.model.backbone.classifier.weight.zero_()
        run.model.backbone.classifier.bias.copy_(torch.tensor([0.0, 0, 0, 5, 0, 0]))
    questions = [*make_questions(33, 12, 1), *make_questions(16, 6, 30)]
    results = list(recall(run.model, questions))
    assert [(r.segments, r.questions) for r in results] == [(1, 6), (3, 12)]
    assert results[1].right == sum(q.answer == PLACES[3] for q in questions[:12])


def test_the_curriculum_passes_a_stage_after_enough_good_evaluations_in_a_row():
    options = replace(TINY, stages=(1, 3), threshold=0.9, patience=2)
    place = Curriculum()
    seen = []
    for accuracy in (0.95, 0.5, 0.9, 0.9, 0.2, 1.0, 1.0, 1.0):
        place = place.after(accuracy, options)
        seen.append((place.segments(options), place.finished(options)))
    assert seen == [(1, False)] * 3 + [(3, False)] * 3 + [(3, True)] * 2


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    options = replace(TINY, steps=100, warmup=10, learning_rate=1.0)
    rates = [options.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.11)


def test_a_loss_that_is_no_number_ends_the_run():
    run = start(TINY, CPU)
    with torch.no_grad():
        run.model.memory.fill_(float("nan"))
    with pytest.raises(
        EngineError,
        match=r"training diverged: the loss is nan in the steps up to 3\. Start a new run with a lower --learn",
    ):
        _run_to(run, 9)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 0, "layers is 0; expected a whole number from 1 to 64"),
        ("steps", 1.5, "steps is 1.5"),
        ("batch", True, "batch is True"),
        ("segment_length", -1, "segment_length is -1; expected a whole number from 0"),
        ("form", "both", r"form is 'both'; expected one of \('encoder', 'decoder'\)"),
        ("dtype", "fp16", "dtype is 'fp16'; expected one of"),
        ("part", (0.9, 0.1), "expected two shares of the text, rising from 0 to 1"),
        ("accumulate", 3, "a batch of 16 documents cannot be computed in 3 equal parts"),
        ("backbone", "minilm", "give a background text"),
        ("lora", 4, "a fresh backbone has none"),
        ("lean", 0.5, "task 'memorize,detect' has none. Leave --lean out"),
        ("text", "some.txt", "needs both --text FILE and --tokenizer"),
        ("threshold", 1.2, "threshold is 1.2; expected a number from 0 to 1"),
        ("learning_rate", float("nan"), "learning_rate is nan"),
        ("heads", 3, "width 32 is not a multiple of 3 heads"),
        ("stages", (), r"stages are \(\)"),
        ("stages", (2, 2), "expected rising numbers of segments"),
        ("stages", (0, 1), "expected rising numbers of segments"),
    ],
)
def test_options_that_make_no_sense_are_refused(field, value, message):
    with pytest.raises(ContractError, match=message):
        replace(TINY, **{field: value})


def _change(path, **changes):
    value = torch.load(path, weights_only=True)
    torch.save({**value, **changes}, path)


def test_a_batch_that_no_memory_holds_is_refused():
    with pytest.raises(ContractError, match=r"has 4294967296 tokens; at most \d+ are made at a time"):
        start(replace(TINY, batch=1 << 16, stages=(1, 4096)), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is no file to resume training from"),
        ({"format_version": 9}, "has format version 9; expected 1"),
        ({"options": {"layers": 1}}, "training options are not a JSON object with the fields"),
        ({"model": {}}, r"holds 0 weights; its options ask for more than 12288\. The file is damaged"),
        ({"options": {**TINY.to_json(), "layers": 64, "width": 4096}}, "its options ask for more than 12884901888"),
        ({"options": {**TINY.to_json(), "num_memory": 3}}, "does not fit the run that its options describe"),
        ({"optimizer": {}}, "does not fit the run that its options describe"),
        ({"sources": {}}, r"was trained on \{\}; its options now name .*memorize,detect"),
        ({"curriculum": [1, 2, 3]}, "does not fit the run that its options describe"),
        ({"step": 10**6}, "stands at step 1000000 of 9"),
        ({"max_segments": -5}, "and -5 segments; it was changed since it was written"),
        ({"options": {**TINY.to_json(), "mixed": torch.ones(3)}}, "holds more than plain values in options"),
        (
            {"optimizer": {"state": {0: dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.ones(1))}}},
            "its optimizer holds moments",
        ),
    ],
)
def test_a_damaged_resume_file_is_refused(tmp_path, changes, message):
    path = tmp_path / "resume.pt"
    save_run(path, start(TINY, CPU))
    _change(path, **changes)
    with pytest.raises((FormatError, ContractError), match=message):
        load_run(path, CPU)


def test_metrics_of_steps_that_come_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    start_metrics(path, 0)
    for report in [r for r in train(start(TINY, CPU)) if r]:
        add_metrics(path, report)
    start_metrics(path, 6)
    with path.open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "6"]
    path.write_text("nothing\nof that\n")
    with pytest.raises(FormatError, match=r"is no metrics\.csv of rmt-train"):
        start_metrics(path, 6)


def test_the_command_trains_a_model_that_loads_with_its_tokenizer_and_measures_recall(tmp_path):
    out, asked = tmp_path / "run", tmp_path / "q.jsonl"
    save_questions(asked, make_questions(40, 4, 1))
    result = CliRunner().invoke(app, [str(out), *TINY_FLAGS, "--questions", str(asked)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["metrics.csv", "model.pt", "resume.pt", "train.log"]
    loaded = load_model(out / "model.pt")
    assert loaded.spec.id2label == PLACES
    assert loaded.spec.alignment == "right"
    assert loaded.spec.dropped_ids == (0, 2, 3)
    assert loaded.tokenizer is not None
    assert Tokenizer.from_str(loaded.tokenizer).get_vocab_size() == loaded.spec.vocab_size
    log = (out / "train.log").read_text()
    assert "stages passed: 0 of 2" in log
    assert "at     3 segments:" in log

    again = CliRunner().invoke(app, [str(out), "--resume", "--device", "cpu"])
    assert again.exit_code == 0, again.output
    assert "resumed at step 6 of 6" in (out / "train.log").read_text()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--stages", "1,x"], ContractError, "--stages is '1,x'"),
        (["--part", "all"], ContractError, "--part is 'all'"),
        (["--segment-length", "4"], ContractError, "shorter than the shortest document of this task, 11 tokens"),
        (["--task", "forget"], ContractError, "forget"),
        (["--backbone", "nowhere", "--text", "x"], ContractError, "neither 'fresh' nor one of minilm nor a folder"),
        (["--device", "tpu"], ContractError, "--device is 'tpu'; expected auto, cpu or cuda"),
        (["--heads", "5"], ContractError, "not a multiple of 5 heads"),
        (["--backbone", "minilm", "--text", "x", "--layers", "2"], ContractError, "--layers is for a fresh backbone"),
        (["--resume"], FormatError, "there is no run to resume here"),
        (["--resume", "--steps", "9", "--seed", "2"], ContractError, "leave out --steps, --seed"),
        (["--questions", "nowhere.jsonl"], FormatError, "nowhere.jsonl cannot be read"),
    ],
)
def test_the_command_refuses_bad_options(tmp_path, flags, error, message):
    result = CliRunner().invoke(app, [str(tmp_path / "run"), *flags])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_the_command_does_not_train_over_another_run(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"somebody's")
    result = CliRunner().invoke(app, [str(tmp_path), *TINY_FLAGS])
    assert isinstance(result.exception, FormatError)
    assert "holds model.pt of another run" in str(result.exception)
    assert (tmp_path / "model.pt").read_bytes() == b"somebody's"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused is CUDA where there is none")
def test_cuda_is_refused_where_there_is_none(tmp_path):
    result = CliRunner().invoke(app, [str(tmp_path / "run"), "--device", "cuda"])
    assert isinstance(result.exception, EngineError)
    assert "PyTorch finds no CUDA device here" in str(result.exception)


def test_the_trained_example_answers_held_out_questions():
    model = load_model(EXAMPLE / "model.pt").model
    questions = [q for q in load_questions(EXAMPLE / "questions.jsonl") if q.length <= 16 * 128]
    questions = questions[::17][:16]
    assert {q.task for q in questions} == {"memorize", "detect"}
    results = list(recall(model, questions))
    assert [(r.segments, r.questions, r.right) for r in results] == [(1, 8, 8), (16, 8, 8)]
    assert (EXAMPLE / "model.pt").stat().st_size <= 4_000_000
