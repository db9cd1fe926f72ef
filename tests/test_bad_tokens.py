"""Tokens that no model reads: each is refused with a TokenError that names the document and the place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import models
import numpy as np
import pytest
import torch

from rmt_trt import RMTRuntime, TokenError

DOCUMENT = np.arange(50) % 90 + 5


@pytest.fixture(scope="module")
def classifier() -> Iterator[RMTRuntime]:
    """A BERT: alignment right, the ids 0, 2 and 3 are dropped."""
    with models.made("bert").open() as runtime:
        yield runtime


@pytest.fixture(scope="module")
def language() -> Iterator[RMTRuntime]:
    """A GPT-2: alignment left, no id is dropped."""
    with models.made("gpt2").open() as runtime:
        yield runtime


class Unreadable:
    """Speaks DLPack, but lives where numpy cannot read it."""

    def __dlpack__(self, **options: Any) -> Any:
        raise RuntimeError("device memory of another process")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (10, 0)  # a ROCm device


class OnNoGpu(Unreadable):
    """Claims to lie on an NVIDIA GPU that no machine has."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 999)


class Broken:
    """An array and an iterable, both broken."""

    def __array__(self, *args: Any) -> np.ndarray:
        raise KeyError("column")


class NoIterator:
    def __iter__(self) -> Any:
        return 5


# name: (tokens, what the message says)
REFUSED: dict[str, tuple[Any, str]] = {
    "none": (None, "tokens are of type NoneType; expected an integer array, a list, an iterator"),
    "int": (5, "tokens are of type int; expected an integer array"),
    "bytes": (b"abc", "tokens are of type bytes; expected an integer array"),
    "bytearray": (bytearray(b"abc"), "tokens are of type bytearray; expected an integer array"),
    "dict": ({1: 2}, "tokens are of type dict; expected an integer array"),
    "set": ({1, 2}, "tokens are of type set; expected an integer array"),
    "function": (len, "tokens are of type builtin_function_or_method; expected an integer array"),
    "rank 0": (np.array(3), "tokens have shape (); expected 1-D (a document) or 2-D (a batch of 1 row or more)"),
    "rank 3": (np.zeros((1, 2, 3), int), "tokens have shape (1, 2, 3); expected 1-D"),
    "tensor of rank 0": (torch.tensor(3), "tokens have shape (); expected 1-D"),
    "list of tensors of rank 0": ([torch.tensor(3)], "document 0 of the batch: tokens have shape (); expected one"),
    "empty list": ([], "tokens are an empty list; expected at least one token, or a list of documents"),
    "empty tuple": ((), "tokens are an empty list"),
    "empty array": (np.empty(0, np.int64), "the document is empty: it has no token. Leave it out, or give it"),
    "batch of no rows": (np.empty((0, 5), np.int64), "tokens have shape (0, 5); expected 1-D (a document) or 2-D"),
    "batch of empty rows": (np.empty((2, 0), np.int64), "document 0 of the batch is empty"),
    "batch with an empty row": ([[5, 6], [], [7]], "document 1 of the batch is empty: it has no token"),
    "row of padding": (np.array([[5, 6], [-1, -1]]), "document 1 of the batch is empty"),
    "padding alone": ([-1, -1], "the document is empty"),
    "exhausted generator": (iter([]), "the document is empty"),
    "empty pieces": (iter([[], np.empty(0, int)]), "the document is empty"),
    "empty range": (range(0), "the document is empty"),
    "beyond the vocabulary": (
        [5, 6, 96],
        "the document: token 2 is 96; the vocabulary has ids 0 to 95. Was the text tokenised with this model's tokenizer?",
    ),
    "beyond the vocabulary in a batch": ([[5], [6, 1000]], "document 1 of the batch: token 1 is 1000; the vocabulary"),
    "beyond the vocabulary, late": (np.r_[np.full(70_000, 5), 96], "token 70000 is 96; the vocabulary has ids"),
    "endless range": (range(10**15), "token 96 is 96; the vocabulary has ids 0 to 95"),
    "padding in the middle": (
        [5, -1, 6],
        "the document: token 1 is padding (an id below 0), but token 2 behind it is 6. Padding stands at the end of a row",
    ),
    "padding in front": ([-1, -1, 5], "token 0 is padding (an id below 0), but token 2 behind it is 5"),
    "left padding in a batch": (np.array([[5, 6], [-1, 7]]), "document 1 of the batch: token 0 is padding"),
    "fraction": ([5, 6.5], "the document: token 1 is 6.5; token ids are whole numbers"),
    "fraction in a half float": (np.array([5, 6.5], np.float16), "token 1 is 6.5; token ids are whole numbers"),
    "nan": (np.array([5, np.nan]), "token 1 is nan; token ids are whole numbers"),
    "inf": (np.array([np.inf]), "token 0 is inf; token ids are whole numbers"),
    "float beyond exactness": (np.array([1e300]), "token 0 is 1e+300; token ids are whole numbers"),
    "huge int": ([5, 2**70], f"the document: token 1 is {2**70}; no vocabulary is that large. Is it a token id?"),
    "huge negative int": ([-(2**70)], f"token 0 is {-(2**70)}; no vocabulary is that large"),
    "uint64": (np.array([5, 2**63 + 1], np.uint64), f"token 1 is {2**63 + 1}; no vocabulary is that large"),
    "bools": ([True, False], "token 0 is True, of type bool; token ids are whole numbers"),
    "bool among ints": ([5, True], "token 1 is True, of type bool"),
    "array of bools": (np.array([True]), "tokens have dtype bool; expected integers"),
    "array of strings": (np.array(["a", "b"]), "tokens have dtype <U1; expected integers. For text pass a str"),
    "string among ints": ([5, "a"], "token 1 is 'a', of type str; token ids are whole numbers"),
    "None among ints": ([5, None], "token 1 is None, of type NoneType"),
    "None among documents": ([[5], None], "document 1 of the batch: tokens are of type NoneType; expected an array"),
    "objects": (np.array([5, None], object), "token 1 is None, of type NoneType"),
    "complex": (np.array([1j]), "tokens have dtype complex128; expected integers"),
    "dates": (np.array(["2020-01-01"], "datetime64[D]"), "tokens have dtype datetime64[D]; expected integers"),
    "records": (np.zeros(2, [("id", int)]), "tokens have dtype [('id', '<i8')]; expected integers"),
    "masked": (np.ma.array([5, 6], mask=[0, 1]), "tokens are a masked array, whose masked values are no tokens"),
    "ragged list": ([5, [6, 7]], "the document: token 1 is [6, 7], of type list; token ids are whole numbers"),
    "ragged rows": ([[5, [6]], [7]], "document 0 of the batch: token 1 is [6], of type list"),
    "nested thrice": ([[[5, 6]]], "document 0 of the batch: token 0 is [5, 6], of type list"),
    "DLPack that fails": (Unreadable(), "type Unreadable cannot be read as a numpy array (device memory of another"),
    "DLPack on a GPU that is not there": (OnNoGpu(), "tokens of type OnNoGpu lie on GPU 999, and cannot be fetched"),
    "DLPack that fails, in a batch": ([[5], Unreadable()], "type Unreadable cannot be read as a numpy array"),
    "DLPack that fails, in an iterator": (iter([Unreadable()]), "type Unreadable cannot be read as a numpy array"),
    "array protocol that fails": (Broken(), "type Broken cannot be read as a numpy array ('column'). Move them"),
    "tensor with a gradient": (torch.zeros(3, requires_grad=True), "require gradient, use tensor.detach()"),
    "tensor without data": (torch.zeros(3, device="meta"), "tokens of type Tensor cannot be read as a numpy array"),
    "iterator of 2-D pieces": (iter([np.zeros((2, 2), int)]), "the iterator gave an array of shape (2, 2) at token 0"),
    "iterator of strings": (iter(["word"]), "the iterator gave 'word' at token 0; expected ints or 1-D integer pieces"),
    "iterator with None inside": (iter([5, 6, None, 7]), "the iterator gave None at token 2; expected ints"),
    "iterator with None behind a piece": (iter([[5, 6], None]), "the iterator gave None at token 2"),
    "iterator with a bool": (iter([5, True]), "token 1 is True, of type bool"),
    "iterator with a fraction": (iter([5] * 30 + [0.5]), "token 30 is 0.5; token ids are whole numbers"),
    "iterator with a huge int": (iter([5] * 30 + [2**70]), f"token 30 is {2**70}; no vocabulary is that large"),
    "iterator beyond the vocabulary": (iter([5] * 5000 + [200]), "token 5000 is 200; the vocabulary has ids 0 to 95"),
    "iterator padded in the middle": (iter([5, -1, 6]), "token 1 is padding (an id below 0), but token 2"),
    "iterator of ragged pieces": (iter([[5, [6]]]), "token 1 is [6], of type list"),
    "iter() that gives no iterator": (NoIterator(), "the token iterator raised TypeError: iter() returned non-iterator"),
    "text without a tokenizer": ("hello", "holds no tokenizer, so it reads token ids, not text. Open the bundle's folder"),
    "texts without a tokenizer": (["hello", "you"], "holds no tokenizer, so it reads token ids, not text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_run_with_its_message(language: RMTRuntime, name: str) -> None:
    tokens, message = REFUSED[name]
    with pytest.raises(TokenError, match=re.escape(message)):
        language.run(tokens)


@pytest.mark.parametrize("tokens", [[0, 2, 3, 3], np.array([2]), iter([0, 0])], ids=["list", "array", "iterator"])
def test_a_document_of_dropped_ids_alone_is_empty(classifier: RMTRuntime, tokens: Any) -> None:
    message = "the document is empty: it has no token after dropping the ids [0, 2, 3]. Leave it out"
    with pytest.raises(TokenError, match=re.escape(message)):
        classifier.run(tokens, alignment="left")


def test_a_row_of_dropped_ids_alone_is_named(classifier: RMTRuntime) -> None:
    with pytest.raises(TokenError, match=r"document 2 of the batch is empty: it has no token after dropping"):
        classifier.run([[5], [6], [2, 3]])


def test_a_dropped_id_beyond_the_vocabulary_is_refused_like_any(classifier: RMTRuntime) -> None:
    with pytest.raises(TokenError, match="token 1 is 97; the vocabulary has ids 0 to 95"):
        classifier.run([0, 97])


@pytest.mark.parametrize("size", [1, 7], ids=["ints", "pieces"])
@pytest.mark.parametrize("after", [0, 13, 47, 5000])
def test_an_iterator_that_raises_is_chained_and_its_place_named(language: RMTRuntime, after: int, size: int) -> None:
    def source() -> Iterator[Any]:
        for _ in range(after // size):
            yield 5 if size == 1 else [5] * size
        yield from [[5]] * (after % size)
        raise OSError("the disk is gone")

    with pytest.raises(
        TokenError, match=rf"raised OSError: the disk is gone after {after} tokens\. .*saved state"
    ) as info:
        language.run(source())
    assert isinstance(info.value.__cause__, OSError)


def test_what_came_before_an_iterator_raised_is_in_the_streams_state(language: RMTRuntime) -> None:
    def source() -> Iterator[int]:
        yield from DOCUMENT[:47].tolist()
        raise ConnectionError("gone")

    stream = language.stream(source())
    with pytest.raises(TokenError, match="raised ConnectionError: gone after 47 tokens"):
        list(stream)
    state = stream.state
    assert state.tokens_read == 40
    resumed = language.run(DOCUMENT[state.tokens_read :], state=state)
    assert np.array_equal(resumed.logits, language.run(DOCUMENT).logits)


def test_an_interrupt_inside_an_iterator_passes_through(language: RMTRuntime) -> None:
    def source() -> Iterator[int]:
        yield from [5] * 30
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        language.run(source())


def test_an_error_of_our_own_inside_an_iterator_is_not_wrapped(language: RMTRuntime) -> None:
    def source() -> Iterator[int]:
        yield 5
        raise TokenError("line 7 of ids.txt: 'x' is no token id")

    with pytest.raises(TokenError, match=r"^line 7 of ids.txt"):
        language.run(source())


def test_ints_are_taken_from_an_iterator_only_as_they_are_needed(language: RMTRuntime) -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for token in DOCUMENT.tolist():
            taken.append(token)
            yield token

    stream = language.stream(source())
    counts = [(piece.stop, len(taken)) for piece in stream]
    assert counts == [(20, 20), (40, 40), (50, 50)]


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize(("stated", "came"), [(49, 50), (40, 50), (1, 50), (51, 50), (60, 50), (10**30, 50)])
def test_an_iterator_of_another_length_than_stated_is_refused(
    language: RMTRuntime, alignment: Any, stated: int, came: int
) -> None:
    with pytest.raises(TokenError, match=rf"length={stated} was stated, but .*tokens came.*State the right length"):
        language.run(iter(DOCUMENT[:came].tolist()), length=stated, alignment=alignment)


@pytest.mark.parametrize("stated", [40, 60])
def test_an_array_of_another_length_than_stated_is_refused(classifier: RMTRuntime, stated: int) -> None:
    message = rf"length={stated} was stated, but 50 tokens came after dropping the ids \[0, 2, 3\]"
    with pytest.raises(TokenError, match=message):
        classifier.run(DOCUMENT, length=stated)


@pytest.mark.parametrize("stated", [0, -1, 50.0, "50", True, [50]])
def test_a_length_that_is_no_whole_number_is_refused(classifier: RMTRuntime, stated: Any) -> None:
    message = f"the document: length={stated!r}; expected the number of tokens, at least 1"
    with pytest.raises(TokenError, match=re.escape(message)):
        classifier.run(iter(DOCUMENT), length=stated)


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_an_iterator_without_its_length_needs_alignment_left(classifier: RMTRuntime, alignment: Any) -> None:
    message = f"alignment '{alignment}' needs the number of tokens beforehand.* Pass length=, pass an array, or use"
    with pytest.raises(TokenError, match=message):
        classifier.run(iter(DOCUMENT), alignment=alignment)


def test_one_iterator_as_two_documents_is_refused(language: RMTRuntime) -> None:
    source = iter(DOCUMENT.tolist())
    with pytest.raises(TokenError, match="documents 0 and 2 of the batch are one and the same iterator"):
        language.run([source, [5], source])


def test_a_bad_document_in_a_batch_leaves_the_runtime_usable(language: RMTRuntime) -> None:
    wanted = language.run(DOCUMENT).logits
    with pytest.raises(TokenError, match="document 1 of the batch: token 30 is 96"):
        language.run([DOCUMENT, [5] * 30 + [96]])
    assert np.array_equal(language.run(DOCUMENT).logits, wanted)


def test_whole_floats_and_objects_that_are_ints_are_read(language: RMTRuntime) -> None:
    wanted = language.run(DOCUMENT).logits
    assert np.array_equal(language.run(DOCUMENT.astype(np.float16)).logits, wanted)
    assert np.array_equal(language.run(DOCUMENT.astype(object)).logits, wanted)
