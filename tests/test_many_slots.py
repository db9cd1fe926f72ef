"""Who sits in which slot of many documents, counted on an engine that only sums; and nothing piles up."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from models import S

from rmt_trt import StateSpec, StepSpec
from rmt_trt.contract import Answer, Head
from rmt_trt.runtime.many import Many, longest_first, opened, sources
from rmt_trt.runtime.reading import Opener, Reading
from rmt_trt.runtime.slots import Slots

ALIGNMENTS = ("left", "right", "center")


class Counting:
    """An engine that computes nothing but sums: the state is the number of tokens read, the logits are that too.

    Values can be told by hand, and it notes the shapes of its calls.
    """

    name, dtype = "counting", "fp32"

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def load(self, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tuple(np.array(value) for value in states)

    def fetch(self, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tuple(value.copy() for value in states)

    share = fetch

    def take(self, parts: Any, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.concatenate([part[0] for part in parts])[rows],)

    def step(self, states: Any, segment: np.ndarray, head: Head, host: bool = True) -> tuple[Any, Answer | None]:
        self.calls.append((head, segment.shape))
        new = (states[0] + (segment >= 0).sum(axis=1)[:, None],)
        return new, None if head == "none" else Answer(new[0].copy())

    def steps(self, states: Any, segments: np.ndarray) -> Any:
        self.calls.append(("block", segments.shape))
        assert (segments >= 0).all()
        return (states[0] + segments.shape[0] * segments.shape[2],)

    def close(self) -> None:
        pass


SPEC = StepSpec("custom", (StateSpec(shape=(1,)),), S, 96, "classifier", 1)
INITIAL = (np.zeros(1, np.float32),)


def counted(
    documents: Any, slots: int, engine: Any, *, logits: str = "none", alignment: str = "left", ordered: bool = False
) -> Many:
    """Many documents through a `Counting` engine, by the same parts as `RMTRuntime.run_many`."""
    reading = Reading.of(SPEC, alignment, logits, None, "error")
    opener = Opener(reading, SPEC, INITIAL, lambda text: np.empty(0, np.int64))
    found, _ = sources(documents, None, ordered)
    scheduler = Slots(lambda: engine, SPEC, threading.RLock(), slots, reading, INITIAL)
    return Many(scheduler, opened(opener, found), SPEC, reading, ordered)


def of_segments(*counts: int) -> list[np.ndarray]:
    return [np.full(count * S, 5) for count in counts]


def test_idle_slots_are_those_counted_by_hand() -> None:
    engine = Counting()
    many = counted(of_segments(3, 1, 2), 2, engine)
    assert (many.steps, many.slot_steps, many.idle_share) == (0, 0, 0.0)
    found = dict(many)
    assert [found[index].memory.item() for index in range(3)] == [3 * S, S, 2 * S]
    # 3 and 2 begin; 2 ends after two steps, 1 takes its slot, and both end together.
    assert engine.calls == [("block", (2, 2, S)), ("block", (1, 2, S))]
    assert (many.steps, many.slot_steps, many.idle_share) == (3, 6, 0.0)

    engine = Counting()
    many = counted(of_segments(4, 1, 1), 2, engine)
    list(many)
    # Nobody is left to sit beside the last two segments of the longest.
    assert engine.calls == [("block", (1, 2, S)), ("block", (1, 2, S)), ("block", (2, 1, S))]
    assert (many.steps, many.slot_steps, many.idle_share) == (4, 6, 0.25)

    engine = Counting()
    many = counted(of_segments(3, 2), 2, engine, logits="last")
    found = dict(many)
    assert [found[index].logits.item() for index in range(2)] == [3 * S, 2 * S]
    # The last full segments, whose logits are wanted, wait for each other and go together.
    assert engine.calls == [("block", (1, 2, S)), ("block", (1, 1, S)), ("last", (2, S))]
    assert (many.steps, many.slot_steps, many.idle_share) == (3, 5, pytest.approx(1 / 6))


def test_short_segments_wait_for_each_other_and_apart_from_full_ones() -> None:
    engine = Counting()
    documents = [np.full(length, 5) for length in (2 * S + 1, 2 * S, S + 2, S)]
    found = dict(counted(documents, 4, engine, logits="last"))
    assert [found[index].logits.item() for index in range(4)] == [2 * S + 1, 2 * S, S + 2, S]
    assert [call for call in engine.calls if call[0] == "last"] == [("last", (2, S)), ("last", (2, 2))]


def test_a_list_is_started_longest_first_and_what_is_of_unknown_length_before() -> None:
    assert longest_first([3, 9, None, 4, 9]) == [2, 1, 4, 3, 0]
    ends = [index for index, _ in counted(of_segments(1, 2, 5, 3), 4, Counting())]
    assert ends == [0, 1, 3, 2]
    begun = [index for index, _, _ in sources(of_segments(1, 2, 5, 3), None, False)[0]]
    assert begun == [2, 3, 1, 0]
    assert [index for index, _, _ in sources(of_segments(1, 2, 5, 3), None, True)[0]] == [0, 1, 2, 3]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("ordered", [False, True])
def test_of_an_endless_iterator_no_more_than_twice_the_slots_are_open(alignment: str, ordered: bool) -> None:
    taken, done, most = 0, 0, 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken, most
        for number in itertools.count():
            taken += 1
            most = max(most, taken - done)
            yield np.full(1 + 37 * number % (7 * S), 5)

    many = counted(endless(), 4, Counting(), logits="last", alignment=alignment, ordered=ordered)
    for index, out in itertools.islice(many, 500):
        done += 1
        assert out.logits.item() == 1 + 37 * index % (7 * S)
        assert not ordered or index == done - 1
    # One is taken to be opened, and up to a queue of them has ended and was not yielded yet.
    assert most <= (2 * 4 + 4 + 1 if not ordered else 8 * 4 + 1)
    assert many.idle_share < 0.5


def test_a_long_document_at_the_front_does_not_pile_up_answers_behind_it() -> None:
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        yield np.full(1000 * S, 5)
        taken += 1
        for _ in range(5000):
            taken += 1
            yield np.full(S, 5)

    many = counted(source(), 4, Counting(), ordered=True)
    assert next(many)[0] == 0
    assert taken <= 8 * 4 + 1
    assert [index for index, _ in many] == list(range(1, 5001))
