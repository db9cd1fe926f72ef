"""Network -> serialized engine: one build with its options, its progress and its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmt_trt.contract import StepSpec
from rmt_trt.errors import EngineError, FormatError
from rmt_trt.export.tensorrt import flavours
from rmt_trt.export.tensorrt.flavours import Flavour
from rmt_trt.export.tensorrt.network import allow_decomposition, check_network, read_network
from rmt_trt.export.tensorrt.options import BuildOptions
from rmt_trt.export.tensorrt.profiles import Range, add_profile, ranges
from rmt_trt.export.tensorrt.progress import Share, interruptible, monitor
from rmt_trt.files import read_bounded, write_file
from rmt_trt.runtime.engines.tensorrt_log import logger, one_line

MIB = 1 << 20
CACHE_LIMIT = 1 << 30
# The library has one logger for all builds of a process, so two at a time would mix their lines.
_one_build = threading.Lock()


@dataclass(frozen=True, eq=False)
class Plan:
    """A serialized engine. capabilities: 89 is 8.9. tensors: the tables "inputs" and "outputs". decomposable: names of
    the attention nodes that the builder may make of several kernels. seconds: of the build itself."""

    data: Any
    version: str
    capabilities: tuple[int, ...]
    profile: dict[str, Range]
    tensors: dict[str, list[dict[str, Any]]]
    decomposable: tuple[str, ...]
    seconds: float


def build_plan(
    graph: Path,
    spec: StepSpec,
    flavour: Flavour,
    options: BuildOptions,
    progress: Share = lambda done, total: None,
) -> Plan:
    """Compiles a graph, in a thread of its own: Ctrl-C stops the build and is raised when it has stopped.

    progress: called with (done, total), from that thread

    Errors: EngineError, when the library is missing, too old, or cannot build the graph (its own lines are in the
    message); FormatError for a graph that its parser does not read; ContractError for one that does not fit the spec.
    """
    trt = flavours.library(flavour)
    wanted = flavours.capabilities(flavour, trt, options)
    stop = threading.Event()

    def work() -> Plan:
        with _one_build:
            flavours.prepare(flavour, options)
            return _build(trt, graph, spec, flavour, options, wanted, monitor(trt, progress, stop))

    return interruptible(work, stop)


def _build(
    trt: Any,
    graph: Path,
    spec: StepSpec,
    flavour: Flavour,
    options: BuildOptions,
    wanted: tuple[int, ...],
    watch: Any,
) -> Plan:
    title = f"{flavour.title} {trt.__version__}"
    log = logger(trt)
    builder = _called(lambda: trt.Builder(log), log, f"{title} cannot start a builder")
    network, parser = read_network(trt, builder, log, graph, title)
    tensors = check_network(trt, network, spec, graph.name)
    decomposable = allow_decomposition(trt, network)
    profile = ranges(spec, options.max_batch)
    config = builder.create_builder_config()
    config.progress_monitor = watch
    flavours.target(flavour, trt, config, wanted)
    _configure(trt, config, options)
    cache = _timing_cache(config, options.timing_cache)
    add_profile(builder, config, profile)
    started = time.perf_counter()
    data = _called(
        lambda: builder.build_serialized_network(network, config),
        log,
        f"{title} cannot build '{graph.name}' for {flavours.dotted(wanted)}",
    )
    seconds = time.perf_counter() - started
    del parser  # it owns the weights that the network reads, so it lives until here
    if cache is not None and options.timing_cache is not None:
        write_file(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    return Plan(data, str(trt.__version__), wanted, profile, tensors, decomposable, seconds)


def _called(call: Callable[[], Any], log: Any, what: str) -> Any:
    """What a call of the library gives. It reports failure by None or by an exception, and says why in the log."""
    with log.capture() as lines:
        try:
            value = call()
        except (RuntimeError, TypeError, ValueError) as err:  # what its bindings raise
            raise EngineError(f"{what}: {one_line([*lines, str(err)])}") from err
        if value is None:
            raise EngineError(f"{what}: {one_line(lines)}")
    return value


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    # On by default: products of float32 would keep 10 bits of a number, and drift beyond what fp32 is held to.
    config.clear_flag(trt.BuilderFlag.TF32)
    # For the inspector (rmt-info --layers). With TensorRT-RTX 1.7.1 it costs nothing: engines of a BERT-base in fp16 and fp32
    # and of a GPT-2 small in fp16 came out as large to the byte, since the details are in them anyway. A run does not tell
    # them to profilers (runtime/engines/tensorrt_versions.py).
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _timing_cache(config: Any, path: Path | None) -> Any:
    """The cache of a file, or a new one; None without a path. Errors: FormatError for a file of another kind or GPU."""
    if path is None:
        return None
    known = read_bounded(path, CACHE_LIMIT, "a timing cache of TensorRT") if path.exists() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        raise FormatError(f"{path} is no timing cache of this TensorRT and this GPU. Give another name, or remove it")
    return cache
