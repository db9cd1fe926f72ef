"""An engine for a bundle: its graph is taken or made, compiled, and added with its record as one change."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rmt_trt.bundle import STEP, Bundle, GraphEntry, add_files
from rmt_trt.contract import DTYPES
from rmt_trt.engine_record import FOLDER, EngineRecord
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.export.engine_graphs import GRAPHS, recorded
from rmt_trt.export.graph_check import GraphCheck, check_graphs
from rmt_trt.export.plain import HALVES, plain_graph
from rmt_trt.export.recover import model_from_bundle
from rmt_trt.export.tensorrt import flavours
from rmt_trt.export.tensorrt.builder import Plan, build_plan
from rmt_trt.export.tensorrt.flavours import Flavour
from rmt_trt.export.tensorrt.options import BuildOptions
from rmt_trt.export.verify import TOLERANCES, model_reference, step_reference
from rmt_trt.files import cannot_write, checked_path, sha256, write_file
from rmt_trt.initial_state import to_metadata
from rmt_trt.model.step import DecoderStep, EncoderStep, fingerprint

Progress = Callable[[str, int, int], None]
UNVERIFIED = "compiled, and never run: rmt-verify does that on a machine with such a GPU"


@dataclass(frozen=True)
class BuiltEngine:
    """What was added. file: the engine's name in the bundle; its record is there as `.json`. check: the errors on the
    CPU of a graph that was made for this build, or None."""

    file: str
    record: EngineRecord
    check: GraphCheck | None = None


@dataclass(frozen=True, eq=False)
class _Graph:
    """A graph to compile, its entry with the name that it has or would get in the bundle, and whether it is new."""

    path: Path
    entry: GraphEntry
    new: bool
    check: GraphCheck | None = None


def add_engine(
    bundle_path: Path | str,
    engine: str = "tensorrt-rtx",
    dtype: str = "fp16",
    options: BuildOptions | None = None,
    model: nn.Module | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> BuiltEngine:
    """Compiles the step of an existing bundle and adds the engine; one of the same name is replaced.

    dtype     fp32 compiles step.onnx; fp16 and bf16 a graph that is exported for the build; the graph that the bundle
              lists for this engine and dtype, where it does, comes first
    model     the float32 step of the user's own that the bundle was exported from; None takes a published model out of
              the bundle itself
    progress  called with (stage, done, total), from another thread too; stages are "graph", "check" and "build"

    The bundle is what it was until the engine is whole, whatever stops it. Errors: ContractError for options that do
    not fit, or a graph that does not fit its spec; EngineError, when the library is missing, too old, lacks its GPU or
    cannot build the graph; FormatError, when the bundle cannot be read or written; VerificationError, when a graph
    that was made does not compute the model.
    """
    path, options = checked_path(bundle_path), options or BuildOptions()
    flavour = flavours.flavour_of(engine, options)
    if dtype not in DTYPES:
        raise ContractError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    bundle = Bundle(path)
    # Before a graph is made, which takes longer than to find out that nothing can be built.
    flavours.capabilities(flavour, flavours.library(flavour), options)
    try:
        # Beside the bundle: a folder for temporary files may be smaller than a model.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.resolve().parent) as scratch:
            graph = _listed(bundle, engine, dtype) or _made(
                bundle, engine, dtype, model, Path(scratch), options, progress
            )
            progress("build", 0, 1)
            plan = build_plan(graph.path, bundle.spec, flavour, options, lambda a, b: progress("build", a, b))
            progress("build", 1, 1)
            return _add(bundle, graph, flavour, dtype, options, plan, Path(scratch))
    except OSError as err:
        raise cannot_write(path, err) from err


def _listed(bundle: Bundle, engine: str, dtype: str) -> _Graph | None:
    """The graph that the bundle has for this use; in fp32 that is step.onnx."""
    entry = bundle.graph(engine, dtype) or (bundle.graph("cpu", "fp32") if dtype == "fp32" else None)
    if entry is None and dtype not in HALVES:
        raise FormatError(f"{bundle.path} lists no {dtype} graph for engine '{engine}'. Add one, or take --dtype fp16")
    return None if entry is None else _Graph(bundle.graph_path(entry), entry, new=False)


def _made(
    bundle: Bundle,
    engine: str,
    dtype: str,
    model: nn.Module | None,
    folder: Path,
    options: BuildOptions,
    progress: Progress,
) -> _Graph:
    """A plain graph in half precision, checked on the CPU where that has the dtype: it has no bf16."""
    step = _step(bundle, dtype, model)
    initial = {state.initial: value for state, value in zip(bundle.spec.states, bundle.initial(), strict=True)}
    path = folder / f"{engine}-{dtype}-step-all.onnx"
    progress("graph", 0, 1)
    entry = plain_graph(step, bundle.spec, dtype, path, initial, engine=engine)
    progress("graph", 1, 1)
    check = None
    if options.check_segments and dtype == "fp16":
        if isinstance(step, (EncoderStep, DecoderStep)):
            reference = model_reference(step)
        else:
            reference = step_reference(step, bundle.spec, bundle.initial())
        check = check_graphs(
            (entry,), folder, bundle.spec, bundle.initial(), reference, options.check_segments, TOLERANCES[dtype],
            progress=lambda done, total: progress("check", done, total),
        )  # fmt: skip
    data = tuple(f"{GRAPHS}/{name}" for name in entry.data)
    return _Graph(path, replace(entry, file=f"{GRAPHS}/{entry.file}", data=data), True, check)


def _step(bundle: Bundle, dtype: str, model: nn.Module | None) -> nn.Module:
    """The float32 module of the bundle, proved to be its own."""
    if model is None:
        if bundle.manifest.model is None:
            raise FormatError(
                f"{bundle.path} holds a step of the user's own, which no file describes: its {dtype} graph is made from its "
                f"PyTorch module. Pass it: rmt_trt.export.tensorrt.add_engine(path, dtype='{dtype}', model=step)"
            )
        return model_from_bundle(bundle)
    values = zip(bundle.spec.states, bundle.initial(), strict=True)
    if fingerprint(model, {s.initial: torch.from_numpy(value) for s, value in values}) != bundle.spec.fingerprint:
        raise FormatError(f"the model holds other weights than {bundle.path} was exported from. Give the right one")
    return model.eval()


def _add(
    bundle: Bundle, graph: _Graph, flavour: Flavour, dtype: str, options: BuildOptions, plan: Plan, folder: Path
) -> BuiltEngine:
    """Writes the engine and its record beside the bundle, and takes both in. A graph that was made for the build goes
    in too when the engine holds no weights."""
    engine = flavour.engine
    name = engine_name(engine, dtype, plan.capabilities, options.max_batch)
    file, entry = folder / f"{name}.engine", graph.entry
    file.write_bytes(plan.data)
    kept = not graph.new or options.strip_weights
    initial = {state.initial: value for state, value in zip(bundle.spec.states, bundle.initial(), strict=True)}
    record = EngineRecord(
        engine, dtype, entry.role, entry.head, file.name, file.stat().st_size, sha256(file), flavour.module,
        plan.version, plan.capabilities,
        ({key: {"min": [*r.least], "opt": [*r.best], "max": [*r.most]} for key, r in plan.profile.items()},),
        tuple(plan.tensors["inputs"]), tuple(plan.tensors["outputs"]),
        {"file": entry.file if kept else None, "sha256": sha256(graph.path)},
        to_metadata(bundle.spec, initial),
        stripped=options.strip_weights, version_compatible=options.version_compatible,
        decomposable=plan.decomposable, seconds=round(plan.seconds, 3),
    )  # fmt: skip
    write_file(folder / f"{name}.json", record.to_json().encode())
    files = {f"{FOLDER}/{name}{suffix}": folder / f"{name}{suffix}" for suffix in (".engine", ".json")}
    listed: tuple[GraphEntry, ...] = ()
    if graph.new and kept:
        names = (entry.file, *entry.data)
        files |= {inside: graph.path.with_name(Path(inside).name) for inside in names}
        listed = (entry,)
    facts = {
        "plain": "compiled from step.onnx" if entry.file == STEP else "compiled from a plain graph",
        "check": None if graph.check is None else graph.check.to_json(),
        "verification": None,
        "unverified": UNVERIFIED,
    }
    add_files(bundle.path, files, listed, verification=lambda old: recorded(old, engine, dtype, facts))
    return BuiltEngine(f"{FOLDER}/{name}.engine", record, graph.check)


def engine_name(engine: str, dtype: str, capabilities: tuple[int, ...], max_batch: int) -> str:
    """Name of an engine without its suffix: one per engine, dtype, kinds of GPU and batch."""
    return "-".join([engine, dtype, *(f"sm{value}" for value in capabilities), f"b{max_batch}"])
