"""An engine in a GPU's memory, and its contexts on the buckets: what runs a step.

On each bucket an engine has a context of its own, whose shapes are set once; so what is captured of it stays true. All
contexts of an engine share one piece of memory for intermediate values: they run one after another on one stream.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import traceback
from dataclasses import dataclass, field
from typing import Any

from rmt_trt.contract import LOGITS, SEGMENT, StepSpec
from rmt_trt.engine_check import tensors
from rmt_trt.engine_record import EngineRecord
from rmt_trt.errors import EngineError, FormatError
from rmt_trt.runtime import machine
from rmt_trt.runtime.buckets import Bucket
from rmt_trt.runtime.cuda import Gpu
from rmt_trt.runtime.device_rows import LOGIT_BYTES
from rmt_trt.runtime.engine_files import EngineFile, package_of, read_checked
from rmt_trt.runtime.engines import tensorrt_versions
from rmt_trt.runtime.engines.tensorrt_cache import KernelCache, cache_path
from rmt_trt.runtime.engines.tensorrt_versions import PROFILE, Library

MIB = 1 << 20
Outputs = dict[str, tuple[Any, tuple[int, ...]]]  # buffer and shape by name
log = logging.getLogger("rmt_trt")


@dataclass(eq=False)
class ContextReplay:
    """A context on a bucket's memory, from A to B and back; `graphs` are both, captured, where that is possible."""

    library: Library
    context: Any
    gpu: Gpu
    addresses: tuple[dict[str, int], ...] = ()
    outputs: Outputs = field(default_factory=dict)
    graphs: tuple[Any, ...] = ()

    @property
    def stream(self) -> Any:
        return self.gpu.stream

    def run(self, side: int) -> None:
        if self.graphs:
            self.graphs[side].launch(self.stream)
        else:
            self.enqueue(side)

    def enqueue(self, side: int) -> None:
        """A step that is not replayed. Errors: EngineError, with the library's own lines."""
        for name, address in self.addresses[side].items():
            self.library.call(f"takes no address for '{name}'", self.context.set_tensor_address, name, address)
        self.library.call("did not enqueue a step", self.context.execute_async_v3, int(self.stream.handle))

    def capture(self, refused: str | None) -> None:
        """Runs both directions once on what lies in A and B, which is nobody's, and captures them.

        refused  why they cannot be captured: then they are enqueued one by one
        """
        for side in (0, 1):
            self.enqueue(side)
        self.gpu.wait()
        if refused is not None:
            log.info("steps are enqueued one by one, not replayed from a CUDA graph: %s", refused)
            return
        try:
            self.graphs = tuple(self.gpu.captured(functools.partial(self.enqueue, side)) for side in (0, 1))
        except EngineError as err:  # it runs all the same, with more work for the CPU
            self.gpu.wait()
            log.warning("steps are enqueued one by one, not replayed from a CUDA graph: %s", err)

    def release(self) -> None:
        """Graphs go before the context whose work they hold, and both after what was enqueued, also where that failed."""
        with contextlib.suppress(EngineError):
            self.gpu.wait()
        for graph in self.graphs:
            graph.close()
        self.graphs = ()
        self.context = None


class LoadedEngine:
    """An engine file in a GPU's memory.

    memory  bytes of weights and of intermediate values

    Errors: FormatError for a file that was altered or is not what its record says; EngineError, with the library's own
    lines, where it cannot be loaded.
    """

    def __init__(self, gpu: Gpu, file: EngineFile, spec: StepSpec) -> None:
        self._gpu, self._spec, self._file = gpu, spec, file
        package = package_of(file)
        trt = machine.module(package.module, package.extra, f"{file.path}")
        self._library = Library(trt, package.title, file.record.engine == "tensorrt-rtx")
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._kernels: KernelCache | None = None
        self._workspace: Any = None
        path = read_checked(file)
        try:
            trusted = file.record.version_compatible
            self._runtime, self._engine = tensorrt_versions.load(self._library, path, trusted)
            check_tensors(trt, self._engine, file, spec)
            self.memory = tensorrt_versions.device_memory(self._library, self._engine)
            self._config = tensorrt_versions.settings(self._library, self._engine)
            if self._config is not None:
                self._kernels = self._cached(file.record)
            if self.memory.activations:
                self._workspace = gpu.allocate(self.memory.activations)
        except BaseException as err:
            let_go(err)
            self.release()
            raise
        log.info(
            "%s on GPU %d: %.1f MiB of weights, %.1f MiB for intermediate values",
            path.name, gpu.index, self.memory.weights / MIB, self.memory.activations / MIB,
        )  # fmt: skip

    @property
    def library(self) -> Library:
        return self._library

    @property
    def engine(self) -> Any:
        """The library's own, until `release`."""
        return self._engine

    def new_context(self) -> Any:
        """A context without shapes or memory; it goes before `release`."""
        return tensorrt_versions.new_context(self._library, self._engine, self._config)

    def replay(self, bucket: Bucket, plain: str | None = None) -> ContextReplay:
        """A context for a bucket's size, bound to its memory, run once and captured. plain: why it is not captured."""
        context = self.new_context()
        made = ContextReplay(self._library, context, self._gpu)
        del context
        try:
            self._prepare(made, bucket, plain)
        except BaseException as err:
            let_go(err)
            made.release()
            raise
        if self._kernels is not None:
            self._kernels.save()
        return made

    def release(self) -> None:
        """Lets go of it all, after every context was released: the engine before its runtime, the memory last."""
        self._kernels = None
        self._config = None
        self._engine = None
        self._runtime = None
        self._workspace = None

    def _cached(self, record: EngineRecord) -> KernelCache:
        driver = ".".join(map(str, machine.driver_cuda()))
        path = cache_path(machine.gpu_name(self._gpu.index), driver, str(self._library.trt.__version__), record.sha256)
        return KernelCache(self._library, self._config, path)

    def _prepare(self, made: ContextReplay, bucket: Bucket, plain: str | None) -> None:
        library, spec = self._library, self._spec
        if self._workspace is not None:
            address, size = int(self._workspace.handle), self.memory.activations
            library.tell("takes no memory for intermediate values", made.context.set_device_memory, address, size)
        shapes: dict[str, tuple[int, ...]] = {state.input: (bucket.size, *state.shape) for state in spec.states}
        shapes[SEGMENT] = (bucket.size, spec.segment_length)
        for name, shape in shapes.items():
            library.call(f"takes no '{name}' of shape {shape}", made.context.set_input_shape, name, shape)
        made.outputs = self._outputs(made, bucket)
        made.addresses = (_addresses(spec, bucket, 0, made.outputs), _addresses(spec, bucket, 1, made.outputs))
        stream = int(self._gpu.stream.handle)
        refused = plain or tensorrt_versions.not_capturable(library, self._engine, made.context, stream)
        made.capture(refused)

    def _outputs(self, made: ContextReplay, bucket: Bucket) -> Outputs:
        """Memory for the outputs beside the states, after the context was asked for the shapes of all that it gives."""
        missing = self._library.call("does not know its shapes", made.context.infer_shapes)
        if missing:
            raise EngineError(f"{self._library} wants more than its inputs' shapes for {', '.join(missing)}")
        shapes: dict[str, tuple[int, ...]] = {s.output: (bucket.size, *s.shape) for s in self._spec.states}
        if self._file.record.head == "all":
            text = (self._spec.segment_length,) if self._spec.logits == "lm" else ()
            shapes[LOGITS] = (bucket.size, *text, self._spec.num_logits)
        for name, shape in shapes.items():
            found = tuple(made.context.get_tensor_shape(name))
            if found != shape:
                raise FormatError(
                    f"{self._file.path}: the engine gives '{name}' of shape {found} for {bucket.size} documents; its step spec "
                    f"says {shape}. Build the engine again"
                )
        wanted = [(name, shape) for name, shape in shapes.items() if name == LOGITS]
        return {name: (self._gpu.allocate(LOGIT_BYTES * math.prod(shape)), shape) for name, shape in wanted}


def let_go(err: BaseException | None) -> None:
    """Clears the local variables of the calls that failed. They hold parts of the engine, which would otherwise lie in the
    GPU's memory for as long as somebody keeps the error, and outlive what they stand on."""
    while err is not None:
        traceback.clear_frames(err.__traceback__)
        err = err.__cause__ or err.__context__


def _addresses(spec: StepSpec, bucket: Bucket, side: int, outputs: Outputs) -> dict[str, int]:
    """Where every tensor lies for a step from A to B (side 0), or back: what is read is never what is written."""
    found = {SEGMENT: int(bucket.tokens[side].handle)}
    for state, source, target in zip(spec.states, bucket.sides[side], bucket.sides[1 - side], strict=True):
        found[state.input], found[state.output] = int(source.handle), int(target.handle)
    return found | {name: int(buffer.handle) for name, (buffer, _) in outputs.items()}


def check_tensors(trt: Any, engine: Any, file: EngineFile, spec: StepSpec) -> None:
    """Compares the tensors of an engine, and the sizes that it takes, with the spec and its record: memory is allocated
    by those. Errors: FormatError."""
    inputs, outputs = tensors(spec, file.record.head)
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if sorted(names) != sorted({**inputs, **outputs}):
        raise FormatError(
            f"{file.path}: the engine has the tensors {sorted(names)}; its record says {sorted({**inputs, **outputs})}. Build "
            f"the engine again"
        )
    dtypes = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "int64": trt.DataType.INT64}
    for wanted, mode in ((inputs, trt.TensorIOMode.INPUT), (outputs, trt.TensorIOMode.OUTPUT)):
        for name, (dtype, axes) in wanted.items():
            shape = tuple(engine.get_tensor_shape(name))
            fits = len(shape) == len(axes) and all(size in sizes for size, sizes in zip(shape, axes, strict=True))
            alike = (engine.get_tensor_mode(name), engine.get_tensor_dtype(name)) == (mode, dtypes[dtype])
            if not fits or not alike or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise FormatError(
                    f"{file.path}: the engine's '{name}' is {engine.get_tensor_dtype(name)} of shape {shape}; its record says "
                    f"{dtype}. Build the engine again"
                )
    for name, sizes in file.record.profiles[PROFILE].items():
        found = [list(shape) for shape in engine.get_tensor_profile_shape(name, PROFILE)]
        if found != [sizes["min"], sizes["opt"], sizes["max"]]:
            raise FormatError(
                f"{file.path}: the engine takes {found} for '{name}'; its record says {sizes}. Build the engine again"
            )
