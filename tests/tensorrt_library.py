"""The names of TensorRT that the engine uses, over a GPU of host memory: as strict as the library is, or stricter.

What the library refuses by None or False is refused so, with a line in its log. `OFFERED` lists every name that stands
here, and a test compares it with the real library.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import threading
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from tensorrt_world import Graph, Severity, Step, World

from rmt_trt.runtime import cuda

MAGIC = b"a stand-in for an engine\n"
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}
NAMES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}
WEIGHTS, ACTIVATIONS = 3 << 20, 64 << 10
HEADER = 64


class DataType(enum.Enum):
    FLOAT, HALF, INT64 = range(3)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class SeekPosition(enum.Enum):
    SET, CUR, END = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY, DETAILED, NONE = range(3)


class EngineStat(enum.Enum):
    TOTAL_WEIGHTS_SIZE, STRIPPED_WEIGHTS_SIZE = range(2)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class EngineValidity(enum.Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(enum.IntFlag):
    VERSION_MISMATCH = 1


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        self.made = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IStreamReaderV2:
    def __init__(self) -> None:
        self.made = True

    def read(self, num_bytes: int, stream: int) -> bytes:
        raise NotImplementedError

    def seek(self, offset: int, where: SeekPosition) -> bool:
        raise NotImplementedError


class Owned:
    """An object of the library: alive until nobody holds it, and for one thread."""

    kind = ""

    def __init__(self, world: World, of: Owned | None = None) -> None:
        self._world, self._thread = world, threading.get_ident()
        self._key, self._of = object(), None if of is None else of._key
        world.alive.add(self)

    def _mine(self) -> None:
        self._world.same_thread(self._thread)

    def _gone(self) -> None:
        """Notes what was made of this one and should have been released before it."""
        self._world.alive.discard(self)
        self._world.released.append(self.kind)
        if any(one._of is self._key for one in self._world.live(Owned)):
            self._world.violations.append(f"a {self.kind} is released before what was made of it")


class Runtime(Owned):
    """engine_host_code_allowed  must be set for an engine with code of its own"""

    def __init__(self, world: World, log: Any) -> None:
        super().__init__(world)
        assert isinstance(log, ILogger), "a logger of another flavour"
        assert log.made, "a logger whose base was not initialised"
        world.logger = world.logger or log  # the first one stays
        self.engine_host_code_allowed = False

    kind, engine_header_size = "Runtime", HEADER

    def get_engine_validity(self, header: bytes) -> tuple[EngineValidity, int]:
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, stream_reader_v2: Any) -> Any:
        self._mine()
        if self._world.fails("deserialize_cuda_engine"):
            return None
        assert isinstance(stream_reader_v2, IStreamReaderV2), "an engine file held in memory as a whole"
        assert stream_reader_v2.made, "a reader whose base was not initialised"
        read = functools.partial(_read, stream_reader_v2)
        if read(len(MAGIC)) != MAGIC or not stream_reader_v2.seek(0, SeekPosition.SET) or read(len(MAGIC)) != MAGIC:
            self._world.say("ERROR", "stand-in: the magic tag of the file is wrong")
            return None
        size = int.from_bytes(read(8), "little")
        told = read(size)
        if len(told) < size:
            self._world.say("ERROR", "stand-in: the file ends too early")
            return None
        file = json.loads(told)
        if file["host_code"] and not self.engine_host_code_allowed:
            self._world.say("ERROR", "stand-in: the engine has code of its own, which was not allowed")
            return None
        return (RtxCudaEngine if file["rtx"] else ICudaEngine)(self, file)

    def __del__(self) -> None:
        self._gone()


def _read(reader: Any, count: int) -> bytes:
    """So many bytes, asked for until they are there or nothing more comes."""
    found = b""
    while len(found) < count:
        piece = bytes(reader.read(count - len(found), 0))
        if not piece:
            break
        found += piece
    return found


class ICudaEngine(Owned):
    kind = "ICudaEngine"

    def __init__(self, runtime: Runtime, file: dict[str, Any]) -> None:
        world = runtime._world
        super().__init__(world, runtime)
        self._file = {**file, **world.flaws.get("engine", {})}
        self._tables = {table["name"]: table for kind in ("inputs", "outputs") for table in self._file[kind]}
        self.num_io_tensors = len(self._tables)
        self.streamable_weights_size = world.flaws.get("streamable_weights_size", 0)
        self.profiling_verbosity = ProfilingVerbosity[world.flaws.get("profiling_verbosity", "DETAILED")]

    def get_tensor_name(self, index: int) -> str:
        return list(self._tables)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self._tables[name] in self._file["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[NAMES[self._tables[name]["dtype"]]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> Iterator[int]:
        return iter(self._tables[name]["shape"])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        assert profile_index == 0, "the one profile is number 0"
        sizes = self._file["profile"][name]
        return [list(sizes[kind]) for kind in ("min", "opt", "max")]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        assert profile_index == 0, "the one profile is number 0"
        return int(self._world.flaws.get("activations", ACTIVATIONS))

    def get_engine_stat(self, stat: EngineStat) -> int:
        assert stat is EngineStat.TOTAL_WEIGHTS_SIZE
        return WEIGHTS

    def create_execution_context(self, how: Any) -> Any:
        self._mine()
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED, "memory for each context by itself"
        return self._context(IExecutionContext)

    def _context(self, kind: Any) -> Any:
        return None if self._world.fails("create_execution_context") else kind(self)

    def __del__(self) -> None:
        self._gone()


class IExecutionContext(Owned):
    kind = "IExecutionContext"

    def __init__(self, engine: ICudaEngine) -> None:
        super().__init__(engine._world, engine)
        self._file, self._tables = engine._file, engine._tables
        self._engine = weakref.ref(engine)
        self._mode = {name: engine.get_tensor_mode(name) for name in self._tables}
        self._needs = engine.get_device_memory_size_for_profile_v2(0)
        self.nvtx_verbosity = engine.profiling_verbosity
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._runs: dict[int, int] = {}  # plain runs with these shapes: by stream, how often that was synced before

    def set_device_memory(self, memory: int, size: int) -> None:
        if self._world.fails("set_device_memory"):
            return
        self._scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._used()
        if self._world.fails("set_input_shape"):
            return False
        if self._mode.get(name) is not TensorIOMode.INPUT:
            return self._says(f"'{name}' is no input")
        sizes = self._file["profile"][name]
        within = len(shape) == len(sizes["min"]) and all(
            low <= size <= high for low, size, high in zip(sizes["min"], shape, sizes["max"], strict=True)
        )
        if not within:
            return self._says(f"'{name}' of shape {shape} is outside the profile, {sizes}")
        self._shapes[name] = tuple(shape)
        self._runs.clear()
        return True

    def infer_shapes(self) -> list[str]:
        if self._world.fails("infer_shapes"):
            raise RuntimeError("infer_shapes error code: -1")
        return [name for name, mode in self._mode.items() if mode is TensorIOMode.INPUT and name not in self._shapes]

    def get_tensor_shape(self, name: str) -> list[int]:
        if name in self._shapes:
            return list(self._shapes[name])
        batch, text = self._shapes["segment"]
        free = iter((batch, text))
        return [next(free) if size == -1 else size for size in self._tables[name]["shape"]]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._used()
        if self._world.fails("set_tensor_address"):
            return False
        if name not in self._tables:
            return self._says(f"there is no tensor '{name}'")
        if memory == 0 or memory % cuda.ALIGNMENT:
            return self._says(f"address {memory:#x} of '{name}' is not aligned to {cuda.ALIGNMENT} bytes")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._used()
        if self._world.fails("execute_async_v3"):
            return False
        stream = self._world.stream(stream_handle)
        if self.nvtx_verbosity is ProfilingVerbosity.DETAILED:
            self._world.refuse("a run spends time on telling profilers the details of layers")
        missing = [*self.infer_shapes(), *(name for name in self._tables if name not in self._addresses)]
        if missing:
            return self._says(f"shape or address was not set of {sorted(set(missing))}")
        step = Step(self, self._places(), self._memory())
        if stream.capture is not None:
            self._warm(stream)
            stream.capture.steps.append(step)
            return True
        self._world.enqueued += 1
        self._runs[stream_handle] = stream.synced
        stream.do(step.ready())
        return True

    def _places(self) -> dict[str, Any]:
        """Where each tensor lies. What is written must lie apart from what is read."""
        places: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for name in self._tables:
            dtype, shape = NUMPY[NAMES[self._tables[name]["dtype"]]], tuple(self.get_tensor_shape(name))
            nbytes = math.prod(shape) * np.dtype(dtype).itemsize
            spans[name] = (self._addresses[name], self._addresses[name] + nbytes)
            places[name] = (*self._world.place(self._addresses[name], nbytes), shape, dtype)
        spans["scratch"] = (self._scratch[0], sum(self._scratch))
        for written, (start, stop) in spans.items():
            for name, (low, high) in spans.items():
                apart = name == written or self._mode.get(written) is TensorIOMode.INPUT or stop <= low or high <= start
                if not apart and self._mode.get(name) is TensorIOMode.INPUT:
                    self._world.refuse(f"'{written}' lies where '{name}' is read from")
        return places

    def _memory(self) -> Any:
        address, size = self._scratch
        if size < self._needs or address % cuda.ALIGNMENT:
            self._world.refuse(f"a context needs {self._needs} bytes of memory, and was given {size} at {address:#x}")
        if not size:
            address = next(iter(self._addresses.values()))
        return (*self._world.place(address, size), (size,), np.uint8)

    def _warm(self, stream: Any) -> None:
        """Before a capture comes a plain run with these shapes, and a wait for it."""
        synced = self._runs.get(stream.handle)
        if synced is None:
            self._world.refuse("a context is captured before it ran once")
        elif stream.synced <= synced:
            self._world.refuse("a context is captured while its first run may be under way")

    def _used(self) -> None:
        self._mine()
        if self._engine() is None:
            self._world.refuse("a context is used after its engine was released")

    def _says(self, message: str) -> bool:
        self._world.say("ERROR", f"stand-in: {message}")
        return False

    def __del__(self) -> None:
        for graph in self._world.live(Graph):
            if any(step.context() in (None, self) for step in graph.steps):
                self._world.violations.append("a context is released before what was captured of it")
        if self._world.under_way[self._key]:
            self._world.violations.append("a context is released while a step of it is under way")
        self._gone()


# --- What only TensorRT-RTX has.


class RtxCudaEngine(ICudaEngine):
    def create_runtime_config(self) -> Any:
        return None if self._world.fails("create_runtime_config") else IRuntimeConfig(self._world)

    def create_execution_context(self, how: Any) -> Any:
        self._mine()
        assert isinstance(how, IRuntimeConfig), "a context without runtime settings"
        assert how.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if self._world.flaws.get("own_cuda_graphs") is None:
            assert how.cuda_graph_strategy is CudaGraphStrategy.DISABLED, "two capture the same work"
        context = self._context(RtxExecutionContext)
        if context is not None:
            context._settings = how
        return context


class RtxExecutionContext(IExecutionContext):
    _settings: IRuntimeConfig

    def is_stream_capturable(self, stream: int) -> bool:
        self._world.stream(stream)
        return bool(self._world.flaws.get("capturable", True))

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._world.stream(stream_handle).capture is not None:
            how = self._settings.dynamic_shapes_kernel_specialization_strategy
            if how is DynamicShapesKernelSpecializationStrategy.LAZY:
                self._world.refuse("kernels that come later are not in a graph that is captured now")
        cache = self._settings.cache
        if cache is not None:
            kernel = f"{self._file['head']}{self._shapes.get('segment')}"
            if kernel not in cache.kernels:
                cache.kernels.append(kernel)
                self._world.compiled.add(kernel)
        return super().execute_async_v3(stream_handle)


class IRuntimeConfig:
    def __init__(self, world: World) -> None:
        self._world = world
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return None if self._world.fails("create_runtime_cache") else IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        if self._world.fails("set_runtime_cache"):
            return False
        self.cache = cache
        return True


class IRuntimeCache:
    MAGIC = b"kernels:"

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def serialize(self) -> bytes:
        return self.MAGIC + json.dumps(self.kernels).encode()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.MAGIC):
            return False
        self.kernels = json.loads(blob[len(self.MAGIC) :])
        return True


COMMON: dict[str, tuple[str, ...]] = {
    "ILogger": ("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE", "log"),
    "Runtime": ("engine_host_code_allowed", "deserialize_cuda_engine"),
    "IStreamReaderV2": ("read", "seek"),
    "ICudaEngine": (
        "num_io_tensors", "streamable_weights_size", "profiling_verbosity", "get_tensor_name", "get_tensor_mode",
        "get_tensor_dtype", "get_tensor_location", "get_tensor_shape", "get_tensor_profile_shape",
        "get_device_memory_size_for_profile_v2", "get_engine_stat", "create_execution_context",
    ),
    "IExecutionContext": (
        "nvtx_verbosity", "set_device_memory", "set_input_shape", "infer_shapes", "get_tensor_shape", "set_tensor_address",
        "execute_async_v3",
    ),
    "DataType": ("FLOAT", "HALF", "INT64"),
    "TensorIOMode": ("NONE", "INPUT", "OUTPUT"),
    "TensorLocation": ("DEVICE", "HOST"),
    "SeekPosition": ("SET", "CUR", "END"),
    "ExecutionContextAllocationStrategy": ("STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"),
    "ProfilingVerbosity": ("LAYER_NAMES_ONLY", "DETAILED", "NONE"),
    "EngineStat": ("TOTAL_WEIGHTS_SIZE", "STRIPPED_WEIGHTS_SIZE"),
}  # fmt: skip
RTX_ONLY: dict[str, tuple[str, ...]] = {
    "Runtime": ("engine_header_size", "get_engine_validity"),
    "ICudaEngine": ("create_runtime_config",),
    "IExecutionContext": ("is_stream_capturable",),
    "IRuntimeConfig": (
        "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy",
        "set_execution_context_allocation_strategy", "create_runtime_cache", "set_runtime_cache",
    ),
    "IRuntimeCache": ("serialize", "deserialize"),
    "CudaGraphStrategy": ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
    "DynamicShapesKernelSpecializationStrategy": ("LAZY", "EAGER", "NONE"),
    "EngineValidity": ("VALID", "SUBOPTIMAL", "INVALID"),
    "EngineInvalidityDiagnostics": ("VERSION_MISMATCH",),
}  # fmt: skip
# Every name that stands here: by flavour, class and member.
OFFERED = {
    "tensorrt": COMMON,
    "tensorrt_rtx": {name: COMMON.get(name, ()) + RTX_ONLY.get(name, ()) for name in {**COMMON, **RTX_ONLY}},
}


def library(world: World, name: str, version: str) -> ModuleType:
    """A flavour's module with the names of `OFFERED` and no other."""
    module = ModuleType(name)
    offered = OFFERED["tensorrt_rtx" if name == "tensorrt_rtx" else "tensorrt"]
    module.__dict__.update({kind: globals()[kind] for kind in offered}, __version__=version)
    module.__dict__["Runtime"] = functools.partial(Runtime, world)
    return module
