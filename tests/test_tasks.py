"""The synthetic tasks: exact lengths, determinism, what is and is not in a document, its text and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.training.questions import Question, load_questions, make_questions, save_questions
from rmt_trt.training.tasks import words
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.synthetic import MIN_LENGTH, make_document, sentences
from rmt_trt.training.tasks.synthetic_batches import make_batch

EXAMPLE = Path(__file__).parent.parent / "examples" / "memorize"
NAMES = np.array([words.ID[name] for name in words.NAMES])
PLACES = np.array([words.ID[place] for place in words.PLACES])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["memorize", "detect"]), st.integers(MIN_LENGTH, 5000), st.integers(0, 2**40))
def test_a_document_has_exactly_its_length_with_fact_and_question_where_it_says(task, length, seed):
    document = make_document(task, length, seed)
    ids = document.tokens()
    fact, question = document.fact.fact, document.fact.question
    assert ids.dtype == np.int64
    assert ids.shape == (length,)
    assert tuple(ids[document.position : document.position + len(fact)]) == fact
    assert tuple(ids[-len(question) :]) == question
    assert words.ID[document.answer] in fact
    assert task == "detect" or document.position == 0
    assert np.isin(ids, NAMES).sum() == 2  # the fact and the question
    assert np.isin(ids, PLACES).sum() == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(MIN_LENGTH, 3000), st.integers(1, 700), st.integers(1, 700), st.integers(0, 1000))
def test_streamed_pieces_make_up_the_whole(length, size, first, seed):
    document = make_document("detect", length, seed)
    pieces = list(document.pieces(size, first=first))
    assert len(pieces[0]) == min(first, length)
    assert all(len(piece) == size for piece in pieces[1:-1])
    assert len(pieces[-1]) > 0
    assert np.array_equal(np.concatenate(pieces), document.tokens())


def test_the_same_arguments_give_the_same_document_on_every_machine():
    document = make_document("detect", 20_000, 11)
    digest = hashlib.sha256(document.tokens().astype("<i8").tobytes()).hexdigest()
    assert digest == "ef21a2f970c55e74d14b21d31f0f2a16b87d1469e6da54a6f53de5b99e584e6c"
    assert document == make_document("detect", 20_000, 11)
    assert not np.array_equal(document.tokens(), make_document("detect", 20_000, 12).tokens())


def test_the_position_of_the_fact_can_be_chosen_up_to_the_question():
    fact = make_document("detect", 300, 5).fact
    last = 300 - len(fact.fact) - len(fact.question)
    for position in (0, 1, 127, last):
        ids = make_document("detect", 300, 5, position).tokens()
        assert tuple(ids[position : position + len(fact.fact)]) == fact.fact
    with pytest.raises(ContractError, match=f"position is {last + 1}; .* 0 to {last}"):
        make_document("detect", 300, 5, last + 1)
    with pytest.raises(ContractError, match="position is 3; in a memorize document"):
        make_document("memorize", 300, 5, 3)


def test_random_positions_reach_all_parts_of_a_long_document():
    tenths = {make_document("detect", 10**9, seed).position * 10 // 10**9 for seed in range(200)}
    assert tenths == set(range(10))


def test_the_noise_holds_no_name_no_place_and_every_other_kind_of_word():
    noise = sentences(Draws(3), 30_000)
    assert not np.isin(noise, NAMES).any()
    assert not np.isin(noise, PLACES).any()
    assert len(np.unique(noise)) > 250
    for kind in ("mover", "animal", "thing", "quality", "deed", "manner", "weather"):
        ids = np.arange(words.FIRST[kind], words.FIRST[kind] + words.SIZE[kind])
        assert np.isin(ids, noise).all()


def test_every_word_is_in_one_class_only():
    assert len(set(words.WORDS)) == len(words.WORDS) == words.VOCAB_SIZE
    assert words.WORDS[:4] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@pytest.mark.parametrize("task", ["memorize", "detect"])
def test_the_tokenizer_reads_the_text_as_the_same_ids(task):
    tokenizer = Tokenizer.from_str(words.tokenizer_json())
    for length in (MIN_LENGTH, 12, 500, 70_000):
        document = make_document(task, length, length)
        assert tokenizer.encode("".join(document.text())).ids == document.tokens().tolist()


def test_the_tokenizer_splits_marks_lowers_case_and_knows_what_it_does_not_know():
    tokenizer = Tokenizer.from_str(words.tokenizer_json())
    text = "MARY went to the Garden.  Xylophones, where?"
    assert tokenizer.encode(text).tokens == ["mary", "went", "to", "the", "garden", ".", "[UNK]", ",", "where", "?"]


def test_the_text_is_written_as_people_write():
    text = "".join(make_document("memorize", 40, 1).text())
    name = words.WORDS[make_document("memorize", 40, 1).fact.fact[0]].capitalize()
    assert text.startswith(f"{name} ")
    assert text.endswith(f" Where is {name}?")
    assert "  " not in text
    assert " ." not in text
    assert ". " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reason", 100, 1), "task is 'reason'; expected one of memorize, detect"),
        (("detect", MIN_LENGTH - 1, 1), f"length is {MIN_LENGTH - 1} tokens"),
        (("detect", 1 << 60, 1), "length is"),
        (("detect", 100, -1), "seed is -1"),
    ],
)
def test_documents_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ContractError, match=message):
        make_document(*arguments)


def test_a_piece_of_no_tokens_is_refused():
    with pytest.raises(ContractError, match="pieces of 0 tokens"):
        next(make_document("detect", 100, 1).pieces(0))


def _rows(batch):
    return [batch.segments[:, row] for row in range(batch.segments.shape[1])]


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_a_batch_holds_whole_documents_with_one_short_segment_at_an_end(segments):
    size = 24
    batch = make_batch(200, segments, size, 7)
    assert batch.segments.shape == (segments, 200, size)
    assert batch.segments.dtype == np.int64
    kinds = set()
    for row, answer in zip(_rows(batch), batch.answers, strict=True):
        counts = (row >= 0).sum(axis=1)
        assert all((part[:n] >= 0).all() and (part[n:] == -1).all() for part, n in zip(row, counts, strict=True))
        assert counts.min() >= 1
        assert (np.sort(counts)[1:] == size).all()
        ids = row[row >= 0]
        place = ids[np.isin(ids, PLACES)]
        assert place.tolist() == [words.ID[words.PLACES[answer]]]
        assert words.WORDS[ids[-4]] == "where"
        assert words.WORDS[ids[-1]] == "?"
        kinds.add("first" if counts[0] < size else "last" if counts[-1] < size else "full")
    assert kinds >= ({"first", "full"} if segments == 1 else {"first", "last", "full"})


def test_batches_follow_from_their_numbers_alone():
    one, same, other = make_batch(8, 2, 32, 1, 5), make_batch(8, 2, 32, 1, 5), make_batch(8, 2, 32, 1, 6)
    assert np.array_equal(one.segments, same.segments)
    assert np.array_equal(one.answers, same.answers)
    assert not np.array_equal(one.segments, other.segments)


def test_a_questions_file_is_read_as_it_was_written(tmp_path):
    questions = make_questions(300, 5, 40)
    save_questions(tmp_path / "q.jsonl", questions)
    loaded = load_questions(tmp_path / "q.jsonl")
    assert loaded == questions
    assert np.array_equal(loaded[1].tokens(), make_document("detect", 300, 41).tokens())
    assert loaded[0].question == f"where is {loaded[0].fact.split()[0]} ?"
    assert loaded[0].answer in loaded[0].fact


def _line(**changes):
    return json.dumps({**Question(make_document("detect", 100, 1)).to_json(), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: expected a JSON object with the fields"),
        (_line(extra=1), "line 1: expected a JSON object with the fields"),
        (_line(length="100"), "line 1: length is '100'; expected a whole number"),
        (_line() + "\n" + _line(length=3), "line 2: length is 3 tokens"),
        (_line(position=10**9), "line 1: position is"),
        (_line(task=[]), "line 1: task is"),
        (_line(answer="moon"), "line 1: the document of this seed says .*another version"),
    ],
)
def test_a_questions_file_that_is_wrong_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(FormatError, match=message):
        load_questions(tmp_path / "q.jsonl")


def test_a_questions_file_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"nowhere\.jsonl cannot be read"):
        load_questions(tmp_path / "nowhere.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="is not UTF-8 text"):
        load_questions(tmp_path / "q.jsonl")


def test_the_example_asks_at_every_promised_length():
    questions = load_questions(EXAMPLE / "questions.jsonl")
    segments = [math.ceil(question.length / 128) for question in questions]
    for count in (1, 16, 256, 1024, 4096):
        assert segments.count(count) >= 120
    lengths = [question.length for question in questions]
    assert lengths.count(100_000) >= 8
    assert lengths.count(1_000_000) >= 2
    assert len({question.document.seed for question in questions}) == len(questions)


def test_documents_are_made_without_torch():
    code = (
        "import sys; import rmt_trt.training.questions, rmt_trt.training.tasks.synthetic_batches, rmt_trt.training.options; "
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
