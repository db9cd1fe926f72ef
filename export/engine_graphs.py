"""Graphs made for an engine, added to a bundle: fused where that is known, plain otherwise, checked before they go in."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from rmt_trt.bundle import GRAPHS, MANIFEST, Bundle, FileEntry, GraphEntry, add_files
from rmt_trt.errors import ContractError, EngineError, FormatError
from rmt_trt.export.added import EngineGraphs, NativeGraphs, recorded
from rmt_trt.export.fused import CannotFuse, fused_graphs
from rmt_trt.export.graph_check import GraphCheck, check_graphs
from rmt_trt.export.native_check import by_nodes, check_native
from rmt_trt.export.plain import plain_graph
from rmt_trt.export.recover import model_from_bundle
from rmt_trt.export.verify import (
    TOLERANCES,
    Reference,
    Report,
    check_options,
    engine_reference,
    model_reference,
    step_reference,
    verify,
)
from rmt_trt.files import cannot_write, checked_path, sha256, write_file
from rmt_trt.model.step import DecoderStep, EncoderStep, fingerprint
from rmt_trt.runtime import RMTRuntime, native
from rmt_trt.runtime.engines import refusal
from rmt_trt.runtime.source import open_source
from rmt_trt.stage import stage_folder

__all__ = ["EngineGraphs", "EngineOptions", "add_engine_graphs", "add_written"]

ENGINE = "cuda"
DTYPES = ("fp32", "fp16", "bf16")
Progress = Callable[[str, int, int], None]
Write = Callable[[Path], "EngineGraphs"]


@dataclass(frozen=True)
class EngineOptions:
    """check_segments: how many every graph goes through on the CPU, one of them short; 0 leaves the check out.
    segments: how many the verification on the engine itself goes through; 0 leaves it out. tolerance: of that one;
    None takes the table's. accept_drift adds graphs that breach it. plain: fuse nothing. native: beside fused graphs in
    half precision, write graphs with rmt-trt's own operators where they are quicker."""

    check_segments: int = 8
    segments: int = 16
    tolerance: float | None = None
    accept_drift: bool = False
    plain: bool = False
    native: bool = True

    def __post_init__(self) -> None:
        for count in (self.check_segments, self.segments):
            check_options(2 if count == 0 else count, self.tolerance)
        for name in ("accept_drift", "plain", "native"):
            if not isinstance(getattr(self, name), bool):
                raise ContractError(f"{name} is {getattr(self, name)!r:.80}; expected True or False")


def add_engine_graphs(
    bundle_path: Path | str,
    engine: str = ENGINE,
    dtype: str = "fp16",
    model: nn.Module | None = None,
    options: EngineOptions = EngineOptions(),
    progress: Progress = lambda stage, done, total: None,
) -> EngineGraphs:
    """Adds graphs made for `engine` in `dtype` to an existing bundle; those of the same engine and dtype are replaced.

    model     the float32 model, or the step of the user's own, that the bundle was exported from; None takes a
              published model out of the bundle itself
    progress  called with (stage, done, total); stages are "graphs", "check", "native", "hopper" and "verify"

    The graphs are checked on ONNX Runtime's CPU provider (fused half-precision ones by their float32 twins), and
    verified along the recurrence where this machine can run the engine; only then are they added, all or none.
    Errors: ContractError for options that do not fit; FormatError, when the bundle does not give its model or cannot be
    written; VerificationError, when a graph does not compute the model, or drifts.
    """
    path = checked_path(bundle_path)
    if engine != ENGINE or dtype not in DTYPES:
        raise ContractError(
            f"no graphs are made for engine {engine!r} in {dtype!r}; expected engine '{ENGINE}' and one of {', '.join(DTYPES)}"
        )
    bundle = Bundle(path)
    step = _step(bundle, dtype, model)
    reference = _reference(bundle, step)

    def check(made: EngineGraphs, stage: Path) -> EngineGraphs:
        if not options.check_segments or reference is None:
            return made
        return _check(bundle, step, made, stage, reference, options, progress)

    def write(folder: Path) -> EngineGraphs:
        return _write(bundle, step, engine, dtype, folder, options)

    return _added(bundle, write, check, reference, options, progress)


def add_written(
    bundle: Bundle,
    write: Write,
    options: EngineOptions,
    progress: Progress,
    twin: Write | None = None,
    model: nn.Module | None = None,
) -> EngineGraphs:
    """Adds graphs that `write` writes into a folder, their entries named as the files are, verified against the bundle's
    own model where it gives one, else against its fp32 graph.

    twin   writes what the CPU engine runs in their place where this machine cannot run their own; None says that it runs
           them as they are
    model  the bundle's own, where it is at hand

    Errors: as `add_engine_graphs`."""
    step = model
    if step is None and bundle.manifest.model is not None:
        step = model_from_bundle(bundle)

    def named(folder: Path) -> EngineGraphs:
        made = write(folder)
        return replace(made, entries=tuple(map(_in_bundle, made.entries)))

    return _added(bundle, named, lambda made, stage: made, _reference(bundle, step), options, progress, twin)


def _added(
    bundle: Bundle,
    write: Write,
    check: Callable[[EngineGraphs, Path], EngineGraphs],
    reference: Reference | None,
    options: EngineOptions,
    progress: Progress,
    twin: Write | None = None,
) -> EngineGraphs:
    """Writes graphs into a folder beside the bundle, checks and verifies them there, then adds them."""
    path = bundle.path
    try:
        # Beside the bundle: a folder for temporary files may be smaller than a model.
        with stage_folder(path) as scratch:
            stage = scratch / "stage.rmt"
            (stage / GRAPHS).mkdir(parents=True)
            progress("graphs", 0, 1)
            made = write(stage / GRAPHS)
            progress("graphs", 1, 1)
            made = _verify(bundle, check(made, stage), stage, reference, options, progress, twin)
            _add(path, made, stage, bundle.spec.fingerprint)
    except OSError as err:
        raise cannot_write(path, err) from err
    return made


def _step(bundle: Bundle, dtype: str, model: nn.Module | None) -> nn.Module | None:
    """The module to export, in float32, proved to be the bundle's; None where step.onnx itself is all that is needed."""
    if model is None:
        if bundle.manifest.model is not None:
            return model_from_bundle(bundle)
        if dtype == "fp32":
            return None
        raise FormatError(
            f"{bundle.path} holds a step of the user's own, which no file describes: {dtype} graphs of it are made from its "
            f"PyTorch module. Pass it: rmt_trt.export.add_engine_graphs(path, dtype='{dtype}', model=step)"
        )
    if not isinstance(model, nn.Module):
        raise ContractError(
            f"model is {type(model).__name__}; expected the PyTorch module that {bundle.path} was exported from, such as "
            f"rmt_trt.model.checkpoint.load_model(path).model"
        )
    values = zip(bundle.spec.states, bundle.initial(), strict=True)
    if (
        fingerprint(model, {state.initial: torch.from_numpy(value) for state, value in values})
        != bundle.spec.fingerprint
    ):
        raise FormatError(
            f"the model holds other weights than {bundle.path} was exported from. Give the right checkpoint, or export again"
        )
    return model.eval()


def _write(
    bundle: Bundle, step: nn.Module | None, engine: str, dtype: str, folder: Path, options: EngineOptions
) -> EngineGraphs:
    """Writes the graphs into `folder`; their entries have the names that they get in the bundle."""
    reason = "asked for" if options.plain else "a step of the user's own"
    if isinstance(step, (EncoderStep, DecoderStep)) and not options.plain:
        try:
            made = fused_graphs(step, bundle.spec, dtype, folder, beside=options.native and dtype != "fp32")
            entries = tuple(map(_in_bundle, (*made.entries, *made.native, *made.hopper)))
            own = NativeGraphs(made.native_fused) if made.native else None
            hopper = NativeGraphs(made.hopper_fused) if made.hopper else None
            return EngineGraphs(engine, dtype, entries, made.fused, native=own, hopper=hopper)
        except CannotFuse as err:
            reason = str(err)
    if dtype == "fp32" or step is None:
        entry = bundle.graph("cpu", "fp32")
        if entry is None:
            raise FormatError(f"{bundle.path} holds no fp32 graph of its step. Export the model again")
        return EngineGraphs(engine, dtype, (replace(entry, engine=engine),), {}, reason)
    initial = {state.initial: value for state, value in zip(bundle.spec.states, bundle.initial(), strict=True)}
    name = f"{engine}-{dtype}-step-all.onnx"
    entry = plain_graph(step, bundle.spec, dtype, folder / name, initial, engine=engine)
    return EngineGraphs(engine, dtype, (_in_bundle(entry),), {}, reason)


def _in_bundle(entry: GraphEntry) -> GraphEntry:
    data = tuple(f"{GRAPHS}/{name}" for name in entry.data)
    return replace(entry, file=f"{GRAPHS}/{entry.file}", data=data)


def _reference(bundle: Bundle, step: nn.Module | None) -> Reference | None:
    if step is None:
        return None
    if isinstance(step, (EncoderStep, DecoderStep)):
        return model_reference(step)
    return step_reference(step, bundle.spec, bundle.initial())


def _check(
    bundle: Bundle,
    step: nn.Module | None,
    made: EngineGraphs,
    stage: Path,
    reference: Reference,
    options: EngineOptions,
    progress: Progress,
) -> EngineGraphs:
    """Runs the graphs on the CPU provider: fused ones as fp32 twins, a plain fp16 one as it is. It has no bf16, and
    step.onnx was verified when it was exported."""

    def checked(entries: Sequence[GraphEntry], folder: Path) -> GraphCheck:
        return check_graphs(
            entries, folder, bundle.spec, bundle.initial(), reference, options.check_segments,
            TOLERANCES[entries[0].dtype], progress=lambda done, total: progress("check", done, total),
        )  # fmt: skip

    if made.plain is not None and made.dtype != "fp16":
        return made
    if made.plain is not None:
        try:
            return replace(made, check=checked(made.entries, stage))
        except EngineError:
            return made  # the CPU provider lacks a node in fp16: no fault of the graph
    if made.dtype == "fp32":
        return replace(made, check=checked(made.entries, stage))
    assert isinstance(step, (EncoderStep, DecoderStep))  # nothing else was fused
    with tempfile.TemporaryDirectory(dir=stage.parent) as scratch:
        folder, nodes = Path(scratch), by_nodes(step, bundle.spec)
        # Rotary attention as in the graphs that are checked; the CPU provider has that node in fp32 too.
        twins = fused_graphs(step, bundle.spec, "fp32", folder, grouped=True, beside=bool(made.own), by_nodes=nodes)
        made = replace(made, check=checked(twins.entries, folder))
        own: dict[str, NativeGraphs] = {}
        entries = {native.NEED: twins.native, native.HOPPER: twins.hopper}
        for need, graphs in made.own.items():
            check = check_native(
                entries[need],
                folder,
                step,
                bundle.spec,
                bundle.initial(),
                options.check_segments,
                partial(progress, need),
            )
            own[need] = replace(graphs, check=check, by="nodes" if nodes else "operators")
    return made.with_own(own)


def _verify(
    bundle: Bundle,
    made: EngineGraphs,
    stage: Path,
    reference: Reference | None,
    options: EngineOptions,
    progress: Progress,
    twin: Write | None,
) -> EngineGraphs:
    """Runs the engine itself on the bundle as it is going to be, where this machine can. Graphs with our own operators and
    those beside them are verified apart, by what they need: which ones run is decided where the bundle is opened."""
    if not options.segments:
        return _unverified(made, "left out")
    _fill(stage, bundle, made)
    engine = made.engine

    def verified() -> Report:
        return _verified(stage, engine, made.dtype, reference, options, progress)

    reason = refusal(engine, open_source(stage), made.dtype, 0)
    if reason is not None:
        made = _unverified(made, reason.replace(str(stage), str(bundle.path)))
        if made.quantization is None:
            return made
        # The same files, as the CPU provider computes them, or what stands for them there.
        engine = "cpu"
        made, stage = replace(made, verified_on=engine), _for_cpu(bundle, made, stage, twin)
        return replace(made, report=verified())
    if not made.own:
        return replace(made, report=verified())
    needs: set[str] = set()
    _fill(stage, bundle, _needing(made, needs))
    report = verified()
    own: dict[str, NativeGraphs] = {}
    for need, graphs in made.own.items():
        needs.add(need)
        reason = native.lacking(needs, 0)
        if reason is None:
            _fill(stage, bundle, _needing(made, needs))
        own[need] = replace(graphs, unverified=reason, report=None if reason else verified())
    return replace(made, report=report).with_own(own)


def _needing(made: EngineGraphs, needs: Collection[str]) -> EngineGraphs:
    """With those graphs alone that need nothing else."""
    return replace(made, entries=tuple(entry for entry in made.entries if set(entry.needs) <= set(needs)))


def _unverified(made: EngineGraphs, reason: str) -> EngineGraphs:
    own = {need: replace(graphs, unverified=reason) for need, graphs in made.own.items()}
    return replace(made, unverified=reason).with_own(own)


def _verified(
    stage: Path, engine: str, dtype: str, reference: Reference | None, options: EngineOptions, progress: Progress
) -> Report:
    """The engine's report. Errors: VerificationError, when it drifts and that is not accepted."""
    with RMTRuntime(stage, engine=engine, dtype=dtype) as runtime, contextlib.ExitStack() as stack:
        name = "PyTorch recurrence"
        if reference is None:
            exact = stack.enter_context(RMTRuntime(stage, engine="cpu", dtype="fp32"))
            reference, name = engine_reference(exact), "fp32 graph on the CPU"
        report = verify(
            runtime, reference, options.segments, options.tolerance, name=name,
            progress=lambda done, total: progress("verify", done, total),
        )  # fmt: skip
    if not options.accept_drift:
        report.require()
    return report


def _for_cpu(bundle: Bundle, made: EngineGraphs, stage: Path, twin: Write | None) -> Path:
    """The bundle with the new graphs, or their twins, as graphs for the CPU engine."""
    entries = made.entries
    if twin is not None:
        stage = stage.with_name("twin.rmt")
        (stage / GRAPHS).mkdir(parents=True)
        entries = tuple(map(_in_bundle, twin(stage / GRAPHS).entries))
    _fill(stage, bundle, replace(made, engine="cpu", entries=tuple(replace(e, engine="cpu") for e in entries)))
    return stage


def _fill(stage: Path, bundle: Bundle, made: EngineGraphs) -> None:
    """Makes `stage` the bundle with the new graphs in it: its files are linked, or copied where that is impossible."""
    old = bundle.manifest
    for name in old.files:
        source, target = bundle.path / name, stage / name
        if target.exists() or source.is_symlink() or not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    new = {f"{GRAPHS}/{file.name}": file for file in sorted((stage / GRAPHS).iterdir()) if file.name in _names(made)}
    files = {name: FileEntry(file.stat().st_size, sha256(file)) for name, file in new.items()}
    graphs = (*(graph for graph in old.graphs if not _same_use(graph, made)), *made.entries)
    write_file(stage / MANIFEST, replace(old, files={**old.files, **files}, graphs=graphs).to_json().encode())


def _names(made: EngineGraphs) -> set[str]:
    """Names in `graphs/` of what was written."""
    names = {name for entry in made.entries for name in (entry.file, *entry.data)}
    return {name.removeprefix(f"{GRAPHS}/") for name in names if name.startswith(f"{GRAPHS}/")}


def _same_use(graph: GraphEntry, made: EngineGraphs) -> bool:
    return (graph.engine, graph.dtype) == (made.engine, made.dtype)


def _add(path: Path, made: EngineGraphs, stage: Path, fingerprint: str) -> None:
    files = {f"{GRAPHS}/{name}": stage / GRAPHS / name for name in sorted(_names(made))}
    add_files(
        path,
        files,
        made.entries,
        drop=lambda graph: _same_use(graph, made),
        fingerprint=fingerprint,
        verification=lambda old: recorded(old, made.engine, made.dtype, made.to_json()),
    )
