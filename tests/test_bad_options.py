"""Options that say nothing sensible, engines that cannot run here, and runtimes that are closed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import models
import numpy as np
import pytest
from wrapped import Wrapped

from rmt_trt import ContractError, EngineError, FormatError, RMTRuntime, StateSpec, StepSpec, TokenError
from rmt_trt.bundle import Bundle
from rmt_trt.export import ExportOptions, verify
from rmt_trt.export.verify import model_reference
from rmt_trt.runtime.engines import MODULES

DOCUMENT = np.arange(50) % 90 + 5


@pytest.fixture(scope="module")
def classifier() -> Iterator[RMTRuntime]:
    with models.made("bert").open(max_batch=2) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def language() -> Iterator[RMTRuntime]:
    with models.made("gpt2").open() as runtime:
        yield runtime


OPENING: dict[str, tuple[dict[str, Any], str]] = {
    "engine": (
        {"engine": "gpu"},
        "engine is 'gpu'; expected 'auto' or one of cpu, cuda, tensorrt, tensorrt-rtx, torch",
    ),
    "engine None": ({"engine": None}, "engine is None; expected 'auto' or one of"),
    "dtype": ({"dtype": "float32"}, "dtype is 'float32'; expected one of fp32, fp16, bf16, int8, fp8"),
    "dtype of numpy": ({"dtype": np.float32}, "dtype is <class 'numpy.float32'>; expected one of fp32"),
    "threads 0": ({"threads": 0}, "threads is 0; expected a whole number from 1 to"),
    "threads below": ({"threads": -1}, "threads is -1; expected a whole number from 1 to"),
    "threads absurd": ({"threads": 10**9}, "threads is 1000000000; expected a whole number from 1 to"),
    "threads text": ({"threads": "2"}, "threads is '2'; expected a whole number from 1 to"),
    "threads fraction": ({"threads": 1.5}, "threads is 1.5; expected a whole number from 1 to"),
    "max_batch 0": ({"max_batch": 0}, "max_batch is 0; expected a whole number from 1 to"),
    "max_batch bool": ({"max_batch": True}, "max_batch is True; expected a whole number from 1 to"),
    "max_batch None": ({"max_batch": None}, "max_batch is None; expected a whole number from 1 to"),
    "device": ({"device": -1}, "device is -1; expected a whole number from 0 to"),
    "device text": ({"device": "cuda:0"}, "device is 'cuda:0'; expected a whole number from 0 to"),
}


@pytest.mark.parametrize("kind", ["bundle", "graph", "checkpoint"])
@pytest.mark.parametrize("name", OPENING)
def test_refused_when_a_runtime_is_opened(name: str, kind: str) -> None:
    options, message = OPENING[name]
    made = models.made("bert")
    path = {"bundle": made.bundle, "graph": made.bundle / "step.onnx", "checkpoint": made.checkpoint}[kind]
    with pytest.raises(ContractError, match=re.escape(message)):
        RMTRuntime(path, **options)


RUNNING: dict[str, tuple[dict[str, Any], str]] = {
    "alignment": ({"alignment": "top"}, "alignment is 'top'; expected one of left, right, center"),
    "alignment empty": ({"alignment": ""}, "alignment is ''; expected one of left, right, center"),
    "logits": ({"logits": "first"}, "logits is 'first'; expected one of last, all, loglik, none"),
    "logits None": ({"logits": None}, "logits is None; expected one of last"),
    "loglik of a classifier": (
        {"logits": "loglik"},
        "logits='loglik' is for language models; this model is a classifier",
    ),
    "overflow alone": (
        {"overflow": "head"},
        "overflow='head' without max_segments says nothing; pass max_segments too",
    ),
    "overflow": ({"max_segments": 1, "overflow": "middle"}, "overflow is 'middle'; expected 'error', 'head' or 'tail'"),
    "max_segments 0": ({"max_segments": 0}, "max_segments is 0; expected a whole number of at least 1"),
    "max_segments below": ({"max_segments": -1}, "max_segments is -1; expected a whole number of at least 1"),
    "max_segments text": ({"max_segments": "2"}, "max_segments is '2'; expected a whole number of at least 1"),
    "max_segments bool": ({"max_segments": True}, "max_segments is True; expected a whole number of at least 1"),
    "state of another type": ({"state": "a.state", "alignment": "left"}, "state is str; expected out.state or rt.load"),
    "states as a list": ({"state": [None], "alignment": "left"}, "the document: state is list; expected out.state"),
}


@pytest.mark.parametrize("how", ["run", "stream"])
@pytest.mark.parametrize("name", RUNNING)
def test_refused_by_run_and_stream(classifier: RMTRuntime, name: str, how: str) -> None:
    options, message = RUNNING[name]
    with pytest.raises(ContractError, match=re.escape(message)):
        getattr(classifier, how)(DOCUMENT, **options)


def test_a_callback_that_cannot_be_called_is_refused(classifier: RMTRuntime) -> None:
    with pytest.raises(ContractError, match="on_piece is int; expected a function that takes a Piece"):
        classifier.run(DOCUMENT, on_piece=3)  # type: ignore[call-overload]
    with pytest.raises(ContractError, match="on_progress is str; expected a function that takes a number of tokens"):
        classifier.run(DOCUMENT, on_progress="bar")  # type: ignore[call-overload]


def test_an_error_of_the_callers_callback_comes_out_as_it_is(classifier: RMTRuntime) -> None:
    def callback(piece: Any) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        classifier.run(DOCUMENT, on_piece=callback)
    with pytest.raises(LookupError, match="mine"):
        classifier.run(DOCUMENT, on_progress=callback)
    with pytest.raises(LookupError, match="mine"):
        list(classifier.run_many([DOCUMENT], on_progress=callback))


@pytest.mark.parametrize("options", [{"logits": "all"}, {"on_piece": print}])
def test_what_is_handed_over_by_segment_does_not_stay_on_the_device(
    classifier: RMTRuntime, options: dict[str, Any]
) -> None:
    with pytest.raises(ContractError, match="on_device=True goes with logits='last' or 'none' and without on_piece"):
        classifier.run(DOCUMENT, on_device=True, **options)


MANY: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "slots 0": ([DOCUMENT], {"slots": 0}, ContractError, "slots is 0; expected a whole number from 1 to 2"),
    "slots above": ([DOCUMENT], {"slots": 3}, ContractError, "slots is 3; expected a whole number from 1 to 2"),
    "slots text": ([DOCUMENT], {"slots": "2"}, ContractError, "slots is '2'; expected a whole number from 1 to 2"),
    "logits all": ([DOCUMENT], {"logits": "all"}, ContractError, "run_many gives logits 'last' or 'none', not 'all'"),
    "logits": ([DOCUMENT], {"logits": "first"}, ContractError, "logits is 'first'; expected one of last, all, loglik"),
    "alignment": ([DOCUMENT], {"alignment": "top"}, ContractError, "alignment is 'top'; expected one of left, right"),
    "overflow": ([DOCUMENT], {"overflow": "head"}, ContractError, "overflow='head' without max_segments says nothing"),
    "callback": ([DOCUMENT], {"on_progress": 3}, ContractError, "on_progress is int; expected a function that takes"),
    "lengths": ([DOCUMENT], {"length": [50, 50]}, ContractError, "length of a batch of 1 documents is 2; expected a list"),
    "length of an iterator": (iter([DOCUMENT]), {"length": 50}, ContractError, "length is int; of an iterator of documents"),
    "one document": (DOCUMENT, {}, TokenError, "run_many takes many documents and got an array of shape (50,)"),
    "text": ("a text", {}, TokenError, "run_many takes many documents and got str; pass a list or an iterator"),
    "number": (7, {}, TokenError, "run_many takes many documents and got int; pass a list or an iterator"),
    "rank 3": (np.zeros((1, 2, 3), int), {}, TokenError, "run_many takes many documents and got an array of shape (1, 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANY)
def test_refused_by_run_many_before_anything_runs(classifier: RMTRuntime, name: str) -> None:
    documents, options, kind, message = MANY[name]
    with pytest.raises(kind, match=re.escape(message)):
        classifier.run_many(documents, **options)


def test_an_iterator_that_stands_for_two_of_many_documents_is_refused(classifier: RMTRuntime) -> None:
    source = iter(DOCUMENT.tolist())
    with pytest.raises(TokenError, match="documents 0 and 1 of the batch are one and the same iterator"):
        classifier.run_many([source, source], alignment="left")


@pytest.mark.parametrize("state", [lambda s: [s], lambda s: [s] * 3, lambda s: s, lambda s: "xy"])
def test_states_of_a_batch_are_one_per_document(language: RMTRuntime, state: Any) -> None:
    one = language.run(DOCUMENT).state
    with pytest.raises(
        ContractError, match=r"state of a batch of 2 documents is .*; expected a list of 2, None where unset"
    ):
        language.run([DOCUMENT, DOCUMENT], state=state(one))


@pytest.mark.parametrize("length", [50, [50], [50] * 3])
def test_lengths_of_a_batch_are_one_per_document(language: RMTRuntime, length: Any) -> None:
    with pytest.raises(ContractError, match=r"length of a batch of 2 documents is .*; expected a list of 2"):
        language.run([iter(DOCUMENT), iter(DOCUMENT)], length=length)


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_a_state_goes_on_with_alignment_left_only(language: RMTRuntime, alignment: Any) -> None:
    state = language.run(DOCUMENT).state
    with pytest.raises(ContractError, match=rf"going on from a state needs alignment='left'; with '{alignment}'"):
        language.run(DOCUMENT, state=state, alignment=alignment)


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_no_state_after_another_alignment_than_left(language: RMTRuntime, alignment: Any) -> None:
    for result in (language.run(DOCUMENT, alignment=alignment), language.run([DOCUMENT], alignment=alignment)):
        with pytest.raises(ContractError, match=rf"cut the document with alignment='{alignment}'.*To stop and go on"):
            _ = result.state
    with pytest.raises(ContractError, match=rf"this stream cuts documents with alignment='{alignment}'"):
        _ = language.stream(DOCUMENT, alignment=alignment).state


def test_a_state_without_a_logits_row_cannot_be_scored_on(language: RMTRuntime) -> None:
    state = language.run(DOCUMENT, logits="none").state
    with pytest.raises(ContractError, match="the state holds no logits row, so the next token cannot be scored"):
        language.run(DOCUMENT, state=state, logits="loglik")


def test_a_document_beyond_the_callers_limit_is_an_error(language: RMTRuntime) -> None:
    message = r"50 tokens make 3 segments of 20; max_segments=2 allows 40 tokens\. Raise it, or pass overflow='head'"
    with pytest.raises(TokenError, match=message):
        language.run(DOCUMENT, max_segments=2)
    with pytest.raises(TokenError, match=rf"{5 * 10**998} segments of 20; max_segments=2 allows 40"):
        language.run(iter(DOCUMENT), max_segments=2, length=10**1000)


@pytest.mark.parametrize("overflow", ["error", "tail"])
def test_a_limit_over_an_iterator_needs_its_length(language: RMTRuntime, overflow: str) -> None:
    with pytest.raises(
        TokenError, match=f"max_segments with overflow='{overflow}' needs the number of tokens beforehand"
    ):
        language.run(iter(DOCUMENT), max_segments=2, overflow=overflow)


def test_a_stream_takes_no_more_documents_than_are_stepped_together(classifier: RMTRuntime) -> None:
    with pytest.raises(ContractError, match=r"stream got 3 documents; this runtime steps at most max_batch=2 together"):
        classifier.stream([DOCUMENT] * 3)


def test_a_result_is_asked_for_at_the_end_of_a_stream(classifier: RMTRuntime) -> None:
    with pytest.raises(ContractError, match="the stream has not ended; take every piece before asking for its result"):
        _ = classifier.stream(DOCUMENT).result


@pytest.mark.parametrize("logits", ["all", "none"])
def test_logits_that_do_not_stack_are_not_stacked(language: RMTRuntime, logits: str) -> None:
    out = language.run([DOCUMENT, DOCUMENT[:5]], logits=logits)
    with pytest.raises(ContractError, match=r"do not stack into one array; read them one by one: out\[i\]\.logits"):
        _ = out.logits


@pytest.mark.parametrize("engine", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_an_engine_that_cannot_run_here_is_an_error_that_says_why(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPU, wherever this test runs
    with pytest.raises(EngineError, match=rf"'{engine}'") as info:
        RMTRuntime(models.made("bert").bundle, engine=engine)
    assert len(str(info.value)) > len(f"engine '{engine}' cannot run")


def test_a_dtype_that_no_engine_has_names_every_engines_reason() -> None:
    with pytest.raises(EngineError, match=r"no engine can run .*bert\.rmt on this machine") as info:
        RMTRuntime(models.made("bert").bundle, dtype="fp8")
    assert all(f"{name}: " in str(info.value) for name in MODULES)
    with pytest.raises(
        EngineError, match=r"engine 'cpu' cannot run .*bert\.rmt: it runs fp32, int8, .*int4-weights graphs, not fp16"
    ):
        RMTRuntime(models.made("bert").bundle, engine="cpu", dtype="fp16")


def test_an_engine_for_another_kind_of_file_says_so() -> None:
    made = models.made("bert")
    with pytest.raises(
        EngineError, match=r"engine 'torch' cannot run .*: it runs a checkpoint .*this is an exported graph"
    ):
        RMTRuntime(made.bundle, engine="torch")
    with pytest.raises(
        EngineError, match=r"engine 'cpu' cannot run .*\.pt: it runs an exported graph.* with: rmt-export"
    ):
        RMTRuntime(made.checkpoint, engine="cpu")


@pytest.mark.parametrize("kind", ["bundle", "checkpoint"])
def test_nothing_runs_after_close(kind: str) -> None:
    made = models.made("gpt2")
    runtime = RMTRuntime(getattr(made, kind), threads=1)
    stream = runtime.stream(DOCUMENT)
    next(stream)
    runtime.close()
    runtime.close()
    for use in (
        lambda: runtime.run(DOCUMENT),
        lambda: runtime.run_many([DOCUMENT]),
        lambda: runtime.stream(DOCUMENT),
        lambda: next(stream),
    ):
        with pytest.raises(EngineError, match=r"the runtime of .* is closed; open a new RMTRuntime"):
            use()


class Broken(Wrapped):
    """An engine that fails in every step, and when it is closed."""

    def steps(self, states: Any, segments: np.ndarray) -> Any:
        raise EngineError("the step failed")

    def close(self) -> None:
        raise EngineError("the closing failed")


def test_a_failed_step_is_not_hidden_by_an_engine_that_cannot_be_closed() -> None:
    runtime = models.made("bert").open()
    runtime._engine = Broken(runtime._engine)
    with pytest.raises(EngineError, match="the step failed"), runtime:
        runtime.run(DOCUMENT)
    runtime.close()
    with pytest.raises(EngineError, match="is closed"):
        runtime.run(DOCUMENT)
    runtime = models.made("bert").open()
    runtime._engine = Broken(runtime._engine)
    with pytest.raises(EngineError, match="the closing failed"), runtime:
        pass


PATHS: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (None, ContractError, "the path is None; expected the path of a file or folder"),
    "number": (3, ContractError, "the path is 3; expected the path of a file or folder"),
    "bytes": (b"model.rmt", ContractError, "the path is b'model.rmt'; expected the path of a file or folder as text"),
    "empty": ("", ContractError, "the path is ''; expected the path of a file or folder"),
    "null byte": ("a\0b", FormatError, "cannot be opened (embedded null byte); expected a bundle"),
    "too long": ("a" * 5000, FormatError, "cannot be opened (File name too long); expected a bundle"),
    "missing": (
        "no/such.rmt",
        FormatError,
        "no/such.rmt cannot be opened (No such file or directory); expected a bundle",
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_leads_nowhere(name: str) -> None:
    path, kind, message = PATHS[name]
    with pytest.raises(kind, match=re.escape(message)):
        RMTRuntime(path)


@pytest.mark.parametrize("segments", [1, 0, -5])
def test_a_verification_goes_through_two_segments_at_least(segments: int) -> None:
    with pytest.raises(ContractError, match=f"segments is {segments}; expected at least 2, one of which is short"):
        ExportOptions(segments=segments)
    made = models.made("bert")
    with made.open() as runtime, pytest.raises(ContractError, match=f"segments is {segments}; expected at least 2"):
        verify(runtime, model_reference(made.model), segments)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_a_tolerance_is_a_number_above_zero(tolerance: float) -> None:
    with pytest.raises(ContractError, match=rf"tolerance is {tolerance}; expected a number above 0"):
        ExportOptions(tolerance=tolerance)
    made = models.made("bert")
    with (
        made.open() as runtime,
        pytest.raises(ContractError, match=rf"tolerance is {tolerance}; expected a number above"),
    ):
        verify(runtime, model_reference(made.model), tolerance=tolerance)


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "form": ({"form": "rnn"}, "form is 'rnn'; expected one of encoder, decoder, custom"),
    "segment_length": (
        {"segment_length": 10**12},
        "segment_length holds 1000000000000; expected a whole number from 1",
    ),
    "vocab_size": ({"vocab_size": 0}, "vocab_size holds 0; expected a whole number from 1"),
    "dropped_ids": ({"dropped_ids": (-1,)}, "dropped_ids holds -1; expected a whole number from 0"),
    "id2label text": ({"id2label": "abcde"}, "id2label is 'abcde'; expected the names of the classes in order"),
    "id2label short": ({"id2label": ("a",)}, "id2label names 1 classes; the step has 5 logits"),
    "fingerprint": ({"fingerprint": 5}, "fingerprint is 5; expected text, a SHA-256 in hexadecimal"),
    "version": ({"version": True}, "step spec has version True; this rmt-trt reads version 1"),
    "no state": ({"states": ()}, "step spec has 0 states; expected 1 to"),
    "states too large together": (
        {"states": tuple(StateSpec(f"a{i}", f"b{i}", (1 << 27,), initial=f"c{i}") for i in range(3))},
        "step spec has states of more than 268435456 values in all",
    ),
    "names twice": ({"states": (StateSpec("a", "a", (1,)),)}, "step spec uses a tensor name twice: ['a', 'a']"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_step_spec_refuses(name: str) -> None:
    changes, message = FIELDS[name]
    fields: dict[str, Any] = {
        "form": "custom", "states": (StateSpec(shape=(4, 8)),), "segment_length": 20, "vocab_size": 96,
        "logits": "classifier", "num_logits": 5,
    }  # fmt: skip
    with pytest.raises(ContractError, match=re.escape(message)):
        StepSpec(**{**fields, **changes})


def test_a_bundle_is_asked_for_files_that_it_has() -> None:
    bundle = Bundle(models.made("bert").bundle)
    with pytest.raises(FormatError, match=r"has no file 'weights.bin' in its manifest; it has \['initial_state"):
        bundle.file("weights.bin")
