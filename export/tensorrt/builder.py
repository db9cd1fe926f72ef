"""Network -> serialized engine: one build with its options, its progress and its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmt_trt.contract import Head, StepSpec
from rmt_trt.errors import EngineError, FormatError
from rmt_trt.export.tensorrt import flavours
from rmt_trt.export.tensorrt.flavours import Flavour
from rmt_trt.export.tensorrt.network import Attention, attention_of, check_network, read_network, take_head
from rmt_trt.export.tensorrt.options import BuildOptions
from rmt_trt.export.tensorrt.profiles import Range, add_profile, ranges
from rmt_trt.export.tensorrt.progress import Share, interruptible, monitor
from rmt_trt.files import read_bounded, write_file
from rmt_trt.runtime.engine_fit import dotted
from rmt_trt.runtime.engines.tensorrt_log import logger, one_line

MIB = 1 << 20
CACHE_LIMIT = 1 << 30
# What the builder says of attention that it has no single kernel for, unless it may take it apart.
NO_KERNEL = "decompos"
NO_MEMORY = ("outofmemory", "out of memory", "memory pool", "workspace")
# The library has one logger for all builds of a process, so two at a time would mix their lines.
_one_build = threading.Lock()


@dataclass(frozen=True, eq=False)
class Plan:
    """A serialized engine. capabilities: 89 is 8.9. tensors: the tables "inputs" and "outputs".

    whole         names of attention nodes of the graph that are one kernel each
    decomposable  names of those that the builder may have made of several kernels
    joined        kernels in which it joined attention, from nodes or from products and softmax; None is not known
    seconds       of the build itself
    """

    data: Any
    version: str
    capabilities: tuple[int, ...]
    head: Head
    profile: dict[str, Range]
    tensors: dict[str, list[dict[str, Any]]]
    whole: tuple[str, ...]
    decomposable: tuple[str, ...]
    joined: int | None
    seconds: float


def build_plan(
    graph: Path,
    spec: StepSpec,
    flavour: Flavour,
    options: BuildOptions,
    head: Head = "all",
    graph_head: Head = "all",
    progress: Share = lambda done, total: None,
) -> Plan:
    """Compiles a graph, in a thread of its own: Ctrl-C stops the build and is raised when it has stopped.

    head        "none" leaves the logits out, with all that computes them alone
    graph_head  "none" for a graph that has no logits
    progress    called with (done, total), from that thread

    Errors: EngineError, when the library is missing, too old, or cannot build the graph (its own lines are in the
    message); FormatError for a graph that its parser does not read; ContractError for one that does not fit the spec.
    """
    trt = flavours.library(flavour)
    wanted = flavours.capabilities(flavour, trt, options)
    stop = threading.Event()

    def work() -> Plan:
        with _one_build:
            flavours.prepare(flavour, options)
            return _Build(trt, flavour, options, wanted, stop, progress).plan(graph, spec, head, graph_head)

    return interruptible(work, stop)


@dataclass(frozen=True, eq=False)
class _Build:
    """What a build goes by."""

    trt: Any
    flavour: Flavour
    options: BuildOptions
    wanted: tuple[int, ...]
    stop: threading.Event
    progress: Share

    def plan(self, graph: Path, spec: StepSpec, head: Head, graph_head: Head) -> Plan:
        trt, options, log = self.trt, self.options, logger(self.trt)
        title = f"{self.flavour.title} {trt.__version__}"
        builder = _called(lambda: trt.Builder(log), log, f"{title} cannot start a builder")
        config, profile = builder.create_builder_config(), ranges(spec, options.max_batch)
        config.progress_monitor = monitor(trt, self.progress, self.stop)
        flavours.target(self.flavour, trt, config, self.wanted, options)
        configure(trt, config, options)
        cache = _timing_cache(config, log, options.timing_cache)
        network, parser = read_network(trt, builder, log, graph, title)
        check_network(trt, network, spec, graph.name, graph_head)
        tensors = take_head(trt, network, spec, head)
        attention = attention_of(trt, network)
        add_profile(builder, config, profile)
        started = time.perf_counter()
        data, apart = self._compiled(builder, network, config, attention, f"{title} cannot build '{graph.name}'")
        seconds = time.perf_counter() - started
        del parser  # it owns the weights that the network reads, so it lives until here
        if cache is not None and options.timing_cache is not None:
            write_file(options.timing_cache, bytes(config.get_timing_cache().serialize()))
        return Plan(
            data, str(trt.__version__), self.wanted, head, profile, tensors,
            tuple(node.name for node in attention if node not in apart), tuple(node.name for node in apart),
            flavours.joined_attention(self.flavour, data), seconds,
        )  # fmt: skip

    def _compiled(
        self, builder: Any, network: Any, config: Any, attention: tuple[Attention, ...], what: str
    ) -> tuple[Any, tuple[Attention, ...]]:
        """The engine, and the attention nodes that the builder was allowed to take apart.

        Those of float32 are at once: no version known has a kernel for them, and one that has may still use it. Others
        are kept whole, until the builder says that it cannot: so what is said to be one kernel is one.
        """
        log, what = logger(self.trt), f"{what} for {dotted(self.wanted)}"

        def compiled() -> Any:
            return _called(lambda: builder.build_serialized_network(network, config), log, what, self._advice)

        apart = tuple(node for node in attention if node.float32)
        for node in apart:
            node.take_apart()
        try:
            return compiled(), apart
        except EngineError as err:
            if apart == attention or self.stop.is_set() or NO_KERNEL not in str(err).lower():
                raise
        for node in attention:
            node.take_apart()
        return compiled(), attention

    def _advice(self, lines: list[str]) -> str:
        """What to do about a build that failed for want of memory; nothing is known of other reasons."""
        said = " ".join(lines).lower()
        if not any(word in said for word in NO_MEMORY):
            return ""
        if self.options.workspace_mib is not None:
            return f". Give --workspace more than {self.options.workspace_mib} MiB, or leave it out"
        return ". Build with a smaller --max-batch, or on a machine with more memory"


def _called(call: Callable[[], Any], log: Any, what: str, advice: Callable[[list[str]], str] = lambda lines: "") -> Any:
    """What a call of the library gives. It reports failure by None or by an exception, and says why in the log."""
    with log.capture() as lines:
        try:
            value = call()
        except (RuntimeError, TypeError, ValueError) as err:  # what its bindings raise
            said = [*lines, str(err)]
            raise EngineError(f"{what}: {one_line(said)}{advice(said)}") from err
        if value is None:
            raise EngineError(f"{what}: {one_line(lines)}{advice(lines)}")
    return value


def configure(trt: Any, config: Any, options: BuildOptions) -> None:
    """Hands the options to a builder's config."""
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


def _timing_cache(config: Any, log: Any, path: Path | None) -> Any:
    """The cache of a file, or a new one; None without a path. Errors: FormatError for a file of another kind or GPU."""
    if path is None:
        return None
    known = read_bounded(path, CACHE_LIMIT, "a timing cache of TensorRT") if path.exists() else b""
    # Of a file that is none it may give an empty cache, and say so in the log alone.
    with log.capture() as lines:
        cache = config.create_timing_cache(known)
        taken = cache is not None and config.set_timing_cache(cache, False)
    if not taken or lines:
        raise FormatError(
            f"{path} is no timing cache of this TensorRT and this GPU: {one_line(lines)}. Give another name, or remove it"
        )
    return cache
