"""Properties: where documents are cut, and what is read of them however their tokens come."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rmt_trt import ContractError, StateSpec, StepSpec, TokenError
from rmt_trt.contract import ALIGNMENTS
from rmt_trt.model.recurrence import split
from rmt_trt.runtime.segments import Cut, Limit, cut
from rmt_trt.runtime.tokens import PIECE, Document, split_batch

VOCAB = 50
lengths = st.integers(1, 700)
segment_lengths = st.integers(1, 60)
alignments = st.sampled_from(ALIGNMENTS)


def sizes_of(plan: Cut, length: int) -> list[int]:
    """Sizes of the segments, taken one by one as the recurrence takes them."""
    sizes: list[int] = []
    while (left := length - sum(sizes)) > 0:
        sizes.append(min(left, plan.size(len(sizes))))
    return sizes


@given(lengths, segment_lengths, alignments)
@example(25, 25, "center")
@example(26, 25, "center")
@example(1, 1, "right")
def test_segments_are_full_but_for_the_one_that_may_be_short(length: int, segment_length: int, alignment: str) -> None:
    sizes = sizes_of(cut(length, segment_length, alignment), length)
    assert sum(sizes) == length
    assert all(1 <= size <= segment_length for size in sizes)
    assert len(sizes) == -(-length // segment_length) == cut(length, segment_length, alignment).count(length)
    if alignment == "left":
        assert set(sizes[:-1]) <= {segment_length}
    elif alignment == "right":
        assert set(sizes[1:]) <= {segment_length}
    else:
        assert len(set(sizes[:-1])) <= 1
        assert sizes[-1] <= sizes[0]
        assert sizes[0] == -(-length // len(sizes))  # as even as chunks of one size can be


@given(lengths, segment_lengths, alignments)
def test_segments_are_those_of_the_plain_recurrence(length: int, segment_length: int, alignment: str) -> None:
    config = SimpleNamespace(dropped_ids=(), segment_length=segment_length, alignment=alignment)
    wanted = [len(segment) for segment in split(range(length), config)]
    assert sizes_of(cut(length, segment_length, alignment), length) == wanted


@given(st.integers(1, 10**15), st.integers(1, 1 << 20), alignments)
def test_lengths_beyond_what_a_float_counts_exactly_are_cut_right(
    length: int, segment_length: int, alignment: str
) -> None:
    plan = cut(length, segment_length, alignment)
    count = plan.count(length)
    last = length - plan.first - (count - 2) * plan.rest if count > 1 else length
    assert 1 <= plan.first <= segment_length
    assert 1 <= last <= plan.rest


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_a_length_that_is_needed_and_unknown_is_an_error(alignment: str) -> None:
    with pytest.raises(TokenError, match=rf"alignment '{alignment}' needs the number of tokens beforehand.*length="):
        cut(None, 20, alignment)
    with pytest.raises(ContractError, match="a document of 0 tokens cannot be cut"):
        cut(0, 20, alignment)


@given(lengths, segment_lengths, st.integers(1, 12), st.sampled_from(["head", "tail"]))
def test_a_limit_keeps_the_head_or_the_tail(length: int, segment_length: int, most: int, overflow: str) -> None:
    start, stop = Limit(most, overflow).window(length, segment_length, "the document")
    assert stop - start == min(length, most * segment_length)
    assert (start == 0) if overflow == "head" else (stop == length)


@given(lengths, segment_lengths, st.integers(1, 12))
def test_a_limit_refuses_what_is_longer_and_nothing_else(length: int, segment_length: int, most: int) -> None:
    limit = Limit(most)
    if length <= most * segment_length:
        assert limit.window(length, segment_length, "the document") == (0, length)
    else:
        with pytest.raises(
            TokenError, match=rf"{length} tokens.*max_segments={most} allows.*overflow='head' or 'tail'"
        ):
            limit.window(length, segment_length, "the document")


@pytest.mark.parametrize("most", [0, -1, True, 1.5, "2"])
def test_a_limit_is_a_whole_number(most: Any) -> None:
    with pytest.raises(ContractError, match=r"max_segments is .*; expected a whole number of at least 1"):
        Limit(most)


def spec_of(dropped: tuple[int, ...] = ()) -> StepSpec:
    return StepSpec("custom", (StateSpec(shape=(1,)),), 20, VOCAB, "classifier", 2, dropped_ids=dropped)


ids = st.lists(st.integers(0, VOCAB - 1), max_size=120)
dropped_ids = st.sets(st.integers(0, VOCAB - 1), max_size=12).map(lambda values: tuple(sorted(values)))
piece_sizes = st.lists(st.integers(0, 37), min_size=1, max_size=12).filter(any)
read_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def in_turn(sizes: list[int], length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of these sizes, over and over, until `length` is covered."""
    start, index = 0, 0
    while start < length:
        stop = min(length, start + sizes[index % len(sizes)])
        yield start, stop
        start, index = stop, index + 1


def forms(tokens: list[int], sizes: list[int], padding: int) -> dict[str, Any]:
    """A document as an array, a list, ints one by one, and pieces of these sizes."""
    padded = tokens + [-1] * padding
    cuts = list(in_turn(sizes, len(padded)))
    return {
        "array": np.array(padded, np.int32),
        "list": padded,
        "ints": iter(padded),
        "pieces": (np.array(padded[a:b], np.int16) for a, b in cuts),
        "lists": (padded[a:b] for a, b in cuts),
        "both": (item for n, (a, b) in enumerate(cuts) for item in (padded[a:b] if n % 2 else [padded[a:b]])),
    }


@given(ids, dropped_ids, piece_sizes, read_sizes, st.integers(0, 30))
def test_what_is_read_does_not_depend_on_how_it_came_or_is_read(
    tokens: list[int], dropped: tuple[int, ...], pieces: list[int], reads: list[int], padding: int
) -> None:
    kept = [(position, token) for position, token in enumerate(tokens) if token not in dropped]
    for name, form in forms(tokens, pieces, padding).items():
        document = Document(form, spec_of(dropped), "the document")
        found: list[int] = []
        for turn in range(len(tokens) + 2):
            size = reads[turn % len(reads)]
            part = document.read(size)
            assert part.dtype == np.int64
            found += part.tolist()
            assert found == [token for _, token in kept[: len(found)]], name
            assert document.tokens_read == (kept[len(found) - 1][0] + 1 if found else 0), name
            if len(part) < size:
                break
        assert len(found) == len(kept), name
        assert document.at_end()
        assert not len(document.read(1))


@given(ids, dropped_ids, piece_sizes, st.integers(0, 120))
def test_reading_on_from_tokens_read_gives_the_rest(
    tokens: list[int], dropped: tuple[int, ...], pieces: list[int], first: int
) -> None:
    wanted = [token for token in tokens if token not in dropped]
    for name, form in forms(tokens, pieces, 0).items():
        document = Document(form, spec_of(dropped), "the document")
        head = document.read(first).tolist() if first else []
        rest = Document(np.array(tokens[document.tokens_read :], np.int64), spec_of(dropped), "the document")
        assert head + rest.read(len(tokens) + 1).tolist() == wanted, name


@given(ids, dropped_ids, st.integers(0, 30))
def test_the_length_of_an_array_counts_neither_dropped_ids_nor_padding(
    tokens: list[int], dropped: tuple[int, ...], padding: int
) -> None:
    document = Document(np.array(tokens + [-1] * padding, np.int64), spec_of(dropped), "the document")
    wanted = len([token for token in tokens if token not in dropped])
    assert document.count() == wanted
    assert len(document.read(len(tokens) + 1)) == wanted  # counting has read nothing away


@given(ids, dropped_ids, st.integers(0, 130))
def test_skipped_tokens_are_passed_over_and_counted(tokens: list[int], dropped: tuple[int, ...], count: int) -> None:
    document = Document(iter(tokens), spec_of(dropped), "the document")
    document.skip(count)
    assert document.read(len(tokens) + 1).tolist() == [token for token in tokens if token not in dropped][count:]


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=80), st.integers(1, 90), piece_sizes)
def test_a_stated_length_that_is_wrong_is_an_error_before_the_end(
    tokens: list[int], stated: int, pieces: list[int]
) -> None:
    document = Document(iter(tokens), spec_of(), "the document", stated)
    if stated == len(tokens):
        assert document.read(stated).tolist() == tokens
        assert not len(document.read(1))
        return

    def read_all() -> None:
        for size in pieces * 90:
            if size and not len(document.read(size)):
                return

    with pytest.raises(TokenError, match=rf"length={stated} was stated, but \d+ tokens came"):
        read_all()


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60), st.data())
def test_an_id_outside_the_vocabulary_is_named_by_its_position(tokens: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    bad = data.draw(st.integers(VOCAB, 1 << 62))
    spoiled = [*tokens[:place], bad, *tokens[place + 1 :]]
    for form in (np.array(spoiled, np.int64), spoiled, iter(spoiled), iter([spoiled[:3], spoiled[3:]])):
        with pytest.raises(TokenError, match=rf"token {place} is {bad}.*vocabulary"):
            Document(form, spec_of(), "the document").read(len(spoiled) + 1)


@given(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60), st.data())
def test_padding_in_front_of_a_token_is_refused_wherever_pieces_end(tokens: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens) - 2))
    spoiled = [*tokens[:place], -data.draw(st.integers(1, 100)), *tokens[place + 1 :]]
    for sizes in ([1], [7], [60]):
        for name, form in forms(spoiled, sizes, 0).items():
            with pytest.raises(TokenError, match=rf"token {place} is padding .* but token {place + 1} behind it"):
                Document(form, spec_of(), name).read(len(spoiled) + 1)


def test_arrays_longer_than_the_piece_that_is_checked_at_a_time_are_read_whole() -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 3 * PIECE + 5)
    document = Document(tokens, spec_of((7,)), "the document")
    assert np.array_equal(document.read(len(tokens)), tokens[tokens != 7])
    tokens[2 * PIECE + 11] = VOCAB
    with pytest.raises(TokenError, match=rf"token {2 * PIECE + 11} is {VOCAB}"):
        Document(tokens, spec_of((7,)), "the document").count()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "empty list"),
        (np.zeros((2, 3, 4), np.int64), r"shape \(2, 3, 4\); expected 1-D"),
        (np.array(3), r"shape \(\)"),
        (7, "of type int"),
        ({1, 2}, "of type set"),
        (b"abc", "of type bytes"),
        (None, "of type NoneType"),
    ],
)
def test_what_is_no_document_is_named(tokens: Any, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        split_batch(tokens)


def test_a_limit_counts_the_tokens_that_an_earlier_part_left_pending():
    limit = Limit(2, "head")
    assert limit.window(100, 20, "the document") == (0, 40)
    assert limit.window(100, 20, "the document", pending=7) == (0, 33)
    with pytest.raises(TokenError, match="34 tokens make 3 segments of 20; max_segments=2 allows 33 tokens"):
        Limit(2).window(34, 20, "the document", pending=7)
