"""Many documents through a fixed number of slots: each gets what it gets alone, in every form, beside errors and threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import TOLERANCE, S, check_parity, made, reference
from wrapped import Wrapped

from rmt_trt import ContractError, EngineError, RMTRuntime, TokenError
from rmt_trt.export.verify import relative_error

LENGTHS = (3 * S + 7, 1, S, S + 1, 2 * S, 5 * S, 9, 4 * S + 19, 3 * S)
MODELS = ("bert", "gpt2")
ALIGNMENTS = ("left", "right", "center")


@pytest.fixture(scope="module", params=MODELS)
def runtime(request: pytest.FixtureRequest) -> Iterator[RMTRuntime]:
    with made(request.param).open(max_batch=8) as opened_runtime:
        yield opened_runtime


def name_of(runtime: RMTRuntime) -> str:
    return "bert" if runtime.spec.logits == "classifier" else "gpt2"


def documents_of(runtime: RMTRuntime) -> list[np.ndarray]:
    return [made(name_of(runtime)).document(length, seed=row) for row, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_each_document_gets_what_it_gets_alone(runtime: RMTRuntime, slots: int, alignment: str) -> None:
    documents = documents_of(runtime)
    found = dict(runtime.run_many(documents, slots=slots, alignment=alignment))
    assert sorted(found) == list(range(len(documents)))
    for index, document in enumerate(documents):
        alone, out = runtime.run(document, alignment=alignment), found[index]
        check_parity([(out.memory, out.logits)], [(alone.memory, alone.logits)], f"document {index}")
        assert (out.segments, out.tokens, out.label) == (alone.segments, len(document), alone.label)
        if slots == 1:  # the same shapes go through the engine: the same bits come out
            assert np.array_equal(out.memory, alone.memory)
            assert np.array_equal(out.logits, alone.logits)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_documents_of_one_length_give_bit_for_bit_what_a_batch_of_them_gives(
    runtime: RMTRuntime, alignment: str
) -> None:
    documents = [made(name_of(runtime)).document(3 * S + 7, seed=row) for row in range(4)]
    together = runtime.run(documents, alignment=alignment)
    for index, out in runtime.run_many(iter(documents), slots=4, alignment=alignment):
        assert np.array_equal(out.memory, together[index].memory)
        assert np.array_equal(out.logits, together[index].logits)


@pytest.mark.parametrize("logits", ["last", "none"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_state_of_one_of_many_is_one_to_go_on_from(runtime: RMTRuntime, slots: int, logits: str) -> None:
    documents = documents_of(runtime)
    for index, out in runtime.run_many(documents, slots=slots, alignment="left", logits=logits):
        alone = runtime.run(documents[index], alignment="left", logits=logits)
        state, wanted = out.state, alone.state
        assert np.array_equal(state.pending, wanted.pending)
        assert (state.position, state.tokens_read, state.segments) == (
            wanted.position, wanted.tokens_read, wanted.segments,
        )  # fmt: skip
        assert relative_error(state.memory, wanted.memory) <= TOLERANCE
        assert (state.last_logits is None) == (wanted.last_logits is None)
        if wanted.last_logits is not None:
            assert relative_error(state.last_logits, wanted.last_logits) <= TOLERANCE
        more = made(name_of(runtime)).document(S + 3, seed=99)
        rest, whole = (
            runtime.run(more, state=state, alignment="left"),
            runtime.run(np.concatenate([documents[index], more]), alignment="left"),
        )
        check_parity([(rest.memory, rest.logits)], [(whole.memory, whole.logits)], f"document {index}")


def test_a_batch_above_max_batch_goes_on_each_from_its_own_state(runtime: RMTRuntime) -> None:
    documents = [np.concatenate([document] * 2) for document in documents_of(runtime)]
    cuts = [1 + 7 * row % len(document) for row, document in enumerate(documents)]
    parts = [(d[:cut], d[cut:]) for d, cut in zip(documents, cuts, strict=True)]
    first = runtime.run([part for part, _ in parts], alignment="left")
    second = runtime.run([part for _, part in parts], state=first.state, alignment="left")
    for row, document in enumerate(documents):
        whole = runtime.run(document, alignment="left")
        check_parity([(second[row].memory, second[row].logits)], [(whole.memory, whole.logits)], f"row {row}")
        assert second[row].state.position == len(document)


SOURCES = {
    "list": lambda documents: documents,
    "tuple": tuple,
    "iterator": iter,
    "generator of iterators of ints": lambda documents: (iter(document.tolist()) for document in documents),
    "list of iterators of ints": lambda documents: [iter(document.tolist()) for document in documents],
    "list of iterators of pieces": lambda documents: [iter(np.array_split(d, 3)) for d in documents],
    "list of lists": lambda documents: [document.tolist() for document in documents],
    "matrix": lambda documents: np.array(
        [np.pad(document, (0, max(LENGTHS) - len(document)), constant_values=-1) for document in documents]
    ),
}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_documents_come_in_every_form(runtime: RMTRuntime, name: str, ordered: bool) -> None:
    documents = documents_of(runtime)
    wanted = runtime.run(documents, alignment="left")
    found = list(runtime.run_many(SOURCES[name](documents), slots=3, alignment="left", ordered=ordered))
    indices = [index for index, _ in found]
    assert (indices if ordered else sorted(indices)) == list(range(len(documents)))
    for index, out in found:
        check_parity([(out.memory, out.logits)], [(wanted[index].memory, wanted[index].logits)], f"document {index}")


def test_lengths_of_iterators_are_stated_in_a_list_or_an_iterator(runtime: RMTRuntime) -> None:
    documents = documents_of(runtime)
    wanted = runtime.run(documents, alignment="right")
    iterators = [iter(document.tolist()) for document in documents]
    forms: list[tuple[Any, Any]] = [
        (iterators, list(LENGTHS)),
        ((iter(document.tolist()) for document in documents), iter(LENGTHS)),
    ]
    for form, length in forms:
        for index, out in runtime.run_many(form, slots=3, alignment="right", length=length):
            check_parity([(out.memory, out.logits)], [(wanted[index].memory, wanted[index].logits)])


def test_results_on_the_device_are_those_that_are_fetched(runtime: RMTRuntime) -> None:
    documents = documents_of(runtime)
    wanted = runtime.run(documents)
    for index, out in runtime.run_many(documents, slots=3, on_device=True):
        memory, logits = np.from_dlpack(out.memory), np.from_dlpack(out.logits)
        check_parity([(memory[0], logits[0])], [(wanted[index].memory, wanted[index].logits)], f"document {index}")
        with pytest.raises(ContractError, match="kept no state"):
            _ = out.state


def test_documents_are_cut_at_a_limit_of_the_callers_own(runtime: RMTRuntime) -> None:
    documents = documents_of(runtime)
    wanted = runtime.run(documents, max_segments=2, overflow="head")
    for index, out in runtime.run_many(iter(documents), slots=3, max_segments=2, overflow="head"):
        check_parity([(out.memory, out.logits)], [(wanted[index].memory, wanted[index].logits)], f"document {index}")
        assert out.tokens == min(2 * S, LENGTHS[index])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 6 * S + 3), min_size=1, max_size=12),
    slots=st.integers(1, 5),
    alignment=st.sampled_from(ALIGNMENTS),
    logits=st.sampled_from(["last", "none"]),
    listed=st.booleans(),
    ordered=st.booleans(),
    model=st.sampled_from(MODELS),
)
def test_whatever_the_lengths_the_answers_are_those_of_the_recurrence(
    lengths: list[int], slots: int, alignment: str, logits: str, listed: bool, ordered: bool, model: str
) -> None:
    this = made(model)
    documents = [this.document(length) for length in lengths]
    many = SHARED[model]().run_many(
        documents if listed else iter(documents), slots=slots, alignment=alignment, logits=logits, ordered=ordered
    )
    found = dict(many)
    assert sorted(found) == list(range(len(lengths)))
    for index, length in enumerate(lengths):
        steps, out = reference(model, length, alignment), found[index]
        memory, rows = steps[-1]
        wanted = rows if model == "bert" else rows[-1]
        assert relative_error(out.memory, memory) <= TOLERANCE
        assert (out.segments, out.tokens) == (len(steps), length)
        assert (out.logits is None) if logits == "none" else relative_error(out.logits, wanted) <= TOLERANCE
    assert many.slot_steps == sum(out.segments for out in found.values())
    assert -(-many.slot_steps // slots) <= many.steps <= many.slot_steps


def _shared(model: str) -> Any:
    opened_runtimes: list[RMTRuntime] = []

    def get() -> RMTRuntime:
        if not opened_runtimes:
            opened_runtimes.append(made(model).open(max_batch=8))
        return opened_runtimes[0]

    return get


SHARED = {model: _shared(model) for model in MODELS}


def test_ints_of_an_iterator_are_taken_no_further_than_the_block(runtime: RMTRuntime) -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for _ in range(300 * S):
            taken.append(1)
            yield 5

    seen: list[tuple[int, int]] = []
    runtime.run(source(), alignment="left", logits="none", on_progress=lambda done: seen.append((done, len(taken))))
    assert len(seen) >= 4
    assert all(done <= read <= done + S for done, read in seen)
    assert seen[-1] == (300 * S, 300 * S)


def test_a_bad_document_is_named_and_what_was_yielded_stands(runtime: RMTRuntime) -> None:
    good = made(name_of(runtime)).document(S + 3)
    many = runtime.run_many(iter([good, good, good, [], good]), slots=1, alignment="left")
    found = [next(many), next(many)]
    with pytest.raises(TokenError, match="document 3 is empty: it has no token"):
        found += list(many)
    assert [index for index, _ in found][:2] == [0, 1]
    assert next(many, None) is None
    same = runtime.run(good, alignment="left")
    assert np.array_equal(found[0][1].logits, same.logits)
    with pytest.raises(TokenError, match=r"document 2: token 30 is 96; the vocabulary has ids 0 to 95"):
        list(runtime.run_many([good, good, [5] * 30 + [96]], slots=2, alignment="left"))
    with pytest.raises(TokenError, match=r"document 1 is the number 6; run_many takes documents"):
        list(runtime.run_many([good, 6]))

    def source() -> Iterator[np.ndarray]:
        yield good
        raise LookupError("the shelf is empty")

    with pytest.raises(LookupError, match="the shelf is empty"):
        list(runtime.run_many(source()))


@pytest.mark.parametrize("error", [EngineError("the device is gone"), KeyboardInterrupt()], ids=["engine", "ctrl-c"])
@pytest.mark.parametrize("call", ["steps", "step", "take", "fetch", "load"])
def test_an_engine_that_raises_in_the_middle_ends_the_iteration_and_nothing_else(
    runtime: RMTRuntime, call: str, error: BaseException
) -> None:
    documents = documents_of(runtime)
    wanted = runtime.run(documents, alignment="left")
    engine = runtime._engine
    left = 0 if call == "load" else 2

    class Failing(Wrapped):
        def __getattribute__(self, name: str) -> Any:
            if name == call:
                nonlocal left
                left -= 1
                if left < 0:
                    raise error
            return super().__getattribute__(name)

    runtime._engine = Failing(engine)
    try:
        many = runtime.run_many(documents, slots=3, alignment="left")
        found: list[Any] = []
        with pytest.raises(type(error)):
            found.extend(many)
        assert next(many, None) is None
    finally:
        runtime._engine = engine
    for index, out in found:
        check_parity([(out.memory, out.logits)], [(wanted[index].memory, wanted[index].logits)])
    again = runtime.run(documents, alignment="left")
    assert np.array_equal(again.logits, wanted.logits)


def test_threads_interleave_block_by_block_and_each_gets_its_own(runtime: RMTRuntime) -> None:
    documents = [documents_of(runtime)[row:] for row in range(4)]
    wanted = [dict(runtime.run_many(part, slots=3)) for part in documents]
    with ThreadPoolExecutor(4) as pool:
        for row, found in enumerate(pool.map(lambda part: dict(runtime.run_many(part, slots=3)), documents)):
            for index, out in found.items():
                assert np.array_equal(out.logits, wanted[row][index].logits)


def test_closing_the_runtime_ends_many(runtime: RMTRuntime) -> None:
    with made(name_of(runtime)).open() as closing:
        many = closing.run_many(documents_of(runtime), slots=2)
        next(many)
        closing.close()
        with pytest.raises(EngineError, match="is closed; open a new RMTRuntime"):
            list(many)


def test_progress_counts_every_token_once(runtime: RMTRuntime) -> None:
    seen: list[int] = []
    list(runtime.run_many(documents_of(runtime), slots=3, on_progress=seen.append))
    assert seen == sorted(seen)
    assert seen[-1] == sum(LENGTHS)
    for logits in ("last", "all"):
        seen.clear()
        runtime.run(documents_of(runtime), logits=logits, on_progress=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == sum(LENGTHS)


def test_no_documents_give_no_answers(runtime: RMTRuntime) -> None:
    for none in ([], iter([]), ()):
        many = runtime.run_many(none)
        assert list(many) == []
        assert (many.steps, many.idle_share) == (0, 0.0)
