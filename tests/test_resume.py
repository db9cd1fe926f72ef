"""Stop and go on: what a document in two parts gives is, bit for bit, what the whole gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Made, S, check_parity, made
from wrapped import Wrapped

from rmt_trt import ContractError, EngineError, FormatError, RMTRuntime, State, TokenError
from rmt_trt.contract import Engine, Head

MODELS = ("bert", "gpt2")
LENGTH = 3 * S + 7


def through_a_file(runtime: RMTRuntime, state: State, folder: Path) -> State:
    """The state as another process would find it."""
    state.save(folder / "document.state")
    return runtime.load_state(folder / "document.state")


def same_answer(found: Any, wanted: Any) -> None:
    assert np.array_equal(found.memory, wanted.memory)
    assert np.array_equal(found.logits, wanted.logits)
    same_state(found.state, wanted.state)


def same_state(found: State, wanted: State) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(found.states, wanted.states, strict=True))
    assert np.array_equal(found.pending, wanted.pending)
    assert (found.position, found.tokens_read, found.segments) == (wanted.position, wanted.tokens_read, wanted.segments)
    assert (found.last_logits is None) == (wanted.last_logits is None)
    assert found.last_logits is None or np.array_equal(found.last_logits, wanted.last_logits)
    assert found.loglik_sum == wanted.loglik_sum


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_at_every_token_gives_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    this = made(name)
    tokens = this.document(LENGTH)
    with this.open() as runtime:
        whole = runtime.run(tokens, alignment="left")
        for cut in range(1, LENGTH):
            first = runtime.run(tokens[:cut], alignment="left")
            state = through_a_file(runtime, first.state, tmp_path)
            assert (state.position, state.segments, len(state.pending)) == (cut, cut // S, cut % S)
            second = runtime.run(tokens[cut:], state=state, alignment="left")
            same_answer(second, whole)
            assert second.tokens == LENGTH - cut


@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_many_parts_gives_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    this = made(name)
    tokens = this.document(LENGTH)
    with this.open() as runtime:
        whole = runtime.run(tokens, alignment="left")
        for size in (1, 3, S, S + 1):
            state = None
            for start in range(0, LENGTH, size):
                part = runtime.run(tokens[start : start + size], state=state, alignment="left")
                state = through_a_file(runtime, part.state, tmp_path)
            same_answer(part, whole)


def test_log_likelihoods_across_every_cut_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    this = made("gpt2")
    tokens = this.document(LENGTH)
    with this.open() as runtime:
        whole = runtime.run(tokens, logits="loglik")
        assert np.isnan(whole.loglik[0])
        for cut in range(1, LENGTH):
            first = runtime.run(tokens[:cut], logits="loglik")
            state = through_a_file(runtime, first.state, tmp_path)
            second = runtime.run(tokens[cut:], state=state, logits="loglik")
            assert np.array_equal(second.loglik, whole.loglik[cut:])
            assert second.loglik_sum == whole.loglik_sum
            same_state(second.state, whole.state)
            np.testing.assert_allclose(first.loglik[1:], whole.loglik[1:cut], rtol=1e-3, atol=1e-4)


def test_all_logits_rows_behind_a_cut_are_the_same_bit_for_bit() -> None:
    this = made("gpt2")
    tokens = this.document(LENGTH)
    with this.open() as runtime:
        whole = runtime.run(tokens, logits="all").logits
        for cut in (1, S - 1, S, S + 1, 3 * S + 6):
            first = runtime.run(tokens[:cut], logits="last")
            assert np.array_equal(runtime.run(tokens[cut:], state=first.state, logits="all").logits, whole[cut:])


def test_a_part_that_was_not_scored_makes_the_sum_unknown_and_not_wrong() -> None:
    this = made("gpt2")
    tokens = this.document(LENGTH)
    with this.open() as runtime:
        whole = runtime.run(tokens, logits="loglik")
        first = runtime.run(tokens[: 2 * S + 3])
        second = runtime.run(tokens[2 * S + 3 :], state=first.state, logits="loglik")
        assert second.loglik_sum is None
        assert np.array_equal(second.loglik, whole.loglik[2 * S + 3 :])
        unscored = runtime.run(tokens[: 2 * S + 3], logits="none").state
        with pytest.raises(ContractError, match=r"the state holds no logits row.*logits='loglik' or 'last'"):
            runtime.run(tokens[2 * S + 3 :], state=unscored, logits="loglik")


@pytest.mark.parametrize("name", MODELS)
def test_dropped_ids_around_a_cut_are_read_once(name: str) -> None:
    this = made(name)
    dropped = (*this.spec.dropped_ids, 5)[0]
    tokens = np.insert(this.document(LENGTH), [0, 9, 9, S, 2 * S, LENGTH], dropped)
    with this.open() as runtime:
        whole = runtime.run(tokens, alignment="left")
        for cut in range(2, len(tokens) - 1):
            state = runtime.run(tokens[:cut], alignment="left").state
            assert state.tokens_read <= cut
            same_answer(runtime.run(tokens[state.tokens_read :], state=state, alignment="left"), whole)


@pytest.mark.parametrize("name", MODELS)
def test_documents_of_a_batch_go_on_each_from_its_own_state(name: str) -> None:
    this = made(name)
    documents = [this.document(length, seed=length) for length in (LENGTH, S + 1, 2 * S)]
    cuts = (S + 3, 5, S)
    with this.open() as runtime:
        first = runtime.run([d[:cut] for d, cut in zip(documents, cuts, strict=True)], alignment="left")
        second = runtime.run(
            [d[cut:] for d, cut in zip(documents, cuts, strict=True)], state=first.state, alignment="left"
        )
        for row, document in enumerate(documents):
            whole = runtime.run(document, alignment="left")
            check_parity([(second[row].memory, second[row].logits)], [(whole.memory, whole.logits)], f"row {row}")
            assert second[row].state.position == len(document)
        mixed = runtime.run([documents[0][cuts[0] :], documents[1]], state=[first.state[0], None], alignment="left")
        check_parity([(mixed[0].memory, mixed[0].logits)], [(second[0].memory, second[0].logits)])


CHILD = """
import sys
import numpy as np
from rmt_trt import RMTRuntime
bundle, state, tokens, answer = sys.argv[1:]
with RMTRuntime(bundle, engine="cpu", threads=1) as runtime:
    out = runtime.run(np.load(tokens), state=runtime.load_state(state), alignment="left")
np.savez(answer, memory=out.memory, logits=out.logits)
"""


@pytest.mark.parametrize("name", MODELS)
def test_another_process_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    this = made(name)
    tokens = this.document(LENGTH)
    with this.open() as runtime:
        whole = runtime.run(tokens, alignment="left")
        runtime.run(tokens[: S + 9], alignment="left").state.save(tmp_path / "half.state")
    np.save(tmp_path / "rest.npy", tokens[S + 9 :])
    files = [tmp_path / "half.state", tmp_path / "rest.npy", tmp_path / "answer.npz"]
    subprocess.run([sys.executable, "-c", CHILD, this.bundle, *files], check=True, cwd=tmp_path, timeout=120)
    answer = np.load(files[-1])
    assert np.array_equal(answer["memory"], whole.memory)
    assert np.array_equal(answer["logits"], whole.logits)


def engines_of(this: Made) -> tuple[RMTRuntime, RMTRuntime]:
    return this.open(), RMTRuntime(this.checkpoint, engine="torch", threads=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", [3, S, 2 * S + 1])
def test_another_engine_of_the_same_model_takes_the_state(name: str, cut: int, tmp_path: Path) -> None:
    this = made(name)
    tokens = this.document(LENGTH)
    for first, second in (engines_of(this), engines_of(this)[::-1]):
        with first, second:
            wanted = first.run(tokens, alignment="left")
            state = through_a_file(second, first.run(tokens[:cut], alignment="left").state, tmp_path)
            found = second.run(tokens[cut:], state=state, alignment="left")
            check_parity([(found.memory, found.logits)], [(wanted.memory, wanted.logits)], f"cut at {cut}")
            assert found.state.position == LENGTH


def test_another_model_refuses_the_state(tmp_path: Path) -> None:
    with made("llama").open() as other, made("gpt2").open() as runtime:
        state = runtime.run([1, 2, 3]).state
        state.save(tmp_path / "document.state")
        with pytest.raises(FormatError, match=r"document.state was saved by another model"):
            other.load_state(tmp_path / "document.state")
        with pytest.raises(FormatError, match="the document: the state was saved by another model"):
            other.run([4], state=state)


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_where_a_cut_changes_the_segments_there_is_no_state(alignment: str) -> None:
    this = made("bert")
    with this.open() as runtime:
        out = runtime.run(this.document(LENGTH), alignment=alignment)
        with pytest.raises(ContractError, match=rf"alignment='{alignment}', where a document in two parts"):
            _ = out.state
        stream = runtime.stream(this.document(LENGTH), alignment=alignment)
        with pytest.raises(ContractError, match=rf"alignment='{alignment}'"):
            _ = stream.state
        state = runtime.run(this.document(LENGTH), alignment="left").state
        with pytest.raises(ContractError, match=r"going on from a state needs alignment='left'"):
            runtime.run([5], state=state, alignment=alignment)


class Interrupted(Wrapped):
    """An engine in whose step number `at` something is raised, before or after the step was done."""

    def __init__(self, engine: Engine, at: int, error: BaseException, after: bool) -> None:
        super().__init__(engine)
        self.left, self.error, self.after = at, error, after

    def step(self, states: Any, segment: np.ndarray, head: Head, host: bool = True) -> Any:
        done = self.inner.step(states, segment, head, host) if self.left or self.after else None
        if not self.left:
            raise self.error
        self.left -= 1
        return done


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EngineError("the device is gone")], ids=["ctrl-c", "engine"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_breaks_off_leaves_a_state_to_go_on_from(
    name: str, at: int, after: bool, error: BaseException, tmp_path: Path
) -> None:
    this = made(name)
    tokens = this.document(LENGTH)
    with this.open() as runtime:
        whole = runtime.run(tokens, alignment="left")
        engine = runtime._engine
        runtime._engine = Interrupted(engine, at, error, after)
        stream = runtime.stream(iter(tokens.tolist()), alignment="left")
        with pytest.raises(type(error)):
            list(stream)
        runtime._engine = engine
        state = through_a_file(runtime, stream.state, tmp_path)
        assert (state.position, state.segments, state.tokens_read) == (at * S, at, at * S)
        same_answer(runtime.run(tokens[state.tokens_read :], state=state, alignment="left"), whole)


@pytest.mark.parametrize("name", MODELS)
def test_every_state_on_the_way_of_a_batch_is_one_to_go_on_from(name: str) -> None:
    this = made(name)
    documents = [this.document(length, seed=length) for length in (LENGTH, 5, 2 * S)]
    with this.open() as runtime:
        whole = [runtime.run(document, alignment="left") for document in documents]
        stream = runtime.stream(documents, alignment="left")
        for _ in stream:
            for row, state in enumerate(stream.state):
                rest = documents[row][state.tokens_read :]
                if len(rest):
                    found = runtime.run(rest, state=state, alignment="left")
                    check_parity([(found.memory, found.logits)], [(whole[row].memory, whole[row].logits)], f"row {row}")


@pytest.mark.parametrize("name", MODELS)
def test_a_state_with_pending_tokens_answers_without_more(name: str) -> None:
    this = made(name)
    tokens = this.document(LENGTH)
    with this.open() as runtime:
        whole = runtime.run(tokens, alignment="left")
        again = runtime.run(np.empty(0, np.int64), state=whole.state, alignment="left")
        assert np.array_equal(again.logits, whole.logits)
        assert np.array_equal(again.memory, whole.memory)
        assert (again.tokens, again.segments) == (0, 1)
        same_state(again.state, whole.state)


def test_nothing_pending_and_nothing_new_is_an_empty_document() -> None:
    this = made("gpt2")
    with this.open() as runtime:
        state = runtime.run(this.document(3 * S)).state
        with pytest.raises(TokenError, match="has no token and the state that it goes on from has none pending"):
            runtime.run(np.empty(0, np.int64), state=state)
