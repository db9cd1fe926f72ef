"""RMTRuntime: a deployed Recurrent Memory Transformer over documents of any length, at constant memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np

from rmt_trt.contract import Engine, StepSpec
from rmt_trt.errors import ContractError, EngineError, FormatError, TokenError, require
from rmt_trt.runtime.engines import choose, engine_module
from rmt_trt.runtime.many import Many, in_slots, opened, sources
from rmt_trt.runtime.reading import Opener, Reading
from rmt_trt.runtime.recurrence import Recurrence
from rmt_trt.runtime.results import BatchResult, Piece, RunResult
from rmt_trt.runtime.slots import Slots
from rmt_trt.runtime.source import open_source
from rmt_trt.runtime.state import State
from rmt_trt.runtime.stream import Stream
from rmt_trt.runtime.track import Track

log = logging.getLogger("rmt_trt")

MAX_BATCH, MAX_DEVICE, MAX_THREADS = 1 << 20, 1 << 10, 1 << 12


class RMTRuntime:
    """Runs a bundle, an ONNX graph or a checkpoint over tokens.

        rt = RMTRuntime("model.rmt")
        out = rt.run(tokens)                     # any length; out.logits, out.memory, out.segments
        for index, out in rt.run_many(documents): ...   # many documents, answered as they finish
        for piece in rt.stream(tokens): ...      # segment by segment

    path     `NAME.rmt`, `step.onnx`, or a checkpoint such as `model.pt` (the PyTorch reference)
    engine   "auto" takes the best that this machine can run; a name takes that one or fails. `rt.engine` says which
             it is, `rt.refused` why better ones were not taken
    dtype    "fp32", ...; None takes the best that the bundle has for the engine
    device   index of the GPU, for GPU engines
    threads  CPU threads of a step; None takes all cores. The PyTorch engine sets it for the whole process
    max_batch  documents that are stepped together at the most; of more, one begins when another ends. An engine that was
             built for fewer lowers it: `rt.max_batch`

    A runtime may be shared by threads: a lock is held during each block of steps, so runs interleave.
    Errors: FormatError for a damaged or foreign file, EngineError when no engine can run it here.
    """

    def __init__(
        self,
        path: Path | str,
        engine: str = "auto",
        dtype: str | None = None,
        device: int = 0,
        threads: int | None = None,
        max_batch: int = 64,
    ) -> None:
        _whole("max_batch", max_batch, 1, MAX_BATCH)
        _whole("device", device, 0, MAX_DEVICE)
        if threads is not None:
            _whole("threads", threads, 1, MAX_THREADS)
        source = open_source(path)
        self.path = source.path
        self.spec: StepSpec = source.spec
        self.engine, self.refused = choose(source, engine, dtype, device)
        opened = engine_module(self.engine).open_engine(source, dtype, device, threads)
        self.dtype = opened.dtype
        self._engine: Engine | None = opened
        self._initial = source.initial
        self._tokenizer_json = source.tokenizer
        self._tokenizer: Any = None
        self._lock = threading.RLock()
        # An engine that is built for so many documents takes no more.
        self._limited = opened.max_batch is not None and opened.max_batch < max_batch
        self.max_batch = max_batch if opened.max_batch is None else min(max_batch, opened.max_batch)
        for name, reason in self.refused.items():
            log.info("engine '%s' was not taken: %s", name, reason)
        log.info("%s runs on engine '%s' (%s)", self.path, self.engine, self.dtype)
        if self._limited:
            log.info("max_batch is %d, for which the engine was built, not %d", self.max_batch, max_batch)

    @overload
    def run(
        self,
        tokens: list[str] | list[list[int]] | list[np.ndarray] | list[Iterator[np.ndarray]],
        state: Sequence[State | None] | None = None,
        *,
        alignment: str | None = None,
        logits: str = "last",
        length: Any = None,
        max_segments: int | None = None,
        overflow: str = "error",
        on_piece: Callable[[Piece], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
        on_device: bool = False,
    ) -> BatchResult: ...
    @overload
    def run(
        self,
        tokens: Any,
        state: Any = None,
        *,
        alignment: str | None = None,
        logits: str = "last",
        length: Any = None,
        max_segments: int | None = None,
        overflow: str = "error",
        on_piece: Callable[[Piece], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
        on_device: bool = False,
    ) -> RunResult: ...
    def run(
        self,
        tokens: Any,
        state: Any = None,
        *,
        alignment: str | None = None,
        logits: str = "last",
        length: Any = None,
        max_segments: int | None = None,
        overflow: str = "error",
        on_piece: Callable[[Piece], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
        on_device: bool = False,
    ) -> RunResult | BatchResult:
        """Reads documents to their end and answers.

        tokens     one document: a 1-D array or memmap, a list or iterator of ints, an iterator of 1-D pieces, anything
                   that speaks DLPack, or text where the model has a tokenizer. A batch: a list of documents, or a 2-D
                   array whose rows may end in ids below 0. Each document gets the answer that it gets alone.
        state      go on from `out.state` of an earlier part (alignment "left" only); of a batch, one per document
        alignment  "left", "right" or "center"; None takes the model's own
        logits     "last", "all", "loglik" (language models), "none": see `RunResult`
        length     tokens that an iterator will give, dropped ids not counted; of a batch, one per document
        max_segments, overflow   a limit of the caller's own: longer documents are an error, or cut to their "head" or
                   "tail"; the length that the model was trained on is never a limit
        on_piece   called with each `Piece`: with logits="all" or "loglik" rows are then handed over, not kept. It makes
                   the run go segment by segment, where it otherwise hands whole blocks of them to the engine
        on_progress  called now and then with the number of tokens handed to the engine so far, which a GPU may still
                   be busy with
        on_device  leaves logits and states where the engine computed them, as arrays that speak DLPack; nothing is
                   fetched, so no label, no state to go on from, no check for values that are not finite; with logits
                   "last" or "none"

        Returns RunResult, or BatchResult for a batch. Errors: TokenError for tokens that the model cannot read,
        ContractError for options that do not fit, FormatError for another model's state, EngineError when a step fails.
        """
        self._live_engine()
        _callback("on_piece", on_piece, "a Piece")
        _callback("on_progress", on_progress, "a number of tokens")
        _flag("on_device", on_device)
        reading = Reading.of(self.spec, alignment, logits, max_segments, overflow)
        blocks = on_piece is None and reading.logits in ("last", "none")
        if on_device and not blocks:
            raise ContractError("on_device=True goes with logits='last' or 'none' and without on_piece")
        tracks, batch = self._opener(reading).open(tokens, state, length)
        if blocks:
            slots = self._slots(min(self.max_batch, len(tracks)), reading, on_device, on_progress)
            results = in_slots(slots, tracks, self.spec, reading)
        else:
            results = self._by_segment(tracks, reading, on_piece, on_progress)
        return BatchResult(results) if batch else results[0]

    def _by_segment(
        self,
        tracks: list[Track],
        reading: Reading,
        on_piece: Callable[[Piece], None] | None,
        on_progress: Callable[[int], None] | None,
    ) -> list[RunResult]:
        results: list[RunResult] = []
        done = 0
        for start in range(0, len(tracks), self.max_batch):
            group = tracks[start : start + self.max_batch]
            recurrence = Recurrence(self._live_engine, self.spec, group, self._lock, reading.logits)
            stream = Stream(recurrence, self.spec, reading, batch=True, keep=on_piece is None)
            for piece in stream:
                done += piece.stop - piece.start
                if on_piece is not None:
                    on_piece(piece)
                if on_progress is not None:
                    on_progress(done)
            results += stream.results
        return results

    def run_many(
        self,
        documents: Any,
        *,
        slots: int | None = None,
        ordered: bool = False,
        alignment: str | None = None,
        logits: str = "last",
        length: Any = None,
        max_segments: int | None = None,
        overflow: str = "error",
        on_progress: Callable[[int], None] | None = None,
        on_device: bool = False,
    ) -> Many:
        """Reads many documents of any lengths through a fixed number of slots, and answers each as it ends.

            for index, out in rt.run_many(documents, slots=32): ...

        documents  a list, an iterator, which may be endless, or a 2-D array; of a list those that are still to come cost
                   nothing, of an iterator one is taken when a slot is free. At most 2 * slots are open at a time, so
                   that host and device memory stay constant. Each gets the answer that it gets alone.
        slots      documents that are stepped together, up to max_batch; None takes max_batch
        ordered    yields in the order given, and starts in it; otherwise as they end, a list being started longest first,
                   so that no slot idles at the end. Answers that have to wait for an earlier document hold up the start
                   of others beyond 8 * slots.
        length     of a list, one per document; of an iterator, an iterator of them: as `run`
        others     as `run`; logits "last" or "none"

        Returns an iterator of (index, RunResult) with `steps`, `slot_steps` and `idle_share`. A document that cannot be
        read, and an engine that fails, end it with the error of `run`, which names the document by its index; what was
        yielded before stands.
        """
        self._live_engine()
        slots = self.max_batch if slots is None else slots
        _whole("slots", slots, 1, self.max_batch, self._to_raise(slots) if self._limited else "")
        _flag("ordered", ordered)
        _callback("on_progress", on_progress, "a number of tokens")
        _flag("on_device", on_device)
        reading = Reading.of(self.spec, alignment, logits, max_segments, overflow)
        if reading.logits not in ("last", "none"):
            raise ContractError(f"run_many gives logits 'last' or 'none', not '{logits}'; use run or stream for it")
        found, count = sources(documents, length, ordered)
        scheduler = self._slots(slots if count is None else max(1, min(slots, count)), reading, on_device, on_progress)
        return Many(scheduler, opened(self._opener(reading), found), self.spec, reading, ordered)

    def stream(
        self,
        tokens: Any,
        state: Any = None,
        *,
        alignment: str | None = None,
        logits: str = "all",
        length: Any = None,
        max_segments: int | None = None,
        overflow: str = "error",
        memory: bool = False,
        keep: bool = False,
    ) -> Stream:
        """Reads documents segment by segment: an iterator of `Piece`, one per document and step.

        Options as `run`; memory=True puts the states into each piece; keep=True gathers the rows of logits="all" and
        "loglik" for `stream.result`. `stream.state` is where it can go on. Nothing is read ahead of the step except with
        logits="last". At most `max_batch` documents. Errors: as `run`.
        """
        self._live_engine()
        _flag("memory", memory)
        _flag("keep", keep)
        reading = Reading.of(self.spec, alignment, logits, max_segments, overflow)
        tracks, batch = self._opener(reading).open(tokens, state, length)
        if len(tracks) > self.max_batch:
            raise ContractError(
                f"stream got {len(tracks)} documents; this runtime steps at most max_batch={self.max_batch} together. "
                f"{self._to_raise(len(tracks))}, or stream fewer at a time"
            )
        recurrence = Recurrence(self._live_engine, self.spec, tracks, self._lock, reading.logits, memory)
        return Stream(recurrence, self.spec, reading, batch, keep)

    def encode(self, text: str) -> np.ndarray:
        """Token ids (n,) int64 of a text by the model's own tokenizer, without special tokens: the step adds its own.

        Errors: TokenError, when the model came without a tokenizer; EngineError, when `tokenizers` is not installed.
        """
        if self._tokenizer is None:
            if self._tokenizer_json is None:
                raise TokenError(
                    f"{self.path} holds no tokenizer, so it reads token ids, not text. Open the bundle's folder if it is a "
                    f"graph out of one, export it with --tokenizer tokenizer.json, or tokenise the text first"
                )
            library = require("tokenizers", "text", "text input")
            try:
                self._tokenizer = library.Tokenizer.from_str(self._tokenizer_json)
            except Exception as err:  # the library raises plain Exception
                raise FormatError(f"{self.path}: its tokenizer.json cannot be read ({err})") from err
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    @property
    def tokenizer(self) -> str | None:
        """The text of the model's tokenizer.json, or None where it came without one."""
        return self._tokenizer_json

    @property
    def initial(self) -> tuple[np.ndarray, ...]:
        """The states that a document begins with, in the spec's order, each (*shape); copies."""
        return tuple(value.copy() for value in self._initial)

    def load_state(self, path: Path | str) -> State:
        """A state that `state.save(path)` wrote. Errors: FormatError, when it is damaged or another model's."""
        return State.load(path, self.spec)

    def close(self) -> None:
        """Releases the engine; a run in another thread ends with an EngineError at its next step."""
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except EngineError:
            if error is None:  # what ended the block says more than that a broken engine cannot be closed either
                raise

    def _to_raise(self, wanted: object) -> str:
        if self._limited:
            return f"Build the engine for more documents, with --max-batch {wanted}"
        return "Raise max_batch"

    def _opener(self, reading: Reading) -> Opener:
        return Opener(reading, self.spec, self._initial, self.encode)

    def _slots(self, slots: int, reading: Reading, on_device: bool, on_progress: Callable[[int], None] | None) -> Slots:
        return Slots(self._live_engine, self.spec, self._lock, slots, reading, self._initial, on_device, on_progress)

    def _live_engine(self) -> Engine:
        if self._engine is None:
            raise EngineError(f"the runtime of {self.path} is closed; open a new RMTRuntime")
        return self._engine


def _whole(name: str, value: object, low: int, high: int, more: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        advice = f". {more}" if more and isinstance(value, int) and value > high else ""
        raise ContractError(f"{name} is {value!r}; expected a whole number from {low} to {high}{advice}")


def _callback(name: str, value: object, takes: str) -> None:
    if value is not None and not callable(value):
        raise ContractError(f"{name} is {type(value).__name__}; expected a function that takes {takes}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ContractError(f"{name} is {value!r:.80}; expected True or False")
