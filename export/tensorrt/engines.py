"""Engines for a bundle: a graph is taken or made, compiled, and added with its record as one change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rmt_trt.bundle import Bundle, GraphEntry, add_files
from rmt_trt.contract import Head
from rmt_trt.engine_record import FOLDER, HARDWARE, EngineRecord
from rmt_trt.export.added import recorded
from rmt_trt.export.graph_check import GraphCheck
from rmt_trt.export.tensorrt import flavours
from rmt_trt.export.tensorrt.builder import Plan, build_plan
from rmt_trt.export.tensorrt.flavours import Flavour
from rmt_trt.export.tensorrt.graphs import Graph, check_listed, listed_graph, made_graph
from rmt_trt.export.tensorrt.options import BuildOptions, heads_of
from rmt_trt.export.tensorrt.products import check_dtypes, check_products
from rmt_trt.files import cannot_write, check_folder, check_target, checked_path, sha256, write_file
from rmt_trt.initial_state import to_metadata
from rmt_trt.stage import stage_folder

Progress = Callable[[str, int, int], None]
UNVERIFIED = "compiled, and never run: rmt-verify does that on a machine with such a GPU"


@dataclass(frozen=True)
class BuiltEngine:
    """What was added. file: the engine's name in the bundle; its record is there as `.json`.

    opset   of the graph
    check   the errors on the CPU of a graph that was made for the build, or None
    whole   names of attention nodes that are one kernel each; those that may be several are in the record
    joined  kernels in which the builder joined attention, from nodes or from products and softmax; None is not known
    """

    file: str
    record: EngineRecord
    opset: int
    check: GraphCheck | None
    whole: tuple[str, ...]
    joined: int | None


def check_build(engine: str, dtypes: Sequence[str], options: BuildOptions, bundle: Bundle | None) -> Flavour:
    """Says before minutes of work what would stop it. bundle: None is one that is not there yet.

    Errors: as `add_engines`.
    """
    flavour = flavours.flavour_of(engine, options)
    check_dtypes(dtypes)
    check_products(engine, dtypes, options.compute_capabilities, bundle)
    for dtype in dtypes:
        check_listed(bundle, engine, dtype)
    check_products(engine, dtypes, flavours.capabilities(flavour, flavours.library(flavour), options), bundle)
    if options.timing_cache is not None:
        check_target(options.timing_cache)
    if bundle is not None:
        check_folder(bundle.path, "the engine would be added")
        check_folder(bundle.path.resolve().parent, "a build keeps its files beside the bundle until they are whole")
    return flavour


def add_engines(
    bundle_path: Path | str,
    engine: str = "tensorrt-rtx",
    dtypes: Sequence[str] = ("fp16",),
    options: BuildOptions | None = None,
    model: nn.Module | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[BuiltEngine, ...]:
    """Compiles the step of an existing bundle and adds the engines, those of a dtype as one change; one of the same name is
    replaced.

    dtypes    fp32 compiles step.onnx; fp16 and bf16 a graph that is exported for the build; the graph that the bundle
              lists for this engine and dtype, where it does, comes first
    model     the float32 step of the user's own that the bundle was exported from; None takes a published model out of
              the bundle itself
    progress  called with (stage, done, total), from another thread too; stages are "graph fp16", "check fp16" and, with
              the head, "build fp16 all"

    The bundle is what it was until the engines of a dtype are whole, whatever stops it. Errors: ContractError for options
    that do not fit, or a graph that does not fit its spec; EngineError, when the library is missing, too old, lacks its GPU
    or cannot build the graph; FormatError, when the bundle cannot be read or written; VerificationError, when a graph
    that was made does not compute the model.
    """
    path, options = checked_path(bundle_path), options or BuildOptions()
    dtypes = tuple(dict.fromkeys(dtypes))
    bundle = Bundle(path)
    flavour = check_build(engine, dtypes, options, bundle)
    built: list[BuiltEngine] = []
    for dtype in dtypes:
        try:
            # Beside the bundle: a folder for temporary files may be smaller than a model.
            with stage_folder(path) as scratch:
                built += _Adding(Bundle(path), flavour, dtype, options, scratch).add(model, progress)
        except OSError as err:
            raise cannot_write(path, err) from err
    return tuple(built)


@dataclass(frozen=True, eq=False)
class _Adding:
    """What the engines of one dtype go by. folder: for files on their way into the bundle."""

    bundle: Bundle
    flavour: Flavour
    dtype: str
    options: BuildOptions
    folder: Path

    def add(self, model: nn.Module | None, progress: Progress) -> list[BuiltEngine]:
        bundle, engine, dtype, options = self.bundle, self.flavour.engine, self.dtype, self.options
        files: dict[str, Path] = {}
        built, used, made = [], {}, None
        for head in heads_of(options, bundle.spec):
            graph = listed_graph(bundle, engine, dtype, head) or made
            if graph is None:
                graph = made = made_graph(
                    bundle, engine, dtype, model, self.folder, options.check_segments,
                    lambda stage, done, total: progress(f"{stage} {dtype}", done, total),
                )  # fmt: skip
            used[graph.entry.file] = graph
            one, written = self._compiled(graph, head, progress)
            built.append(one)
            files |= written
        self._take_in(files, list(used.values()))
        return built

    def _compiled(self, graph: Graph, head: Head, progress: Progress) -> tuple[BuiltEngine, dict[str, Path]]:
        """An engine and its record, in the folder, and by the names that they get in the bundle."""
        stage = f"build {self.dtype} {head}"

        def show(done: int, total: int) -> None:
            progress(stage, done, total)

        show(0, 1)
        graph_head: Head = "none" if graph.entry.head == "none" else "all"
        plan = build_plan(graph.path, self.bundle.spec, self.flavour, self.options, head, graph_head, show)
        show(1, 1)
        name = engine_name(self.flavour.engine, self.dtype, head, plan.capabilities, self.options)
        file = self.folder / f"{name}.engine"
        file.write_bytes(plan.data)
        record = self._record(graph, plan, file)
        write_file(file.with_suffix(".json"), record.to_json().encode())
        built = BuiltEngine(f"{FOLDER}/{file.name}", record, graph.entry.opset, graph.check, plan.whole, plan.joined)
        return built, {f"{FOLDER}/{name}{suffix}": file.with_suffix(suffix) for suffix in (".engine", ".json")}

    def _record(self, graph: Graph, plan: Plan, file: Path) -> EngineRecord:
        spec, entry, options = self.bundle.spec, graph.entry, self.options
        initial = {state.initial: value for state, value in zip(spec.states, self.bundle.initial(), strict=True)}
        return EngineRecord(
            self.flavour.engine, self.dtype, entry.role, plan.head, file.name, file.stat().st_size, sha256(file),
            self.flavour.module, plan.version, plan.capabilities,
            ({key: {"min": [*r.least], "opt": [*r.best], "max": [*r.most]} for key, r in plan.profile.items()},),
            tuple(plan.tensors["inputs"]), tuple(plan.tensors["outputs"]),
            {"file": entry.file if self._kept(graph) else None, "sha256": sha256(graph.path)},
            to_metadata(spec, initial),
            stripped=options.strip_weights, version_compatible=options.version_compatible,
            hardware_compatible=options.hardware_compatible, decomposable=plan.decomposable,
            seconds=round(plan.seconds, 3),
        )  # fmt: skip

    def _kept(self, graph: Graph) -> bool:
        """Whether a graph is in the bundle afterwards: one that was made for the build is, when an engine has no weights."""
        return not graph.new or self.options.strip_weights

    def _take_in(self, files: dict[str, Path], graphs: list[Graph]) -> None:
        """Adds engines and records, and the graphs that are kept, to the bundle."""
        listed: tuple[GraphEntry, ...] = ()
        for graph in graphs:
            if graph.new and self._kept(graph):
                names = (graph.entry.file, *graph.entry.data)
                files |= {inside: graph.path.with_name(Path(inside).name) for inside in names}
                listed = (*listed, graph.entry)
        new = next((graph for graph in graphs if graph.new), graphs[0])
        facts: dict[str, Any] = {
            "plain": f"compiled from {'a plain graph' if new.new else new.entry.file}",
            "check": None if new.check is None else new.check.to_json(),
            "verification": None,
            "unverified": UNVERIFIED,
        }
        if not new.new:
            facts |= self._known_of_graph()
        add_files(
            self.bundle.path, files, listed, fingerprint=self.bundle.spec.fingerprint,
            verification=lambda old: recorded(old, self.flavour.engine, self.dtype, facts),
        )  # fmt: skip

    def _known_of_graph(self) -> dict[str, Any]:
        """What the manifest records of a quantized graph that was compiled: how it was made, and verified before."""
        value: Any = self.bundle.manifest.verification
        for key in ("engines", self.flavour.engine, self.dtype):
            value = value.get(key) if isinstance(value, dict) else None
        kept = ("quantization", "verification", "verified_on")
        return {name: value[name] for name in kept if name in value} if isinstance(value, dict) else {}


def engine_name(engine: str, dtype: str, head: str, capabilities: tuple[int, ...], options: BuildOptions) -> str:
    """Name of an engine without its suffix: one for each use and kind of engine."""
    kinds = [f"sm{value}" for value in capabilities]
    if options.hardware_compatible != HARDWARE[0]:
        kinds.append(options.hardware_compatible)
    extra = ["compatible"] * options.version_compatible + ["stripped"] * options.strip_weights
    return "-".join([engine, dtype, head, *kinds, f"b{options.max_batch}", *extra])
