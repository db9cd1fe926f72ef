"""What every engine must do, one suite for all of them: a new engine is one more line in ENGINES.

Outputs and state after 1, 2 and 20 segments, every source of tokens, batches, streams, log-likelihoods, threads.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu import cuda_bundle, open_cuda, require_gpu
from models import CLASSES, TOLERANCE, VOCAB, M, Made, S, check_parity, made, reference, scratch, steps_of
from stand_in import host_gpu
from tensorrt_machine import fake_bundle, real_bundle, require_tensorrt
from tensorrt_stand_in import tensorrt_host
from wrapped import Wrapped

from rmt_trt import EngineError, RMTRuntime
from rmt_trt.contract import Head
from rmt_trt.errors import ContractError
from rmt_trt.export.verify import relative_error
from rmt_trt.runtime import Piece

# How each engine is opened on a model of the catalogue.
ENGINES: dict[str, Callable[..., RMTRuntime]] = {
    "cpu": lambda this, **more: RMTRuntime(this.bundle, engine="cpu", threads=1, **more),
    "cpu-graph-alone": lambda this, **more: RMTRuntime(this.bundle / "step.onnx", engine="cpu", threads=1, **more),
    "torch": lambda this, **more: RMTRuntime(this.checkpoint, engine="torch", threads=1, **more),
    "cuda-on-host-memory": lambda this, **more: open_cuda(cuda_bundle(this.name), "fp32", **more),
    "cuda": lambda this, **more: open_cuda(cuda_bundle(this.name), "fp32", **more),
    # TensorRT's own code is the same, but for what only TensorRT-RTX has.
    "tensorrt-rtx-on-host-memory": lambda this, **more: open_tensorrt(fake_bundle(this.name), "tensorrt-rtx", **more),
    "tensorrt": lambda this, **more: open_tensorrt(real_bundle(this.name, "tensorrt"), "tensorrt", **more),
    "tensorrt-rtx": lambda this, **more: open_tensorrt(real_bundle(this.name, "tensorrt-rtx"), "tensorrt-rtx", **more),
}
REAL_TENSORRT = ("tensorrt", "tensorrt-rtx")
MODELS = ("bert", "gpt2")


def open_tensorrt(bundle: Path, engine: str, **more: Any) -> RMTRuntime:
    return RMTRuntime(bundle, engine=engine, dtype="fp32", **more)


def subjects(*models: str) -> list[Any]:
    """MODEL-ENGINE for every engine; those that need a GPU are marked."""
    marks = {"cuda": [pytest.mark.gpu], **{name: [pytest.mark.tensorrt] for name in REAL_TENSORRT}}
    return [pytest.param(f"{model}-{name}", marks=marks.get(name, [])) for model in models for name in ENGINES]


EVERY = subjects(*MODELS)
DECODERS = subjects("gpt2")
LENGTHS = (3 * S + 7, 1, S, S + 1, 2 * S)


class Subject:
    """A model and a runtime on it by one engine."""

    def __init__(self, name: str, **more: Any) -> None:
        model, engine = name.split("-", 1)
        if engine == "cuda":
            require_gpu()
        if engine in REAL_TENSORRT:
            require_tensorrt(engine)
        self.made: Made = made(model)
        self.model = model
        self.engine = engine
        self.runtime = ENGINES[engine](self.made, **more)

    def batch(self) -> list[np.ndarray]:
        """Documents of unequal lengths, each of other tokens."""
        return [self.made.document(length, seed=row) for row, length in enumerate(LENGTHS)]


def machine(name: str) -> AbstractContextManager[None]:
    """What a subject runs on: the machine as it is, or a GPU made of host memory."""
    if not name.endswith("on-host-memory"):
        return nullcontext()
    return tensorrt_host(scratch() / "cache") if "tensorrt" in name else host_gpu()


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    with machine(request.param):
        opened = Subject(request.param)
        with opened.runtime:
            yield opened


every_engine = pytest.mark.parametrize("subject", EVERY, indirect=True)
language_models = pytest.mark.parametrize("subject", DECODERS, indirect=True)


def same(found: Any, wanted: Any) -> None:
    """Asserts that two results are the same, bit for bit."""
    assert np.array_equal(found.memory, wanted.memory)
    assert np.array_equal(found.logits, wanted.logits)
    assert (found.segments, found.tokens) == (wanted.segments, wanted.tokens)


def same_state(found: Any, wanted: Any) -> None:
    """Asserts that two states to go on from are the same, bit for bit."""
    assert all(np.array_equal(a, b) for a, b in zip(found.states, wanted.states, strict=True))
    assert np.array_equal(found.pending, wanted.pending)
    assert (found.position, found.tokens_read, found.segments) == (wanted.position, wanted.tokens_read, wanted.segments)
    assert (found.last_logits is None) == (wanted.last_logits is None)
    assert found.last_logits is None or np.array_equal(found.last_logits, wanted.last_logits)
    assert found.loglik_sum == wanted.loglik_sum


@every_engine
def test_the_engine_that_was_asked_for_runs(subject: Subject) -> None:
    assert subject.runtime.engine == subject.engine.removesuffix("-graph-alone").removesuffix("-on-host-memory")
    assert subject.runtime.dtype == "fp32"
    assert subject.runtime.spec == subject.made.spec


@every_engine
@pytest.mark.parametrize("segments", [1, 2, 20])
def test_outputs_and_state_are_those_of_the_recurrence(subject: Subject, segments: int) -> None:
    length = (segments - 1) * S + 3
    for alignment in ("left", "right", "center"):
        wanted = reference(subject.model, length, alignment)
        found = steps_of(subject.runtime, subject.made.document(length), alignment=alignment)
        check_parity(found, wanted, f"{subject.engine}, {alignment}")
        out = subject.runtime.run(subject.made.document(length), alignment=alignment)
        last = wanted[-1][1] if subject.model == "bert" else wanted[-1][1][-1]
        check_parity([(out.memory, out.logits)], [(wanted[-1][0], last)], f"{subject.engine}, {alignment}, run")
        assert len(wanted) == out.segments == segments


def sources(tokens: np.ndarray, folder: Path) -> dict[str, Any]:
    """The same document in every form that a caller may have it in."""
    ints = tokens.tolist()
    strided = np.zeros(2 * len(tokens), np.int64)
    strided[::2] = tokens
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    (folder / "tokens.bin").write_bytes(tokens.astype(np.int32).tobytes())
    return {
        "list": ints,
        "tuple": tuple(ints),
        "int32 array": tokens.astype(np.int32),
        "uint16 array": tokens.astype(np.uint16),
        "uint64 array": tokens.astype(np.uint64),
        "big-endian array": tokens.astype(">i4"),
        "strided view": strided[::2],
        "whole floats": tokens.astype(np.float32),
        "list of whole floats": [float(token) for token in ints],
        "memmap": np.memmap(folder / "tokens.bin", np.int32, "r"),
        "memory-mapped .npy": np.load(folder / "tokens.npy", mmap_mode="r"),
        "torch tensor": torch.from_numpy(tokens.copy()),
        "torch int32 tensor": torch.from_numpy(tokens.astype(np.int32)),
        "padded with -1": np.concatenate([tokens, np.full(S + 3, -1)]),
        "list of numpy ints": list(tokens),
        "iterator of ints": iter(ints),
        "generator of numpy ints": (token for token in tokens),
        "generator of pieces": (tokens[a:b] for a, b in _odd_cuts(len(tokens))),
        "generator of lists": (ints[a:b] for a, b in _odd_cuts(len(tokens))),
        "generator of tensors": (torch.tensor(ints[a:b], dtype=torch.int64) for a, b in _odd_cuts(len(tokens))),
        "ints, then pieces, then ints": iter([*ints[:5], tokens[5:31], *ints[31:]]),
    }


def _odd_cuts(length: int) -> list[tuple[int, int]]:
    """Pieces of 1, 0, 19, 20, 21, 3, ... tokens, in turn."""
    sizes, places = (1, 0, S - 1, S, S + 1, 3), [0]
    while places[-1] < length:
        places.append(min(length, places[-1] + sizes[(len(places) - 1) % len(sizes)]))
    return list(itertools.pairwise(places))


@every_engine
def test_every_source_of_tokens_gives_the_same(subject: Subject, tmp_path: Path) -> None:
    tokens = subject.made.document(3 * S + 7)
    wanted = subject.runtime.run(tokens, alignment="left")
    for name, source in sources(tokens, tmp_path).items():
        found = subject.runtime.run(source, alignment="left")
        assert np.array_equal(found.logits, wanted.logits), name
        same(found, wanted)


@every_engine
@pytest.mark.parametrize("alignment", ["right", "center"])
def test_an_iterator_gives_the_same_with_its_length_stated(subject: Subject, alignment: str) -> None:
    tokens = subject.made.document(3 * S + 7)
    found = subject.runtime.run(iter(tokens.tolist()), alignment=alignment, length=len(tokens))
    same(found, subject.runtime.run(tokens, alignment=alignment))


@every_engine
def test_a_range_is_a_document(subject: Subject) -> None:
    same(subject.runtime.run(range(10, 73)), subject.runtime.run(np.arange(10, 73)))


@every_engine
def test_a_list_of_arrays_a_padded_matrix_and_a_list_of_iterators_are_the_same_batch(subject: Subject) -> None:
    documents = subject.batch()
    matrix = np.full((len(documents), max(LENGTHS)), -1, np.int32)
    for row, document in zip(matrix, documents, strict=True):
        row[: len(document)] = document
    wanted = subject.runtime.run(documents, alignment="left")
    lists = [document.tolist() for document in documents]
    for batch in (tuple(documents), matrix, torch.from_numpy(matrix), lists, [iter(ids) for ids in lists]):
        found = subject.runtime.run(batch, alignment="left")
        assert len(found) == len(documents)
        for row in range(len(documents)):
            same(found[row], wanted[row])


@every_engine
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
def test_each_document_of_a_batch_is_as_if_alone(subject: Subject, alignment: str) -> None:
    documents = subject.batch()
    together = subject.runtime.run(documents, alignment=alignment)
    assert together.logits.shape == (len(documents), subject.made.spec.num_logits)
    assert together.memory.shape == (len(documents), M, 32)
    for row, document in enumerate(documents):
        alone = subject.runtime.run(document, alignment=alignment)
        check_parity([(together[row].memory, together[row].logits)], [(alone.memory, alone.logits)], f"row {row}")
        assert (together[row].segments, together[row].tokens) == (alone.segments, len(document))


@pytest.mark.parametrize("max_batch", [1, 2, 4])
@pytest.mark.parametrize("name", EVERY)
def test_a_batch_above_max_batch_runs_in_groups(name: str, max_batch: int) -> None:
    with machine(name):
        narrow, wide = Subject(name, max_batch=max_batch), Subject(name)
        with narrow.runtime, wide.runtime:
            found, wanted = narrow.runtime.run(narrow.batch()), wide.runtime.run(wide.batch())
            check_parity([(found.memory, found.logits)], [(wanted.memory, wanted.logits)])
            assert found.segments == wanted.segments
            with pytest.raises(ContractError, match=rf"stream got 5 documents; .* max_batch={max_batch}"):
                narrow.runtime.stream(narrow.batch())


@every_engine
def test_a_stream_gives_what_a_run_gives(subject: Subject) -> None:
    tokens = subject.made.document(3 * S + 7)
    for alignment in ("left", "right", "center"):
        stream = subject.runtime.stream(tokens, alignment=alignment, memory=True)
        with pytest.raises(ContractError, match="has not ended"):
            _ = stream.result
        pieces = list(stream)
        out = subject.runtime.run(tokens, alignment=alignment, logits="all")
        rows = [piece.logits for piece in pieces]
        logits = np.stack(rows) if subject.model == "bert" else np.concatenate(rows)
        assert np.array_equal(logits, out.logits)
        assert np.array_equal(pieces[-1].memory, out.memory)
        assert np.array_equal(stream.result.memory, out.memory)
        assert [piece.index for piece in pieces] == list(range(out.segments))
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == len(tokens) == stream.result.tokens


@every_engine
def test_a_stream_of_a_batch_gives_each_row_its_own_pieces(subject: Subject) -> None:
    documents = subject.batch()
    stream = subject.runtime.stream(documents, memory=True, alignment="right")
    pieces = list(stream)
    for row, document in enumerate(documents):
        found = [(piece.memory, piece.logits) for piece in pieces if piece.row == row]
        check_parity(found, steps_of(subject.runtime, document, alignment="right"), f"row {row}")
    assert stream.result.tokens == list(LENGTHS)


@every_engine
def test_logits_modes_are_parts_of_all(subject: Subject) -> None:
    tokens = subject.made.document(3 * S + 7)
    every = subject.runtime.run(tokens, logits="all")
    last = subject.runtime.run(tokens)
    none = subject.runtime.run(tokens, logits="none")
    assert every.logits.shape == ((4, CLASSES) if subject.model == "bert" else (len(tokens), VOCAB))
    assert every.logits.dtype == np.float32
    np.testing.assert_allclose(last.logits, every.logits[-1], rtol=1e-5, atol=1e-5)
    assert none.logits is None
    assert none.label is None
    for out in (last, none):
        np.testing.assert_allclose(out.memory, every.memory, rtol=1e-5, atol=1e-5)
    with pytest.raises(ContractError, match=r"logits is 'some'; expected one of last, all, loglik, none"):
        subject.runtime.run(tokens, logits="some")


@pytest.mark.parametrize("subject", subjects("bert"), indirect=True)
def test_a_classifier_has_no_log_likelihood(subject: Subject) -> None:
    with pytest.raises(ContractError, match="logits='loglik' is for language models"):
        subject.runtime.run([1, 4, 5], logits="loglik")


@language_models
def test_logits_of_a_language_model_are_those_of_the_recurrence_token_by_token(subject: Subject) -> None:
    for alignment in ("left", "right", "center"):
        wanted = np.concatenate([logits for _, logits in reference("gpt2", 3 * S + 7, alignment)])
        found = subject.runtime.run(subject.made.document(3 * S + 7), logits="all", alignment=alignment).logits
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@language_models
def test_log_likelihoods_are_those_of_torch(subject: Subject) -> None:
    for alignment in ("left", "right", "center"):
        tokens = subject.made.document(3 * S + 7)
        rows = torch.from_numpy(np.concatenate([logits for _, logits in reference("gpt2", len(tokens), alignment)]))
        scores = torch.log_softmax(rows.double(), dim=1)[:-1]
        wanted = scores.gather(1, torch.from_numpy(tokens)[1:, None])[:, 0].numpy()
        out = subject.runtime.run(tokens, logits="loglik", alignment=alignment)
        assert out.loglik.dtype == np.float64
        assert out.logits is None
        assert np.isnan(out.loglik[0])  # nothing stands in front of the first token
        np.testing.assert_allclose(out.loglik[1:], wanted, rtol=1e-4, atol=1e-4)
        assert out.loglik_sum == pytest.approx(wanted.sum(), rel=1e-5)


@language_models
def test_log_likelihoods_of_a_batch_are_those_of_each_document(subject: Subject) -> None:
    documents = subject.batch()
    out = subject.runtime.run(documents, logits="loglik")
    for row, document in enumerate(documents):
        alone = subject.runtime.run(document, logits="loglik")
        np.testing.assert_allclose(out[row].loglik, alone.loglik, rtol=1e-4, atol=1e-5)
        assert out[row].loglik_sum == pytest.approx(alone.loglik_sum, rel=1e-5, abs=1e-9)


@every_engine
@pytest.mark.parametrize("logits", ["last", "all", "none"])
def test_on_piece_hands_rows_over_and_keeps_none(subject: Subject, logits: str) -> None:
    documents = subject.batch()
    pieces: list[Piece] = []
    out = subject.runtime.run(documents, logits=logits, on_piece=pieces.append)
    plain = subject.runtime.run(documents, logits=logits)
    for row in range(len(documents)):
        mine = [piece for piece in pieces if piece.row == row]
        assert len(mine) == plain[row].segments
        assert relative_error(out[row].memory, plain[row].memory) <= TOLERANCE
        if logits == "all":
            rows = [piece.logits for piece in mine]
            assert np.array_equal(
                np.stack(rows) if subject.model == "bert" else np.concatenate(rows), plain[row].logits
            )
            assert out[row].logits is None
        elif logits == "last":
            assert np.array_equal(mine[-1].logits, out[row].logits)
            assert relative_error(out[row].logits, plain[row].logits) <= TOLERANCE


@every_engine
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("length", [1, S - 1, S, S + 1, 3 * S, 3 * S + 7])
def test_one_document_gives_the_same_in_blocks_and_by_segment_bit_for_bit(
    subject: Subject, length: int, alignment: str
) -> None:
    tokens = subject.made.document(length)
    for logits in ("last", "none"):
        blocks = subject.runtime.run(tokens, alignment=alignment, logits=logits)
        stream = subject.runtime.stream(tokens, alignment=alignment, logits=logits)
        pieces = list(stream)
        assert np.array_equal(blocks.memory, stream.result.memory)
        assert (blocks.segments, blocks.tokens) == (len(pieces), length)
        assert (blocks.logits is None) == (logits == "none")
        if logits == "last":
            same(blocks, stream.result)
            assert blocks.label == stream.result.label
        if alignment == "left":
            same_state(blocks.state, stream.state)


@every_engine
def test_logits_last_are_computed_at_the_end_only(subject: Subject) -> None:
    heads: list[str] = []

    class Watched(Wrapped):
        def step(self, states: Any, segment: np.ndarray, head: Head, host: bool = True) -> Any:
            heads.append(head)
            return self.inner.step(states, segment, head, host)

    subject.runtime._engine = Watched(subject.runtime._engine)
    tokens = subject.made.document(4 * S + 7)
    # A language model's row in front of the short segment is kept in the state: it scores the next token.
    wanted = [*["none"] * 3, "none" if subject.model == "bert" else "last", "last"]
    assert len(list(subject.runtime.stream(tokens, alignment="left", logits="last"))) == len(wanted) == len(heads)
    assert heads == wanted
    heads.clear()
    subject.runtime.run(tokens, alignment="left")
    assert heads == wanted[3 if subject.model == "gpt2" else 4 :]  # the others went in one block
    for logits, expected in (("none", "none"), ("all", "all")):
        heads.clear()
        list(subject.runtime.stream(tokens, alignment="left", logits=logits))
        assert heads == [expected] * 5


@every_engine
def test_results_left_on_the_device_are_those_that_are_fetched(subject: Subject) -> None:
    documents = subject.batch()
    for alignment in ("left", "right", "center"):
        wanted = subject.runtime.run(documents, alignment=alignment)
        found = subject.runtime.run(documents, alignment=alignment, on_device=True)
        for row in range(len(documents)):
            memory, logits = (
                torch.from_dlpack(array).cpu().numpy() for array in (found[row].memory, found[row].logits)
            )
            check_parity([(memory[0], logits[0])], [(wanted[row].memory, wanted[row].logits)], f"row {row}")
            assert (found[row].segments, found[row].tokens) == (wanted[row].segments, wanted[row].tokens)
            assert found[row].label is None
            with pytest.raises(ContractError, match=r"left its answer on the device .* and kept no state"):
                _ = found[row].state
        with pytest.raises(ContractError, match=r"read them as out\[i\]\.logits"):
            _ = found.memory


@every_engine
def test_states_are_values_and_rows_are_taken_in_the_order_asked_for(subject: Subject) -> None:
    engine = subject.runtime._engine
    assert engine is not None
    initial = tuple(value[None] for value in subject.runtime.initial)
    segment = subject.made.document(3 * S).reshape(3, S)
    first = engine.load(initial)
    kept = [engine.fetch(first)[0]]
    second, nothing = engine.step(engine.take([first], np.zeros(3, np.int64)), segment, "none")
    kept.append(engine.fetch(second)[0])
    third = engine.steps(second, np.stack([segment, segment[::-1]]))
    kept.append(engine.fetch(third)[0])
    fourth, answer = engine.step(third, segment, "last")
    assert nothing is None
    assert answer is not None
    assert answer.rows.shape == (3, subject.made.spec.num_logits)
    for _ in range(2):  # nothing that came later changed them, and what is fetched is the caller's own
        for states, wanted in zip((first, second, third), kept, strict=True):
            again = engine.fetch(states)[0]
            assert np.array_equal(again, wanted)
            again[:] = np.nan
    mixed = engine.take(
        [first, second, fourth], np.array([6, 0, 3, 3, 1])
    )  # rows: 1 of first, 3 of second, 3 of fourth
    wanted = np.concatenate([engine.fetch(states)[0] for states in (first, second, fourth)])[[6, 0, 3, 3, 1]]
    assert np.array_equal(engine.fetch(mixed)[0], wanted)
    stepwise = second
    for part in (segment, segment[::-1]):
        stepwise, _ = engine.step(stepwise, np.ascontiguousarray(part), "none")
    assert np.array_equal(engine.fetch(stepwise)[0], engine.fetch(third)[0])


@every_engine
def test_heads_are_parts_of_all_rows(subject: Subject) -> None:
    engine = subject.runtime._engine
    assert engine is not None
    states = engine.load(tuple(np.stack([value] * 3) for value in subject.runtime.initial))
    segment = subject.made.document(3 * S, seed=5).reshape(3, S)
    segment[1, 1:] = segment[2, 9:] = -1
    counts = [S, 1, 9]
    new, every = engine.step(states, segment, "all")
    for head in ("last", "loglik") if subject.model == "gpt2" else ("last",):
        found, answer = engine.step(states, segment, head)
        assert relative_error(engine.fetch(found)[0], engine.fetch(new)[0]) <= TOLERANCE
        rows = every.rows if subject.model == "bert" else every.rows[np.arange(3), np.array(counts) - 1]
        assert relative_error(answer.rows, rows) <= TOLERANCE
        assert (answer.scores is None) == (head == "last")
        if answer.scores is not None:
            scores = torch.log_softmax(torch.from_numpy(every.rows[:, :-1]).double(), dim=2).numpy()
            for row, count in enumerate(counts):
                wanted = scores[row, np.arange(count - 1), segment[row, 1:count]]
                np.testing.assert_allclose(answer.scores[row, 1:count], wanted, rtol=1e-4, atol=1e-4)
                assert np.isnan(answer.scores[row, 0])
                assert np.isnan(answer.scores[row, count:]).all()


@every_engine
def test_results_belong_to_the_caller(subject: Subject) -> None:
    tokens = subject.made.document(2 * S)
    before = tokens.copy()
    wanted = subject.runtime.run(tokens, alignment="left")
    spoiled = subject.runtime.run(tokens, alignment="left")
    every = subject.runtime.run(tokens, alignment="left", logits="all")  # an engine of its own may compute these
    stream = subject.runtime.stream(tokens, alignment="left", memory=True)
    for piece in stream:
        piece.logits[:] = np.nan
        piece.memory[:] = np.nan
    assert np.array_equal(stream.result.memory, every.memory)
    spoiled.memory[:] = np.nan
    spoiled.logits[:] = np.nan
    assert np.isfinite(spoiled.state.memory).all()
    same(subject.runtime.run(tokens, alignment="left"), wanted)
    assert np.array_equal(tokens, before)


@every_engine
def test_results_pieces_and_states_are_told_apart_by_identity(subject: Subject) -> None:
    first, second = (subject.runtime.run([5, 6], alignment="left") for _ in range(2))
    assert first != second
    assert first.state != second.state
    assert second in [first, second]
    assert len({first, second, *subject.runtime.stream([5] * 2 * S)}) == 4


@every_engine
def test_four_threads_on_one_runtime_get_what_each_gets_alone(subject: Subject) -> None:
    documents = [subject.made.document(5 * S + row, seed=row) for row in range(4)]
    alone = [subject.runtime.run(document) for document in documents]
    start = threading.Barrier(4)

    def work(document: np.ndarray) -> Any:
        start.wait()
        return [subject.runtime.run(document) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for row, results in enumerate(pool.map(work, documents)):
            for result in results:
                same(result, alone[row])


@every_engine
def test_closing_during_a_stream_ends_it_in_an_error(subject: Subject) -> None:
    stream = subject.runtime.stream(subject.made.document(5 * S))
    next(stream)
    subject.runtime.close()
    with pytest.raises(EngineError, match=r"is closed; open a new RMTRuntime"):
        next(stream)
    assert next(stream, None) is None
    with pytest.raises(ContractError, match="has not ended"):
        _ = stream.result
    with pytest.raises(EngineError, match="is closed"):
        subject.runtime.run([5])
    with pytest.raises(EngineError, match="is closed"):
        subject.runtime.stream([5])
    subject.runtime.close()  # a second time is nothing


@every_engine
def test_closing_in_another_thread_ends_a_run_in_blocks_at_its_next_one(subject: Subject) -> None:
    def source() -> Iterator[int]:
        for count in itertools.count():
            yield 5
            if count == 200 * S:
                thread = threading.Thread(target=subject.runtime.close)
                thread.start()
                thread.join()

    with pytest.raises(EngineError, match="is closed"):
        subject.runtime.run(source(), alignment="left")


@every_engine
def test_closing_in_another_thread_ends_a_run_at_its_next_step(subject: Subject) -> None:
    def close_after_the_first(piece: Piece) -> None:
        if piece.index == 0:
            thread = threading.Thread(target=subject.runtime.close)
            thread.start()
            thread.join()

    with pytest.raises(EngineError, match="is closed"):
        subject.runtime.run(subject.made.document(5 * S), on_piece=close_after_the_first)


@pytest.mark.parametrize("name", EVERY)
def test_a_runtime_is_a_context_manager_that_closes(name: str) -> None:
    with machine(name):
        opened = Subject(name).runtime
        with opened as inside:
            assert inside is opened
            inside.run([5, 6])
        with pytest.raises(EngineError, match="is closed"):
            opened.run([5, 6])


class Overflowing(Wrapped):
    """An engine whose states overflow, as those of a half-precision engine may."""

    def fetch(self, states: Any) -> Any:
        return tuple(value * np.float32("inf") for value in self.inner.fetch(states))


@every_engine
def test_a_state_that_is_not_finite_is_an_error_and_never_an_answer(subject: Subject) -> None:
    subject.runtime._engine = Overflowing(subject.runtime._engine)
    for run in (subject.runtime.run, lambda tokens: list(subject.runtime.stream(tokens, memory=True))):
        with pytest.raises(EngineError, match=r"gave a state 'memory' that is not finite.*use fp32 or bf16"):
            run([5, 6])
