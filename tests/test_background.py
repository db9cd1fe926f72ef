"""A text as background: its sentences, its parts, random draws, constant memory, and texts that are refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import EXCERPT, byte_tokenizer, word_tokenizer
from tokenizers import Tokenizer

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.training.tasks import background as module
from rmt_trt.training.tasks.background import LONGEST, LONGEST_TEXT, Background
from rmt_trt.training.tasks.draws import Draws


def _open(text: str | bytes, tmp_path, start=0.0, stop=1.0, tokenizer=None) -> Background:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Background.open(path, tokenizer or word_tokenizer(), start, stop)


def _sentences(background: Background) -> list[str]:
    parts = np.split(background.ids, background.borders[1:-1])
    return [background.words.decode(part) for part in parts]


@pytest.fixture(scope="module")
def excerpt() -> Background:
    return Background.open(EXCERPT, word_tokenizer())


def test_the_whole_text_is_there_in_order_without_special_tokens(excerpt):
    tokenizer = Tokenizer.from_str(word_tokenizer())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert excerpt.ids.tolist() == tokenizer.encode(EXCERPT.read_text(), add_special_tokens=False).ids
    assert excerpt.ids.dtype == np.int32
    assert excerpt.borders.dtype == np.int64
    assert (excerpt.borders[0], excerpt.borders[-1]) == (0, excerpt.tokens)
    assert (np.diff(excerpt.borders) > 0).all()
    assert excerpt.sha256 == hashlib.sha256(EXCERPT.read_bytes()).hexdigest()
    assert excerpt.name == "coriolanus.txt"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("We are. You  are!\n\nWho is?\tThey", ["We are.", "You are!", "Who is?", "They"]),
        (
            'He said: "We are." Then (you.) (They "are!") We',
            ['He said: "We are."', "Then (you.)", '(They "are!")', "We"],
        ),
        ("\u201cWe are.\u201d You are.\u00a0They", ["\u201cWe are.\u201d", "You are.", "They"]),
        ("At 1.5 we... you?! they", ["At 1.5 we...", "you?!", "they"]),
        ("\ufeffWe are.\r\nYou are.\r\n", ["We are.", "You are."]),
        ("We are.They. ", ["We are.They."]),
    ],
)
def test_sentences_end_behind_their_marks_and_closing_quotes(text, sentences, tmp_path):
    found = _sentences(_open(text, tmp_path, tokenizer=byte_tokenizer()))
    assert found == [f" {sentence}" for sentence in sentences]


@pytest.mark.parametrize("chunk", [1, 3, 50, 4096])
def test_the_sentences_do_not_depend_on_how_much_is_read_at_a_time(chunk, tmp_path, monkeypatch):
    text = (
        EXCERPT.read_text()[:700]
        + " Gr\u00fc\u00dfe, \u4f60\u597d! "
        + "the people " * 900
        + "speak. We \U0001f600 speak"
    )
    whole = _open(text, tmp_path)
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "TOGETHER", 3)
    small = _open(text, tmp_path)
    assert np.array_equal(small.ids, whole.ids)
    assert np.array_equal(small.borders, whole.borders)


@settings(max_examples=40)
@given(st.lists(st.floats(0.02, 0.98), min_size=1, max_size=3, unique=True))
def test_parts_that_meet_share_no_sentence_and_lose_none(shares):
    parts = []
    for start, stop in pairwise([0.0, *sorted(shares), 1.0]):
        with contextlib.suppress(FormatError):  # two borders within one sentence: the part holds none
            parts.append(_sentences(Background.open(EXCERPT, word_tokenizer(), start, stop)))
    assert [sentence for part in parts for sentence in part] == _sentences(Background.open(EXCERPT, word_tokenizer()))


def test_a_part_may_begin_within_a_character_and_needs_no_sentence_end(tmp_path):
    text = "\u4f60\u597d " * 8000
    counts = [_open(text, tmp_path, *part).tokens for part in ((0, 0.3), (0.3, 0.61), (0.61, 1))]
    assert sum(counts) == _open(text, tmp_path).tokens == 8000
    assert min(counts) > 1500


def test_what_has_no_end_is_cut_into_sentences_of_bounded_length(tmp_path):
    background = _open("the people " * 5000 + "x" * 3 * LONGEST_TEXT, tmp_path)
    lengths = np.diff(background.borders)
    assert lengths.max() == LONGEST
    assert (background.ids == background.words.encode(["people"])[0][0]).sum() == 5000


def test_drawn_sentences_are_those_of_the_text_each_as_likely(excerpt):
    ids, ends = excerpt.draw_sentences(Draws(1), 20_000)
    assert ids.dtype == np.int64
    assert ends[-1] == len(ids)
    drawn = Counter(map(bytes, np.split(ids.astype(np.int32), ends[:-1])))
    own = Counter(map(bytes, np.split(excerpt.ids, excerpt.borders[1:-1])))
    assert set(drawn) == set(own)
    expected = 20_000 / excerpt.sentences
    for sentence, count in drawn.items():
        assert abs(count / own[sentence] - expected) < 6 * expected**0.5
    assert np.array_equal(excerpt.draw(Draws(1), 20_000), ids)
    assert not np.array_equal(excerpt.draw(Draws(2), 100), excerpt.draw(Draws(3), 100))


def test_sentences_have_the_ids_that_they_have_in_running_text():
    background = Background.open(EXCERPT, byte_tokenizer())
    tokenizer = Tokenizer.from_str(byte_tokenizer())
    ids = background.draw(Draws(5), 30)
    text = tokenizer.decode(ids.tolist())
    assert text.startswith(" ")
    assert "  " not in text
    assert tokenizer.encode(text).ids == ids.tolist()


def test_the_text_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1 << 12)
    monkeypatch.setattr(module, "TOGETHER", 16)
    peaks = []
    for copies in (10, 100):
        path = tmp_path / f"{copies}.txt"
        path.write_text(EXCERPT.read_text() * copies)
        tracemalloc.start()
        background = Background.open(path, word_tokenizer())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert background.ids.nbytes > 300_000
    assert peaks[1] < peaks[0] + 50_000


WORDLESS = json.dumps(
    {**json.loads(word_tokenizer()), "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}
)


@pytest.mark.parametrize(
    ("text", "part", "tokenizer", "message"),
    [
        ("", (0, 1), None, r"text\.txt holds no sentence"),
        (" \n\t ", (0, 1), None, r"text\.txt holds no sentence"),
        (b"We are. \xff\xfe", (0, 1), None, r"text\.txt is not UTF-8 text \(.* near byte 0\)"),
        (b"We are. \xe2\x82", (0, 1), None, "is not UTF-8 text"),
        ("We are. You are.", (0.9, 1), None, r"the part 0\.9:1 of .*text\.txt holds no sentence; take a larger part"),
        ("We are.", (0.9, 0.1), None, r"the part of the text is 0\.9:0\.1; expected shares in order"),
        ("We are.", (0, 1.5), None, r"the part of the text is 0:1\.5"),
        ("We are.", (float("nan"), 1), None, "the part of the text is nan:1"),
        ("We are.", (0, 1), "{}", r"the tokenizer cannot be read .* expected the text of a tokenizer\.json"),
        ("We are.", (0, 1), WORDLESS, "the tokenizer fails on a text .*UNK"),
        (
            "You. We [SEP] are.",
            (0, 1),
            None,
            r"text\.txt holds the tokenizer's special token '\[SEP\]' in 'We \[SEP\] are\.'",
        ),
    ],
)
def test_what_cannot_be_a_background_is_refused(text, part, tokenizer, message, tmp_path):
    with pytest.raises((FormatError, ContractError), match=message):
        _open(text, tmp_path, *part, tokenizer=tokenizer)


def test_unknown_words_are_allowed(tmp_path):
    assert _sentences(_open("We [UNK] xylophone.", tmp_path)) == ["we [UNK] [UNK] ."]


def test_a_file_that_is_missing_or_none_is_refused(tmp_path):
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(FormatError, match=f"{path.name} is no regular file that is there"):
            Background.open(path, word_tokenizer())


def test_a_temporary_folder_that_cannot_be_written_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(FormatError, match=r"cannot be kept in a temporary file: .* Set TMPDIR"):
        _open("We are.", tmp_path)
