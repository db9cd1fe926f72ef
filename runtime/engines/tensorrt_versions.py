"""In what the flavours and versions of TensorRT differ where an engine is run: names, and what only TensorRT-RTX has.

`tensorrt`, `tensorrt_lean` and `tensorrt_dispatch` from 10.14 on, and `tensorrt_rtx` from 1.4 on, share what
`tensorrt_contexts.py` uses. What 10.x also has under older names (`device_memory_size`, stream readers without `seek`)
is not used. Enums are used by name: their numbers differ.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rmt_trt.errors import EngineError
from rmt_trt.runtime.engines.tensorrt_log import logger, one_line

PROFILE = 0
READ_BYTES = 64 << 20  # of an engine file that lie in host memory at a time, at most


@dataclass(frozen=True)
class Library:
    """A flavour's module, what it calls itself, and whether it is TensorRT-RTX."""

    trt: Any
    title: str
    rtx: bool

    def call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """What a call gives. The library says by None, False or an exception that it failed, and why in its log.

        Errors: EngineError, with `what` it did not do and the library's own lines.
        """
        with logger(self.trt).capture() as lines:
            try:
                value = function(*args)
            except (RuntimeError, TypeError, ValueError) as err:  # what its bindings raise
                raise EngineError(f"{self} {what}: {one_line([*lines, str(err)])}") from err
        if value is None or value is False:
            raise EngineError(f"{self} {what}: {one_line(lines)}")
        return value

    def tell(self, what: str, function: Callable[..., Any], *args: Any) -> None:
        """A call that gives nothing, and says in the log alone that it failed. Errors: as `call`."""

        def told() -> bool:
            with logger(self.trt).capture() as lines:
                function(*args)
            return not lines

        self.call(what, told)

    def __str__(self) -> str:
        return f"{self.title} {self.trt.__version__}"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a GPU's memory that an engine takes: its weights, and intermediate values at its largest batch."""

    weights: int
    activations: int


def load(library: Library, path: Path, trusted: bool) -> tuple[Any, Any]:
    """(runtime, engine) of an engine file. It is read in pieces that go to the GPU one by one.

    trusted  a version-compatible engine carries code of its own, which is run
    Errors: EngineError, with the library's own lines.
    """
    log = logger(library.trt)
    runtime = library.call("did not start", library.trt.Runtime, log)
    if trusted:
        runtime.engine_host_code_allowed = True
    with path.open("rb") as file:
        reader = library.call("did not start", _file_reader(library.trt), file)
        try:
            engine = library.call(f"cannot load {path}", runtime.deserialize_cuda_engine, reader)
        except EngineError as err:
            if reader.failure:
                raise EngineError(f"{library} cannot load {path}: {reader.failure}") from err
            raise
    return runtime, engine


@functools.cache
def _file_reader(trt: Any) -> Any:
    """The class that hands an engine file to a flavour of TensorRT."""
    whence = {trt.SeekPosition.SET: os.SEEK_SET, trt.SeekPosition.CUR: os.SEEK_CUR, trt.SeekPosition.END: os.SEEK_END}

    class FileReader(trt.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self, file: BinaryIO) -> None:
            trt.IStreamReaderV2.__init__(self)  # its bindings crash without it
            self.file = file
            self.failure = ""

        # The library prints what is raised in here and goes on, so it is kept.
        def read(self, num_bytes: int, stream: int) -> bytes:
            try:
                return self.file.read(min(num_bytes, READ_BYTES))
            except OSError as err:
                self.failure = str(err)
                return b""

        def seek(self, offset: int, where: Any) -> bool:
            try:
                self.file.seek(offset, whence[where])
            except (OSError, ValueError) as err:
                self.failure = str(err)
            return not self.failure

    return FileReader


def device_memory(library: Library, engine: Any) -> DeviceMemory:
    weights = library.call(
        "cannot say its weights' size", engine.get_engine_stat, library.trt.EngineStat.TOTAL_WEIGHTS_SIZE
    )
    size = library.call("cannot say its memory", engine.get_device_memory_size_for_profile_v2, PROFILE)
    return DeviceMemory(int(weights), int(size))


def settings(library: Library, engine: Any) -> Any:
    """TensorRT-RTX's runtime settings, None elsewhere.

    Kernels are compiled for a context's shapes when it first runs them: ours keep their shapes, and a kernel that came
    later would not be in a graph that was captured before. CUDA graphs are captured by us, not by the library: it has one
    for a context, and ours go from memory A to B and from B to A.
    """
    if not library.rtx:
        return None
    trt = library.trt
    config = library.call("has no runtime settings", engine.create_runtime_config)
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
    return config


def new_context(library: Library, engine: Any, config: Any) -> Any:
    """A context without memory for intermediate values: contexts that run one after another share theirs."""
    how = library.trt.ExecutionContextAllocationStrategy.USER_MANAGED if config is None else config
    context = library.call("made no execution context", engine.create_execution_context, how)
    # What an engine keeps of its layers for the inspector would be told to profilers in every run, which takes time.
    verbosity = library.trt.ProfilingVerbosity
    if engine.profiling_verbosity == verbosity.DETAILED:
        context.nvtx_verbosity = verbosity.LAYER_NAMES_ONLY
    return context


def not_capturable(library: Library, engine: Any, context: Any, stream: int) -> str | None:
    """Why a context's runs cannot be captured as a CUDA graph, or None."""
    if engine.streamable_weights_size > 0:
        return "its weights are streamed"
    if library.rtx and not context.is_stream_capturable(stream):
        return f"{library} cannot have this engine captured"
    return None
