"""A look inside a TensorRT engine: its tensors and layers as the library's inspector gives them, and its layers' times.

The library loads the engine for that, so that it takes a GPU on which the engine runs.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rmt_trt.contract import ENGINES, SEGMENT, Head, StepSpec
from rmt_trt.errors import ContractError, EngineError
from rmt_trt.runtime import cuda, device_rows, engine_files
from rmt_trt.runtime.buckets import advance, enter, new_bucket
from rmt_trt.runtime.engine_files import EngineFile
from rmt_trt.runtime.engine_fit import PACKAGES, RTX
from rmt_trt.runtime.engines.tensorrt_contexts import ContextReplay, LoadedEngine, Outputs, let_go
from rmt_trt.runtime.engines.tensorrt_versions import PROFILE, DeviceMemory
from rmt_trt.runtime.layer_information import LayerInformation, read_information

if TYPE_CHECKING:
    from rmt_trt.runtime.source import Source

WARM_UP = 10
BLOCK = 2  # segments that are drawn together: from memory A to B, and back


@dataclass(frozen=True)
class Inspection:
    """What an engine is made of, for full segments of `batch` documents.

    library    what loaded it, with its version
    verbosity  what the build kept of its layers, in the library's word: DETAILED, LAYER_NAMES_ONLY or NONE
    memory     bytes on the GPU
    tensors    name, mode, dtype, shape (-1 varies), shape as stepped, format, layout and location of inputs and outputs
    """

    library: str
    batch: int
    verbosity: str
    memory: DeviceMemory
    tensors: tuple[dict[str, Any], ...]
    information: LayerInformation


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer in a step, over all runs. share: of the sum of all medians."""

    name: str
    median: float
    least: float
    most: float
    share: float


@dataclass(frozen=True)
class LayerTimes:
    """Times of every layer in steps of `batch` full segments, longest first. step: the median of their sums, in ms."""

    library: str
    batch: int
    warm_up: int
    runs: int
    step: float
    layers: tuple[LayerTime, ...]


def chosen(source: Source, engine: str | None, dtype: str | None, head: Head | None, device: int) -> EngineFile:
    """The engine file to look into: the one that was opened by itself, or the best of a bundle that GPU `device` runs.

    engine, dtype, head  which of a bundle; None takes the first that runs, and the head with logits
    Errors: ContractError for names that are none, or not those of the one file; EngineError, with the reason of every
    file, where this machine runs none.
    """
    if engine not in (None, *PACKAGES):
        known = "is another engine" if engine in ENGINES else "is no engine"
        raise ContractError(f"'{engine}' {known}; those that can be looked into are {', '.join(PACKAGES)}")
    files = engine_files.engine_files(source)
    if source.record is not None:
        return _alone(files[0], {"engine": engine, "dtype": dtype, "head": head}, device)
    there = {file.record.engine for file in files}
    names = (engine,) if engine is not None else tuple(name for name in PACKAGES if name in there) or (RTX,)
    refused = []
    for name in names:
        try:
            found = engine_files.runnable(source, name, dtype, device)
        except EngineError as err:
            refused.append(str(err))
            continue
        wanted = head or "all"
        if wanted not in found:
            raise EngineError(
                f"{source.path} has no engine file with head '{wanted}' beside {found['all'].path.name}. Build one: rmt-build "
                f"with --head {wanted}"
            )
        return found[wanted]
    raise EngineError("; ".join(refused))


def _alone(file: EngineFile, wanted: dict[str, str | None], device: int) -> EngineFile:
    for name, value in wanted.items():
        if value not in (None, getattr(file.record, name)):
            raise ContractError(
                f"{file.path} has {name} {getattr(file.record, name)!r}, and {value!r} was asked for. Leave it out"
            )
    reason = engine_files.refusal_of(file, device)
    if reason is not None:
        raise EngineError(f"cannot look into {file.path}: {reason}")
    return file


@contextmanager
def opened(file: EngineFile, source: Source, device: int, batch: int | None = None) -> Iterator[OpenedEngine]:
    """The engine of a file in the GPU's memory while it is open, to be used by this thread alone.

    batch  documents of a step; None takes the number that the engine was tuned for
    Errors: ContractError for a batch that it does not take; otherwise as `LoadedEngine`.
    """
    sizes = file.record.profiles[PROFILE][SEGMENT]
    most = sizes["max"][0]
    if batch is not None and not 1 <= batch <= most:
        raise ContractError(f"a batch of {batch} documents; engine '{file.path.name}' takes 1 to {most}")
    gpu = cuda.Gpu(device)
    engine = None
    try:
        with gpu.current():
            engine = LoadedEngine(gpu, file, source.spec)
            yield OpenedEngine(gpu, engine, file, source.spec, source.initial, batch or sizes["opt"][0])
    except BaseException as err:
        let_go(err)
        raise
    finally:
        with gpu.current():
            if engine is not None:
                engine.release()
            gpu.close()


@dataclass(frozen=True, eq=False)
class OpenedEngine:
    """A loaded engine, and how it is to be stepped."""

    gpu: cuda.Gpu
    engine: LoadedEngine
    file: EngineFile
    spec: StepSpec
    initial: tuple[np.ndarray, ...]
    batch: int

    @property
    def has_inspector(self) -> bool:
        """Whether what loaded the engine can look into it: TensorRT's small runtimes cannot."""
        return hasattr(self.engine.library.trt, "EngineInspector")

    def inspect(self) -> Inspection:
        """What the engine is made of. Nothing is run. Errors: EngineError, with the library's own lines."""
        library, engine, context = self.engine.library, self.engine.engine, self.engine.new_context()
        for name, sizes in self.file.record.profiles[PROFILE].items():
            shape = (self.batch, *sizes["max"][1:])
            library.call(f"takes no '{name}' of shape {shape}", context.set_input_shape, name, shape)
        information = read_information(self._told(engine, context), str(self.file.path))
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return Inspection(
            str(library),
            self.batch,
            engine.profiling_verbosity.name,
            self.engine.memory,
            tuple(_tensor(engine, context, name) for name in names),
            information,
        )

    def _told(self, engine: Any, context: Any) -> str:
        library = self.engine.library
        if not self.has_inspector:
            raise EngineError(
                f"{library} runs engines, and cannot look into them. Install the whole of TensorRT: pip install "
                f"'tensorrt=={self.file.record.version}'"
            )
        inspector = library.call("made no engine inspector", engine.create_engine_inspector)
        # Formats depend on shapes, which an engine leaves open and its context knows.
        library.tell("inspects no context", setattr, inspector, "execution_context", context)
        kind = library.trt.LayerInformationFormat.JSON
        return str(library.call("says nothing of its layers", inspector.get_engine_information, kind))

    def layer_times(self, runs: int, warm_up: int = WARM_UP) -> LayerTimes:
        """Steps full segments of random tokens, one by one, and has the library time every layer: `warm_up` steps that
        do not count, then `runs`. Errors: EngineError, with the library's own lines.

        The library says of profiled runs that they may be slower than others.
        """
        bucket = new_bucket(self.gpu, self.spec, self.batch)
        # What was captured without a profiler tells one nothing.
        replay = self.engine.replay(bucket, "its layers are timed")
        try:
            timed = TimedReplay(replay, self.gpu, profiler_class(replay.library.trt)())
            rows = tuple(np.repeat(value[None], self.batch, axis=0) for value in self.initial)
            enter(self.gpu, self.spec, bucket, device_rows.load(self.gpu, self.spec, rows))
            for block in self._segments(warm_up + runs):
                advance(self.gpu, bucket, timed, block)
            self.gpu.wait()
        finally:
            replay.release()
        return _summary(str(replay.library), self.batch, warm_up, timed.runs[warm_up : warm_up + runs])

    def _segments(self, steps: int) -> Iterator[np.ndarray]:
        """Random tokens in blocks (BLOCK, batch, S), int64, for at least so many steps."""
        random = np.random.default_rng(0)
        allowed = np.setdiff1d(np.arange(self.spec.vocab_size), self.spec.dropped_ids)
        for _ in range(-(-steps // BLOCK)):
            yield random.choice(allowed, (BLOCK, self.batch, self.spec.segment_length))


@dataclass(eq=False)
class TimedReplay:
    """A replay that waits for each step and has its layers' times reported; `runs` are those of each step, by name."""

    replay: ContextReplay
    gpu: cuda.Gpu
    profiler: Any
    runs: list[dict[str, float]] = field(default_factory=list)
    outputs: Outputs = field(init=False)

    def __post_init__(self) -> None:
        context = self.replay.context
        # Asked for after each step, a failure is told by False.
        context.enqueue_emits_profile = False
        context.profiler = self.profiler
        self.outputs = self.replay.outputs

    def run(self, side: int) -> None:
        self.replay.run(side)
        self.gpu.wait()
        self.replay.library.call("timed no layers of a step", self.replay.context.report_to_profiler)
        times: dict[str, float] = {}
        for name, milliseconds in self.profiler.reported:  # a layer may run more than once in a step
            times[name] = times.get(name, 0.0) + milliseconds
        self.profiler.reported.clear()
        self.runs.append(times)


@functools.cache
def profiler_class(trt: Any) -> Any:
    """The class to which a flavour of TensorRT reports times."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # its bindings crash without it
            self.reported: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.reported.append((str(layer_name), float(ms)))

    return Profiler


def _tensor(engine: Any, context: Any, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "mode": engine.get_tensor_mode(name).name,
        "dtype": engine.get_tensor_dtype(name).name,
        "shape": list(engine.get_tensor_shape(name)),
        "stepped": list(context.get_tensor_shape(name)),
        "format": str(engine.get_tensor_format_desc(name)),
        "layout": engine.get_tensor_format(name).name,
        "location": engine.get_tensor_location(name).name,
    }


def _summary(library: str, batch: int, warm_up: int, runs: list[dict[str, float]]) -> LayerTimes:
    names = list(dict.fromkeys(name for run in runs for name in run))
    if not names:
        raise EngineError(f"{library} timed no layers: it reported nothing in {len(runs)} steps")
    times = {name: [run.get(name, 0.0) for run in runs] for name in names}
    medians = {name: statistics.median(values) for name, values in times.items()}
    total = sum(medians.values()) or 1.0
    layers = [
        LayerTime(name, medians[name], min(times[name]), max(times[name]), medians[name] / total) for name in names
    ]
    layers.sort(key=lambda layer: -layer.median)
    return LayerTimes(
        library, batch, warm_up, len(runs), statistics.median(sum(run.values()) for run in runs), tuple(layers)
    )
