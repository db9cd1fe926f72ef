"""ONNX Runtime's CUDA provider: the recurrence wholly on the GPU, replayed from captured CUDA graphs.

Where rmt-trt's own operators are installed (`rmt_trt.runtime.native`), graphs that need them are taken before others, and
before these, on the GPUs that run them, those that need their kernels for one kind of GPU.

A graph of the bundle is a session; on each bucket (`rmt_trt.runtime.buckets`) a session has two bindings, from memory A
to B and from B to A, captured once each. So two segments cost one small copy of tokens and two replays, and the host
waits only where logits or states are asked for.

Plain graphs, which are step.onnx in another dtype, compute the sizes of their tensors as they run, which ONNX Runtime does
on the CPU and cannot capture. They get a session for each bucket, which is told all sizes beforehand.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.contract import BATCH_AXIS, QUANTIZED, SEGMENT, TEXT_AXIS, Answer, Head
from rmt_trt.errors import EngineError, require
from rmt_trt.runtime import cuda, device_rows, machine, native
from rmt_trt.runtime.buckets import Bucket, Replay, States, new_bucket
from rmt_trt.runtime.cuda import one_line
from rmt_trt.runtime.products import NO_INT8_ON_CUDA, products_refusal
from rmt_trt.runtime.signature import check_signature
from rmt_trt.runtime.worker import on_worker

if TYPE_CHECKING:
    from rmt_trt.runtime.source import Source

log = logging.getLogger("rmt_trt")

NAME = "cuda"
PROVIDER = "CUDAExecutionProvider"
OLDEST = (1, 31)  # of onnxruntime-gpu: the oldest that was run
DTYPES = ("fp16", "bf16", "fp32")  # what dtype=None takes, first where a bundle has several
WARNINGS, ERRORS_ONLY = 2, 3  # ONNX Runtime's log severities; it starts with the first
Key = tuple[str, Head, int]  # role, head, documents from which on the graph is the one to take
# The heads whose graph has what a head asks for, the least work first.
SERVED_BY: dict[Head, tuple[Head, ...]] = {
    "none": ("none", "last", "all"),
    "last": ("last", "all"),
    "all": ("all",),
    "loglik": ("loglik", "all"),
}


def refusal(source: Source, dtype: str | None, device: int) -> str | None:
    """Why this engine cannot run the source, or None."""
    if source.bundle is None:
        return "it runs a bundle's graphs for CUDA; export one with rmt-export MODEL --engine cuda"
    if _dtype(source.bundle, dtype, device) is None:
        if missing := _missing(source.bundle, dtype, device):
            return missing
        if dtype == "int8":
            return NO_INT8_ON_CUDA
        made = sorted({graph.dtype for graph in source.bundle.manifest.graphs if graph.engine == NAME})
        have = f"it has them in {', '.join(made)}" if made else "it has none"
        command = "rmt-calibrate" if dtype in QUANTIZED else "rmt-export"
        return (
            f"the bundle has no graphs for CUDA{f' in {dtype}' if dtype else ''} ({have}). Add them: {command} "
            f"{source.path} --engine cuda --dtype {dtype or 'fp16'}"
        )
    try:
        ort = require("onnxruntime", "gpu", "an NVIDIA GPU")
    except EngineError as err:
        return str(err)
    if tuple(int(part) for part in ort.__version__.split(".")[:3] if part.isdigit()) < OLDEST:
        return (
            f"onnxruntime {ort.__version__} is older than {'.'.join(map(str, OLDEST))}, the oldest that this engine was run "
            f"with. Install a newer one: pip install 'rmt-trt[gpu]'"
        )
    if PROVIDER not in ort.get_available_providers():
        return (
            f"the installed onnxruntime {ort.__version__} has no CUDA provider. Install the other build of it: "
            f"pip uninstall onnxruntime; pip install 'rmt-trt[gpu]'"
        )
    return cuda.refusal(device) or _lacks_products(source.bundle, _dtype(source.bundle, dtype, device), device)


def open_engine(source: Source, dtype: str | None, device: int, threads: int | None) -> CudaEngine:
    """Errors: EngineError, with the libraries' own words when CUDA, cuDNN and the driver do not fit together."""
    reason = refusal(source, dtype, device)
    if reason is not None or source.bundle is None:
        raise EngineError(f"engine 'cuda' cannot run {source.path}: {reason}")
    chosen = _dtype(source.bundle, dtype, device)
    assert chosen is not None
    return CudaEngine(source.bundle, chosen, device)


def _dtype(bundle: Bundle, dtype: str | None, device: int) -> str | None:
    made = {graph.dtype for graph in _runnable(bundle, device)}
    return next((name for name in (DTYPES if dtype is None else (dtype,)) if name in made), None)


def _runnable(bundle: Bundle, device: int) -> list[GraphEntry]:
    """The graphs for CUDA, without those that need what is not here or what this GPU is not; for one use, that which needs
    most comes last."""
    made = [graph for graph in bundle.manifest.graphs if graph.engine == NAME]
    left_out = {needs: native.lacking(needs, device) for needs in {graph.needs for graph in made}}
    return sorted((graph for graph in made if left_out[graph.needs] is None), key=lambda graph: len(graph.needs))


def _lacks_products(bundle: Bundle, dtype: str | None, device: int) -> str | None:
    """Why the GPU does not multiply as the graphs do, or None. Without our own operators they multiply in float."""
    ours = any(native.NEED in graph.needs for graph in _runnable(bundle, device) if graph.dtype == dtype)
    return products_refusal(dtype, machine.capability(device)) if ours and dtype in QUANTIZED else None


def _missing(bundle: Bundle, dtype: str | None, device: int) -> str | None:
    """What keeps back graphs that are there, or None where there are none of the dtype."""
    wanted = DTYPES if dtype is None else (dtype,)
    kept = [graph for graph in bundle.manifest.graphs if graph.engine == NAME and graph.dtype in wanted]
    reason = native.lacking(kept[0].needs, device) if kept else None
    if reason is None:
        return None
    return f"its graphs for CUDA in {kept[0].dtype} need rmt-trt's own operators, and {reason}"


@dataclass(eq=False)
class GraphReplay:
    """A session on a bucket: bindings and run options from A to B and back, each captured as a CUDA graph."""

    session: Any
    bindings: tuple[Any, Any]
    options: tuple[Any, Any]
    outputs: dict[str, tuple[Any, tuple[int, ...]]]

    def run(self, side: int) -> None:
        self.session.run_with_iobinding(self.bindings[side], self.options[side])


class CudaEngine:
    """A bundle's graphs for CUDA behind the engine contract."""

    name = NAME
    max_batch = None

    def __init__(self, bundle: Bundle, dtype: str, device: int) -> None:
        self.dtype = dtype
        self._bundle, self._spec, self._device = bundle, bundle.spec, device
        graphs = [graph for graph in _runnable(bundle, device) if graph.dtype == dtype]
        self._graphs = {(g.role, cast(Head, g.head), g.min_batch): g for g in graphs}  # the last for a use stays
        log.info("engine 'cuda': %s", self.products)
        self._plain = not any(graph.role == "full" for graph in graphs)
        self._sessions: dict[tuple[Key, int], Any] = {}  # by graph, and of plain ones by the size of their bucket
        self._buckets: dict[int, Bucket] = {}
        self._captures = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rmt-trt-cuda")
        try:
            self._open()
        except BaseException:
            self._worker.shutdown()
            raise

    @property
    def products(self) -> str:
        """Whose products its graphs have, in words."""
        taken = {need for graph in self._graphs.values() for need in graph.needs}
        made = {need for graph in self._bundle.manifest.graphs if graph.dtype == self.dtype for need in graph.needs}
        if native.HOPPER in taken:
            return f"native products and kernels for this GPU, from {native.library()}"
        if native.NEED in taken:
            more = ""
            if native.HOPPER in made:
                more = f"; more of its native graphs are not used: {native.lacking([native.HOPPER], self._device)}"
            return f"native products, from {native.library()}{more}"
        if native.NEED not in made:
            return "ONNX Runtime's products; the bundle has no native ones"
        reason = native.unused() or native.lacking([native.HOPPER], self._device)
        return f"ONNX Runtime's products; the bundle's native ones are not used: {reason}"

    @on_worker
    def _open(self) -> None:
        self._gpu = cuda.Gpu(self._device)
        with self._gpu.current():
            # What a plain run of one document uses, so that the first one is not slower than the others.
            for key in (self._key("full", "none", 1), self._key("step", "last", 1)):
                self._replay(self._bucket(1), key)

    @on_worker
    def load(self, states: tuple[np.ndarray, ...]) -> States:
        with self._gpu.current():
            return device_rows.load(self._gpu, self._spec, states)

    @on_worker
    def fetch(self, states: States) -> tuple[np.ndarray, ...]:
        with self._gpu.current():
            return device_rows.fetch(self._gpu, self._spec, states)

    @on_worker
    def share(self, states: States) -> tuple[Any, ...]:
        with self._gpu.current():
            return device_rows.share(self._gpu, self._spec, states)

    @on_worker
    def take(self, parts: Sequence[States], rows: np.ndarray) -> States:
        with self._gpu.current():
            return device_rows.take(self._gpu, self._spec, parts, rows)

    @on_worker
    def step(self, states: States, segment: np.ndarray, head: Head, host: bool = True) -> tuple[States, Answer | None]:
        with self._gpu.current():
            batch, length = segment.shape
            full = length == self._spec.segment_length and bool((segment >= 0).all())
            bucket = self._bucket(batch)
            replay = self._replay(bucket, self._key("full" if full else "step", head, bucket.size))
            new = self._through(bucket, replay, states, device_rows.padded(self._spec, segment))
            return new, device_rows.answer(self._gpu, self._spec, replay.outputs, segment, head, host)

    @on_worker
    def steps(self, states: States, segments: np.ndarray) -> States:
        with self._gpu.current():
            bucket = self._bucket(segments.shape[1])
            return self._through(bucket, self._replay(bucket, self._key("full", "none", bucket.size)), states, segments)

    @on_worker
    def replay(self, batch: int, steps: int) -> None:
        """Replays the graphs of full segments alone, from A to B and back, and waits: what the driver is measured by."""
        with self._gpu.current():
            bucket = self._bucket(batch)
            replay = self._replay(bucket, self._key("full", "none", bucket.size))
            for number in range(steps):
                replay.run(number % 2)
            self._gpu.wait()

    def close(self) -> None:
        try:
            self._release()
        finally:
            self._worker.shutdown()

    @on_worker
    def _release(self) -> None:
        """Captured graphs go before the sessions, these before the memory that they were bound to; so does a failed GPU's."""
        with self._gpu.current():
            try:
                self._gpu.wait()
            finally:
                with cuda.CAPTURING:
                    for bucket in self._buckets.values():
                        bucket.replays.clear()
                    self._sessions.clear()
                    self._buckets.clear()
                    self._gpu.close()

    def _through(self, bucket: Bucket, replay: Replay, states: States, segments: np.ndarray) -> States:
        return device_rows.through(self._gpu, self._spec, bucket, replay, states, segments, "ONNX Runtime")

    def _key(self, role: str, head: Head, size: int) -> Key:
        """The graph that does it with the least: a bundle with plain graphs has ("step", "all") only."""
        for wanted in [(r, h) for r in (role, "step") for h in SERVED_BY[head]]:
            fitting = [key for key in self._graphs if key[:2] == wanted and key[2] <= size]
            if fitting:
                return max(fitting, key=lambda key: key[2])
        raise EngineError(
            f"{self._bundle.path} has no graph for CUDA in {self.dtype} with head '{head}'; add them again: rmt-export "
            f"{self._bundle.path} --engine cuda --dtype {self.dtype}"
        )

    def _bucket(self, batch: int) -> Bucket:
        size = 1 << (batch - 1).bit_length()
        if size not in self._buckets:
            self._buckets[size] = new_bucket(self._gpu, self._spec, size)
        return self._buckets[size]

    def _replay(self, bucket: Bucket, key: Key) -> Replay:
        if key in bucket.replays:
            return bucket.replays[key]
        with cuda.CAPTURING:
            session = self._session(key, bucket.size if self._plain else 0)
            outputs = {}
            for value in session.get_outputs():
                if value.name not in {state.output for state in self._spec.states}:
                    axes = (bucket.size, self._spec.segment_length)
                    shape = tuple(n if isinstance(n, int) else axes[axis] for axis, n in enumerate(value.shape))
                    outputs[value.name] = (self._gpu.allocate(4 * math.prod(shape)), shape)
            bindings = (self._bind(session, bucket, 0, outputs), self._bind(session, bucket, 1, outputs))
            replay = GraphReplay(session, bindings, (self._options(), self._options()), outputs)
            self._warm(replay, native.NEED in self._graphs[key].needs)
            bucket.replays[key] = replay
        return replay

    def _warm(self, replay: Replay, ours: bool) -> None:
        """Runs and captures both directions. A and B are nobody's state: those are copied in before a run.

        ONNX Runtime runs a graph once before it captures it: there our own operators choose their algorithms."""
        try:
            for side in (0, 1):
                replay.run(side)
            self._gpu.wait()
        except Exception as err:  # ONNX Runtime's exceptions share no base class of their own
            more = f". Without rmt-trt's own operators: set {native.SWITCH}=0" if ours else ""
            raise EngineError(f"ONNX Runtime cannot capture the step on this GPU: {one_line(err)}{more}") from err

    def _bind(self, session: Any, bucket: Bucket, side: int, outputs: dict[str, tuple[Any, tuple[int, ...]]]) -> Any:
        binding = session.io_binding()
        index, size = self._gpu.index, bucket.size
        states = zip(self._spec.states, bucket.sides[side], bucket.sides[1 - side], strict=True)
        for state, source, target in states:
            shape, dtype = (size, *state.shape), np.dtype(state.dtype)
            binding.bind_input(state.input, "cuda", index, dtype, shape, int(source.handle))
            binding.bind_output(state.output, "cuda", index, dtype, shape, int(target.handle))
        tokens = (size, self._spec.segment_length)
        binding.bind_input(SEGMENT, "cuda", index, np.int64, tokens, int(bucket.tokens[side].handle))
        for name, (buffer, shape) in outputs.items():
            binding.bind_output(name, "cuda", index, np.float32, shape, int(buffer.handle))
        return binding

    def _options(self) -> Any:
        import onnxruntime

        self._captures += 1  # the graphs of a session are told apart by number
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._captures))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _session(self, key: Key, batch: int) -> Any:
        if (key, batch) not in self._sessions:
            graph = self._graphs[key]
            path = self._bundle.graph_path(graph)
            sizes = {BATCH_AXIS: batch, TEXT_AXIS: self._spec.segment_length} if batch else {}
            session = open_session(path, self._gpu, native.NEED in graph.needs, sizes)
            check_signature(session, self._spec, path, key[1], batch or None)
            self._sessions[key, batch] = session
        return self._sessions[key, batch]


def open_session(path: Path, gpu: cuda.Gpu, ours: bool, sizes: Mapping[str, int]) -> Any:
    """A session whose nodes all run on the GPU, on our stream, captured as CUDA graphs. ours: some are rmt-trt's own. sizes:
    of axes that the graph leaves open, by name.

    Errors: EngineError, with ONNX Runtime's own words.
    """
    import onnxruntime as ort

    missing = io.StringIO()
    with contextlib.redirect_stdout(missing):
        ort.preload_dlls()  # finds CUDA and cuDNN of pip packages, and prints what it does not find
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # Fused Q/DQ is made of nodes for integers on the CPU. Unfused, tensors are rounded on the GPU and multiplied in float.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Without a limit: what a graph says of weights alone is done now, and not in every step.
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", "0")
    for axis, size in sizes.items():
        options.add_free_dimension_override_by_name(axis, size)
    if ours:
        native.register(options)
    provider = {
        "device_id": str(gpu.index),
        "user_compute_stream": str(int(gpu.stream.handle)),
        "enable_cuda_graph": "1",
        "use_tf32": "0",  # fp32 means fp32
    }
    ort.set_default_logger_severity(ERRORS_ONLY)  # it warns of a plugin of the same name that nobody asked for
    try:
        session = ort.InferenceSession(str(path), options, providers=[(PROVIDER, provider)], enable_fallback=0)
    except Exception as err:  # ONNX Runtime's exceptions share no base class of their own
        more = (
            "Do CUDA, cuDNN and the driver fit this build of onnxruntime-gpu? See https://onnxruntime.ai/docs/install"
        )
        if ours and f"{native.DOMAIN}:" in str(err):
            more = (
                f"If another version of rmt-trt made this graph, export it again; {native.SWITCH}=0 runs the graphs without "
                f"rmt-trt's own operators"
            )
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot run {path} on device {gpu.index}: {one_line(err)}. {_one(missing)}{more}"
        ) from err
    finally:
        ort.set_default_logger_severity(WARNINGS)
    if PROVIDER not in session.get_providers():
        raise EngineError(
            f"ONNX Runtime {ort.__version__} did not start its CUDA provider on device {gpu.index}: CUDA or cuDNN was not "
            f"found. Install what onnxruntime-gpu {ort.__version__} was built for: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return session


def _one(printed: io.StringIO) -> str:
    text = " ".join(printed.getvalue().split())[:500]
    return f"{text} " if text else ""
