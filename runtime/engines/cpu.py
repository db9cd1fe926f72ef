"""ONNX Runtime on the CPU: the embedded default engine. States are numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmt_trt.contract import LOGITS, PAD, QUANTIZED, SEGMENT, Answer, Head, StepSpec
from rmt_trt.errors import EngineError, FormatError, require
from rmt_trt.runtime import native
from rmt_trt.runtime.loglik import reduced
from rmt_trt.runtime.signature import check_signature

if TYPE_CHECKING:
    from rmt_trt.bundle import Bundle
    from rmt_trt.manifest import GraphEntry
    from rmt_trt.runtime.source import Source

NAME = "cpu"
DTYPES = ("fp32", *QUANTIZED)  # the first is taken where none is asked for
ERRORS_ONLY = 3  # ONNX Runtime's log severity
E4M3 = "float8e4m3fn"
OLDEST = (1, 24, 4)  # 1.23 opens ../ and absolute paths of external data


def refusal(source: Source, dtype: str | None, device: int) -> str | None:
    """Why this engine cannot run the source, or None."""
    if source.kind == "checkpoint":
        return "it runs an exported graph, and this is a checkpoint. Export it with: rmt-export"
    if source.kind == "engine":
        return "it runs a graph, and this is a TensorRT engine by itself. Open the bundle that it was built for"
    wanted = dtype or DTYPES[0]
    if wanted not in DTYPES:
        return f"it runs {', '.join(DTYPES)} graphs, not {dtype}"
    if source.bundle is None and wanted != DTYPES[0]:
        return (
            f"a graph by itself is run as {DTYPES[0]}, or as it is quantized. Leave the dtype out, or open the bundle"
        )
    if source.bundle is not None and _graph(source.bundle, wanted) is None:
        command = "Export the model again with rmt-export"
        if wanted != DTYPES[0]:
            command = f"Add one with rmt-calibrate{'' if wanted == 'int8' else f' --dtype {wanted}'}"
        return f"the bundle holds no {wanted} graph for it. {command}"
    try:
        library()
    except EngineError as err:
        return str(err)
    return None


def open_engine(source: Source, dtype: str | None, device: int, threads: int | None) -> CPUEngine:
    """Errors: EngineError or FormatError, when ONNX Runtime refuses the graph or it does not fit its spec."""
    if source.bundle is not None:
        entry = _graph(source.bundle, dtype or DTYPES[0])
        if entry is None:
            raise EngineError(f"{source.path} holds no {dtype} graph for the CPU engine")
        path = source.bundle.graph_path(entry)
        session = open_session(path, threads, entry.needs)
    else:
        path = source.path
        # The session through which the spec was read took the default number of threads.
        session = source.session if source.session is not None and threads is None else open_session(path, threads)
    check_signature(session, source.spec, path)
    return CPUEngine(session, source.spec, dtype or DTYPES[0])


def _graph(bundle: Bundle, dtype: str) -> GraphEntry | None:
    """The graph that this installation runs."""
    plain = bundle.graph(NAME, dtype)
    return plain or (None if native.library() is None else bundle.graph(NAME, dtype, needs=(native.NEED,)))


def library() -> Any:
    """ONNX Runtime. Errors: EngineError, when it is missing or would read any file that a stranger's graph names."""
    ort = require("onnxruntime", "cpu", "the CPU engine")
    found = tuple(int(part) for part in ort.__version__.split(".")[:3] if part.isdecimal())
    if found < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise EngineError(
            f"ONNX Runtime {ort.__version__} reads external data outside a graph's folder; {wanted} or newer refuses it. "
            f"Install it with: pip install 'onnxruntime>={wanted}'"
        )
    return ort


def open_session(path: Path, threads: int | None = None, needs: Sequence[str] = ()) -> Any:
    """An ONNX Runtime session on the CPU. ONNX Runtime itself refuses external data outside the graph's folder. needs: as
    a `GraphEntry` says.

    Errors: FormatError, with ONNX Runtime's own words.
    """
    if not path.is_file():
        raise FormatError(f"{path} is no file; expected an ONNX graph")
    try:
        return _session(path, threads, {}, needs)
    except FormatError as err:
        if E4M3 not in str(err):
            raise
    # ONNX Runtime 1.31 makes products of E4M3 into a node for integers, which it then refuses. Unfused, they are rounded
    # to E4M3 and multiplied in float32.
    return _session(path, threads, {"session.disable_quant_qdq": "1"}, needs)


def _session(path: Path, threads: int | None, entries: dict[str, str], needs: Sequence[str]) -> Any:
    ort = library()
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    count = threads if threads is not None else _fewer_threads()
    if count is not None:
        options.intra_op_num_threads = count
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    if native.NEED in needs:
        native.register(options)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as err:  # ONNX Runtime's exceptions share no base class of their own
        raise FormatError(
            f"ONNX Runtime {ort.__version__} refuses {path}: {_one_line(err)}. If the file is damaged or was altered, "
            f"export the model again"
        ) from err


def _fewer_threads() -> int | None:
    """How many cores this process may use, where these are not all: ONNX Runtime counts all, and threads that share a core
    wait for one another."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = len(os.sched_getaffinity(0))
    return allowed if allowed < (os.cpu_count() or 1) else None


class CPUEngine:
    """An ONNX Runtime session behind the engine contract."""

    name = NAME
    max_batch = None

    def __init__(self, session: Any, spec: StepSpec, dtype: str = DTYPES[0]) -> None:
        self.dtype = dtype
        self._session = session
        self._spec = spec
        self._states = [state.output for state in spec.states]
        places = next(value.shape[1] for value in session.get_inputs() if value.name == SEGMENT)
        self._places = places if isinstance(places, int) else None  # fused graphs take whole segments only

    def load(self, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tuple(
            np.array(value, spec.dtype, order="C") for value, spec in zip(states, self._spec.states, strict=True)
        )

    def fetch(self, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tuple(value.copy() for value in states)

    share = fetch  # what lies on the host is fetched and shared alike: as a copy, which keeps States values

    def take(self, parts: Sequence[tuple[np.ndarray, ...]], rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(
            value[rows] for value in (map(np.concatenate, zip(*parts, strict=True)) if parts[1:] else parts[0])
        )

    def step(
        self, states: tuple[np.ndarray, ...], segment: np.ndarray, head: Head, host: bool = True
    ) -> tuple[tuple[np.ndarray, ...], Answer | None]:
        if head == "none":
            return self._run(self._states, states, segment), None
        *new, logits = self._run([*self._states, LOGITS], states, segment)
        if self._spec.logits == "lm":
            logits = logits[:, : segment.shape[1]]
        return tuple(new), reduced(logits, segment, head, self._spec.logits)

    def steps(self, states: tuple[np.ndarray, ...], segments: np.ndarray) -> tuple[np.ndarray, ...]:
        for segment in segments:
            states = self._run(self._states, states, segment)
        return states

    def _run(self, outputs: list[str], states: tuple[np.ndarray, ...], segment: np.ndarray) -> tuple[np.ndarray, ...]:
        length = segment.shape[1]
        if self._places is not None and length < self._places:
            segment = np.pad(segment, ((0, 0), (0, self._places - length)), constant_values=PAD)
        feeds = dict(zip(self._spec.inputs, (*states, segment), strict=True))
        try:
            return tuple(self._session.run(outputs, feeds))
        except Exception as err:  # see open_session
            raise EngineError(f"ONNX Runtime failed in a step of shape {segment.shape}: {_one_line(err)}") from err

    def close(self) -> None:
        self._session = None


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())[:600]
