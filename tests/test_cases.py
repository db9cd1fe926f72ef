"""The cases that a deployment of a Recurrent Memory Transformer gets wrong easily, one test or more for each.

Documents are cut by hand here and stepped through in PyTorch; nothing of the runtime's own segmentation is used to
say what is right.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from models import CLASSES, WIDTH, M, Made, S, check_parity, made, make_model, steps_of

from rmt_trt import TokenError
from rmt_trt.export import ExportOptions, export_model
from rmt_trt.model.checkpoint import LoadedModel, LoadOptions, load_model
from rmt_trt.model.step import model_spec
from rmt_trt.runtime.engines.cpu import open_session

FORMS = ("bert", "gpt2")
Steps = list[tuple[np.ndarray, np.ndarray]]


@torch.no_grad()
def by_hand(this: Made, *segments: np.ndarray | list[int]) -> Steps:
    """(memory, logits) after each of the segments, one by one through the PyTorch step, never padded."""
    memory, steps = this.model.memory.detach()[None], []
    for segment in segments:
        memory, logits = this.model(memory, torch.tensor(np.array(segment, np.int64))[None])
        steps.append((memory[0].numpy(), logits[0].numpy()))
    return steps


def expect(this: Made, tokens: object, *segments: np.ndarray | list[int], **options: object) -> None:
    """Asserts that a run of `tokens` goes through exactly these segments."""
    with this.open() as runtime:
        check_parity(steps_of(runtime, tokens, **options), by_hand(this, *segments), this.name)
        out = runtime.run(tokens, **options)
        assert out.segments == len(segments)
        assert out.tokens == sum(map(len, segments))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [1, 2, S - 1])
def test_case_01_shorter_than_one_segment(name: str, length: int) -> None:
    this = made(name)
    tokens = this.document(length)
    for alignment in ("left", "right", "center"):
        expect(this, tokens, tokens, alignment=alignment)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("count", [1, 3])
def test_case_02_an_exact_multiple_has_no_empty_segment(name: str, count: int) -> None:
    this = made(name)
    tokens = this.document(count * S)
    for alignment in ("left", "right", "center"):
        expect(this, tokens, *tokens.reshape(count, S), alignment=alignment)


def test_case_03_one_token_more_than_a_segment_an_encoder_has_it_first() -> None:
    this = made("bert")
    tokens = this.document(S + 1)
    expect(this, tokens, tokens[:1], tokens[1:])


def test_case_03_one_token_more_than_a_segment_a_decoder_has_it_last() -> None:
    this = made("gpt2")
    tokens = this.document(S + 1)
    expect(this, tokens, tokens[:S], tokens[S:])


def test_case_03_one_token_more_than_a_segment_of_25_center_makes_two_of_13(tmp_path: Path) -> None:
    model = make_model("gpt2", segment_length=25)
    loaded = LoadedModel(model, model_spec(model), None)
    report = export_model(loaded, tmp_path / "s25.rmt", ExportOptions(segments=2))
    this = Made("gpt2", model, tmp_path, tmp_path / "s25.rmt", report, loaded.spec)
    tokens = this.document(26)
    expect(this, tokens, tokens[:13], tokens[13:], alignment="center")
    tokens = this.document(2 * 25 + 1)
    expect(this, tokens, tokens[:17], tokens[17:34], tokens[34:], alignment="center")


def test_case_04_an_encoder_drops_special_ids_before_it_cuts() -> None:
    this = made("bert")
    assert this.spec.dropped_ids == (0, 2, 3)  # [PAD], [CLS], [SEP]
    text = this.document(S + 5)
    with_special = np.insert(text, [0, 3, 3, 17, S + 5], [2, 0, 3, 3, 3])
    expect(this, with_special, text[:5], text[5:])  # the cut counts S + 5 tokens, not S + 10


def test_case_04_a_decoder_keeps_every_id() -> None:
    this = made("gpt2")
    assert this.spec.dropped_ids == ()
    tokens = np.insert(this.document(S), [0, 3, 17], [2, 0, 3])
    expect(this, tokens, tokens[:S], tokens[S:])


def test_case_05_robertas_doubled_ids_are_kept() -> None:
    this = made("roberta")
    text = this.document(2 * S - 4)
    tokens = np.insert(text, [0, 5, 9, 30], [0, 2, 2, 0])  # <s> and </s> inside the text count like any other
    assert len(tokens) == 2 * S
    expect(this, tokens, tokens[:S], tokens[S:])
    expect(this, np.insert(tokens, 7, 1), tokens[:S], tokens[S:])  # <pad> is listed once, and dropped


def test_case_05_a_published_roberta_checkpoint_says_so_and_another_list_can_be_set(tmp_path: Path) -> None:
    source = checkpoints.source("roberta")
    file = checkpoints.write(tmp_path, source.state, ".pth")
    config = checkpoints.write_config(tmp_path / "backbone", source)
    options = LoadOptions(config=config, input_size=checkpoints.INPUT_SIZE)
    assert load_model(file, options).spec.dropped_ids == (1,)
    assert load_model(file, replace(options, drop_ids=(0, 1, 2))).spec.dropped_ids == (0, 1, 2)


@pytest.mark.parametrize("empty", [[], np.array([], np.int32), iter([]), np.array([-1, -1])])
def test_case_06_an_empty_document_is_an_error_that_names_the_row(empty: object) -> None:
    wanted = r"document 1 of the batch is empty.*Leave it out"
    with made("gpt2").open() as runtime, pytest.raises(TokenError, match=wanted):
        runtime.run([[1, 2, 3], empty, [4]])


def test_case_06_so_is_a_document_of_special_ids_only() -> None:
    with made("bert").open() as runtime:
        with pytest.raises(TokenError, match=r"document 2 of the batch is empty.*after dropping the ids \[0, 2, 3\]"):
            runtime.run(np.array([[5, 6, 7], [8, -1, -1], [2, 3, 0]]))
        with pytest.raises(TokenError, match="the document is empty"):
            runtime.run(iter([2, 3]))


@pytest.fixture(scope="module")
def trained_on_two(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A classifier whose checkpoint says that it was trained on two segments."""
    path = tmp_path_factory.mktemp("limit") / "two.rmt"
    model = make_model("bert", max_segments=2)
    loaded = LoadedModel(model, model_spec(model), None)
    report = export_model(loaded, path, ExportOptions(segments=2))
    return Made("bert", model, path, path, report, loaded.spec)


def test_case_07_the_length_that_was_trained_on_is_recorded_and_never_a_limit(trained_on_two: Made) -> None:
    this = trained_on_two
    tokens = this.document(5 * S)
    with this.open() as runtime:
        assert runtime.spec.max_segments == 2
    expect(this, tokens, *tokens.reshape(5, S))


def test_case_07_the_originals_cut_of_the_head_is_given_when_it_is_asked_for(trained_on_two: Made) -> None:
    this = trained_on_two
    tokens = this.document(4 * S + 3)
    expect(this, tokens, tokens[:S], tokens[S : 2 * S], max_segments=2, overflow="head")
    expect(this, tokens, tokens[-2 * S : -S], tokens[-S:], max_segments=2, overflow="tail")
    with (
        this.open() as runtime,
        pytest.raises(TokenError, match=r"83 tokens make 5 segments of 20; max_segments=2 allows 40 tokens"),
    ):
        runtime.run(tokens, max_segments=2)


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("name", FORMS)
def test_case_08_each_document_of_a_batch_is_answered_as_if_alone(name: str, alignment: str) -> None:
    this = made(name)
    documents = [this.document(length, seed=length) for length in (3 * S + 7, 1, S, 2 * S - 1)]
    with this.open() as runtime:
        batch = runtime.run(documents, alignment=alignment)
        for together, document in zip(batch, documents, strict=True):
            alone = runtime.run(document, alignment=alignment)
            assert (together.segments, together.tokens) == (alone.segments, alone.tokens)
            check_parity([(together.memory, together.logits)], [(alone.memory, alone.logits)])


def test_case_09_an_encoder_drops_the_pad_ids_of_left_padding() -> None:
    this = made("bert")
    text = this.document(S + 5)
    expect(this, np.concatenate([np.zeros(9, np.int64), text]), text[:5], text[5:])


def test_case_09_a_decoder_takes_the_pad_ids_of_left_padding_for_tokens() -> None:
    this = made("gpt2")
    tokens = np.concatenate([np.zeros(9, np.int64), this.document(S + 5)])
    expect(this, tokens, tokens[:S], tokens[S:])


@pytest.mark.parametrize("name", FORMS)
def test_case_09_ids_below_zero_in_front_are_refused(name: str) -> None:
    this = made(name)
    tokens = np.concatenate([[-1, -1], this.document(5)])
    with (
        this.open() as runtime,
        pytest.raises(TokenError, match=r"document 1 of the batch: token 0 is padding .* but token 2 behind it is"),
    ):
        runtime.run(np.stack([this.document(7), tokens]))


@pytest.mark.parametrize("length", [1, 7, S - 1, S])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "gpt_neox", "llama", "qwen2"])
def test_case_10_the_short_segment_padded_to_full_width_is_the_short_segment(name: str, length: int) -> None:
    this = made(name)
    session = open_session(this.bundle / "step.onnx", threads=1)
    memory = np.random.default_rng(5).normal(size=(3, M, WIDTH)).astype(np.float32)
    text = this.document(length)
    short, short_logits = session.run(None, {"memory": memory[:1], "segment": text[None]})
    padded = np.full((3, S), -1, np.int64)
    padded[0, :length] = text
    padded[2] = this.document(S, seed=1)
    new, logits = session.run(None, {"memory": memory, "segment": padded})
    rows = logits[0] if this.spec.logits == "classifier" else logits[0, :length]
    check_parity([(new[0], rows)], [(short[0], short_logits[0])], name)
    assert np.array_equal(new[1], memory[1])  # a row of padding gives its memory back, bit for bit
    assert not np.allclose(new[::2], memory[::2], atol=0.1)


def test_the_answers_name_is_that_of_the_largest_logit() -> None:
    this = made("bert")
    with this.open() as runtime:
        for seed in range(4):
            out = runtime.run(this.document(S + 3, seed))
            assert out.logits.shape == (CLASSES,)
            assert out.label == ("zero", "one", "two", "three", "four")[int(np.argmax(out.logits))]
