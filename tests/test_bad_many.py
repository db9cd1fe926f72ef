"""Many documents from careless callers: what is no document, one iterator for two, several threads, calls from within."""

from __future__ import annotations

import gc
import threading
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import models
import numpy as np
import pytest

from rmt_trt import ContractError, RMTRuntime, TokenError

DOCUMENT = np.arange(50) % 90 + 5


@pytest.fixture(scope="module")
def runtime() -> Iterator[RMTRuntime]:
    with models.made("gpt2").open(max_batch=8) as opened:
        yield opened


NO_DOCUMENTS: dict[str, Any] = {
    "bytes": b"\x05\x06", "bytearray": bytearray(b"\x05\x06"), "memoryview": memoryview(b"\x05\x06"), "dict": {5: 6},
    "mapping": UserDict({5: 6}), "keys": {5: 6}.keys(), "set": {5, 6}, "frozenset": frozenset({5, 6}),
}  # fmt: skip
HOW: dict[str, Callable[[RMTRuntime, Any], Any]] = {
    "run": lambda runtime, document: runtime.run(document),
    "run a batch": lambda runtime, document: runtime.run([document]),
    "stream": lambda runtime, document: runtime.stream(document),
    "run_many": lambda runtime, document: list(runtime.run_many([document])),
    "run_many of an iterator": lambda runtime, document: list(runtime.run_many(iter([document]))),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", NO_DOCUMENTS)
def test_what_only_iterates_like_a_document_is_none(runtime: RMTRuntime, name: str, how: str) -> None:
    """Its keys, or its bytes, would pass for token ids."""
    kind = type(NO_DOCUMENTS[name]).__name__
    with pytest.raises(TokenError, match=rf"tokens are of type {kind}; expected an"):
        HOW[how](runtime, NO_DOCUMENTS[name])


@pytest.mark.parametrize("documents", [{(5, 6): 1}, {(5, 6), (7, 8)}, bytearray(b"ab")], ids=["dict", "set", "bytes"])
def test_what_has_no_order_holds_no_documents(runtime: RMTRuntime, documents: Any) -> None:
    with pytest.raises(TokenError, match=rf"takes many documents and got {type(documents).__name__}; pass a list"):
        runtime.run_many(documents)


@pytest.mark.parametrize("slots", [1, 4])
def test_an_iterator_that_comes_twice_out_of_an_iterator_is_refused(runtime: RMTRuntime, slots: int) -> None:
    same = iter([5] * 5000)
    with pytest.raises(
        TokenError, match="documents 1 and 2 are one and the same iterator, which gives its tokens once"
    ):
        list(runtime.run_many(iter([[5], same, same]), slots=slots))


def test_iterators_that_come_one_after_another_are_not_taken_for_the_same(runtime: RMTRuntime) -> None:
    """The memory of one that has ended goes to the next, its id with it."""

    def source() -> Iterator[Iterator[int]]:
        for _ in range(200):
            yield iter([5] * 3)

    assert len(list(runtime.run_many(source(), slots=2))) == 200


def test_lengths_that_end_before_the_documents_are_an_error(runtime: RMTRuntime) -> None:
    many = runtime.run_many(iter([DOCUMENT] * 3), length=iter([50, None]))
    with pytest.raises(ContractError, match="length ended before the documents: it gave 2, and document 2 came"):
        list(many)


FLAGS: dict[str, Callable[[RMTRuntime, Any], Any]] = {
    "on_device": lambda runtime, value: runtime.run(DOCUMENT, on_device=value),
    "on_device of many": lambda runtime, value: runtime.run_many([DOCUMENT], on_device=value),
    "ordered": lambda runtime, value: runtime.run_many([DOCUMENT], ordered=value),
    "memory": lambda runtime, value: runtime.stream(DOCUMENT, memory=value),
    "keep": lambda runtime, value: runtime.stream(DOCUMENT, keep=value),
}


@pytest.mark.parametrize("value", ["cpu", "no", None, 1])
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(runtime: RMTRuntime, name: str, value: Any) -> None:
    with pytest.raises(ContractError, match=rf"{name.split()[0]} is {value!r}; expected True or False"):
        FLAGS[name](runtime, value)


def taken_by_threads(source: Iterator[Any]) -> list[Any]:
    """What three threads took together. Errors: the first that a thread met."""
    taken: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            taken.extend(source)
        except BaseException as err:  # told to the test
            errors.append(err)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return taken


def test_threads_that_share_many_take_turns(runtime: RMTRuntime) -> None:
    documents = [models.made("gpt2").document(50 + row) for row in range(100)]
    found = taken_by_threads(runtime.run_many(documents, slots=2))
    assert sorted(index for index, _ in found) == list(range(100))
    assert all(out.tokens == 50 + index for index, out in found)


def test_threads_that_share_a_stream_take_turns(runtime: RMTRuntime) -> None:
    stream = runtime.stream([DOCUMENT, DOCUMENT[:30]] * 3)
    found = taken_by_threads(stream)
    assert sorted((piece.row, piece.index) for piece in found) == sorted(
        (row, index) for row in range(6) for index in range(2 if row % 2 else 3)
    )
    assert stream.result.tokens == [50, 30] * 3  # type: ignore[union-attr]


def test_what_is_asked_for_more_from_within_says_so(runtime: RMTRuntime) -> None:
    running: list[Iterator[Any]] = []
    running.append(runtime.run_many([DOCUMENT] * 5, slots=2, on_progress=lambda done: next(running[0])))
    with pytest.raises(ContractError, match="run_many was asked for more while it works on an answer"):
        list(running[0])

    def tokens() -> Iterator[int]:
        yield from [5] * 30
        next(running[1])

    running.append(runtime.stream(tokens(), alignment="left"))
    with pytest.raises(ContractError, match="the stream was asked for more while it works on an answer"):
        list(running[1])
    assert runtime.run(DOCUMENT).tokens == 50


def test_many_that_is_dropped_half_way_leaves_the_runtime_usable(runtime: RMTRuntime) -> None:
    wanted = runtime.run(DOCUMENT).logits
    closed: list[bool] = []

    def source() -> Iterator[np.ndarray]:
        try:
            while True:
                yield DOCUMENT
        finally:
            closed.append(True)

    many = runtime.run_many(source(), slots=3)
    next(many)
    del many
    gc.collect()
    assert closed == [True]
    assert np.array_equal(runtime.run(DOCUMENT).logits, wanted)
