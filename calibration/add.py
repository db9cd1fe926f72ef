"""Quantized graphs for a bundle: written, verified along the recurrence by the agreement of the answers, then added."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration.dynamic import DTYPE as DYNAMIC
from rmt_trt.calibration.dynamic import dynamic_graph
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.static import FP8, INT8, UINT8_INT8, Kind, Rescale, static_graph
from rmt_trt.calibration.tapped import quantizable
from rmt_trt.calibration.weights import BITS, BLOCK, half_weights_graph, weights_graph
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.runtime.products import NO_INT8_ON_CUDA

if TYPE_CHECKING:
    from rmt_trt.export.engine_graphs import EngineGraphs, EngineOptions

Progress = Callable[[str, int, int], None]
WITHOUT_DATA = {"cpu": (DYNAMIC, *BITS), "cuda": tuple(BITS)}  # engine -> dtypes

STATIC = {
    ("cpu", "int8"): UINT8_INT8,
    ("cpu", "fp8"): FP8,
    **{(engine, "int8"): INT8 for engine in ("tensorrt", "tensorrt-rtx")},
    **{(engine, "fp8"): FP8 for engine in ("cuda", "tensorrt", "tensorrt-rtx")},
}
NATIVE = ("cuda", "fp8")  # by rmt-trt's own operators, where the model's backbone can be fused
# ONNX Runtime multiplies these in float: tensors are rounded as they would be, and nothing gets faster.
EMULATED = (("cpu", "fp8"), ("cuda", "fp8"))
UNTRIED = "graphs of this kind had never run on a GPU when this version was made"


def add_static(
    bundle_path: Path | str,
    ranges: Ranges,
    engine: str = "cpu",
    dtype: str = "int8",
    keep: Collection[str] = frozenset(),
    rescale: Rescale | None = None,
    options: EngineOptions | None = None,
    progress: Progress = lambda stage, done, total: None,
    record: Mapping[str, Any] | None = None,
    half: bool | None = None,
) -> EngineGraphs:
    """Adds a static graph to a bundle, for `engine` in "int8" or "fp8"; one that the bundle has for this use is replaced.

    keep, rescale  as `static_graph`
    half           whether what stays float is float16, norms apart; None is yes for engines of a GPU. The CPU has none
    options        `segments`, `tolerance` and `accept_drift` of the verification are read
    progress       called with (stage, done, total); stages are "graphs" and "verify"
    record         what the manifest is to say of it in addition, as plain values

    For "cuda" in "fp8" the graphs are fused ones that multiply in FP8 (`add_native`); where that cannot be, the record says
    why, and the graph is one that rounds as they would, and multiplies in float.
    Where this machine cannot run the engine, the graph is verified on the CPU engine, and the record says so.
    Errors: ContractError for an engine or a dtype without static graphs, and as `static_graph`; VerificationError, when
    the answers differ.
    """
    kind = STATIC.get((engine, dtype))
    if kind is None:
        raise ContractError(f"no static graph is made in {dtype!r} for engine {engine!r}; {dtypes_of(engine, dtype)}")
    if half and engine == "cpu":
        raise ContractError(
            "half is for the engines of a GPU; ONNX Runtime computes in float32 on the CPU. Leave it out"
        )
    kind = replace(kind, half=engine != "cpu" if half is None else half)
    about = {
        "method": f"static, ranges by {ranges.method} from {ranges.segments} segments of {len(ranges.documents)} documents",
        "weights": kind.weight.removeprefix("Q").lower(),
        "activations": kind.activation.removeprefix("Q").lower(),
        "rest": "fp16" if kind.half else "fp32",
        **({"emulated": "rounded, and multiplied in float"} if (engine, dtype) in EMULATED else {}),
        "kept": sorted(keep),
        "rescaled": sorted(rescale or {}),
        **(record or {}),
    }
    if (engine, dtype) == NATIVE:
        reason = _not_native(kind, rescale)
        if reason is None:
            own = {name: value for name, value in about.items() if name != "emulated"}
            try:
                return _native(Bundle(bundle_path), ranges, keep, own, options, progress)
            except _cannot_fuse() as err:
                reason = str(err)
        about |= {"emulated": f"{about['emulated']}: {reason}", "untried": UNTRIED}
    return _add(
        bundle_path, engine, dtype, about, options, progress,
        lambda bundle, path: static_graph(bundle, ranges, path, kind, keep, rescale),
    )  # fmt: skip


def _not_native(kind: Kind, rescale: Rescale | None) -> str | None:
    """Why the graph is not one of our own operators, whatever the model; or None."""
    if rescale:
        return "channels are rescaled, which only Q/DQ graphs do"
    return None if kind.half else "what is not quantized is to stay float32, which only Q/DQ graphs do"


def _native(
    bundle: Bundle,
    ranges: Ranges,
    keep: Collection[str],
    about: dict[str, Any],
    options: EngineOptions | None,
    progress: Progress,
) -> EngineGraphs:
    from rmt_trt.calibration.native import add_native
    from rmt_trt.export.engine_graphs import EngineOptions

    return add_native(bundle, ranges, keep, about, EngineOptions() if options is None else options, progress)


def _cannot_fuse() -> type[Exception]:
    from rmt_trt.export.fused import CannotFuse

    return CannotFuse


def add_without_data(
    bundle_path: Path | str,
    engine: str = "cpu",
    dtype: str = "int8-dynamic",
    keep: Collection[str] = frozenset(),
    options: EngineOptions | None = None,
    progress: Progress = lambda stage, done, total: None,
    record: Mapping[str, Any] | None = None,
) -> EngineGraphs:
    """Adds a graph that takes no ranges, for `engine` in a dtype of WITHOUT_DATA; one that the bundle has for this use is
    replaced. For CUDA it is made of the step in float16, so that the bundle has to give its model.

    Parameters as `add_static`; `keep` is for the CPU engine. Errors: ContractError for an engine or a dtype without such
    graphs, or a name in `keep` that the step does not have; FormatError, when nothing can be quantized, or a bundle of a
    user's own step is to get a graph for CUDA; VerificationError, when the answers differ.
    """
    if dtype not in WITHOUT_DATA.get(engine, ()):
        raise ContractError(
            f"no graph is made in {dtype!r} for engine {engine!r} without ranges; {dtypes_of(engine, dtype)}"
        )
    if keep and engine != "cpu":
        raise ContractError(f"keep is for the graphs of engine 'cpu'; those for '{engine}' quantize every product")
    about: dict[str, Any] = {
        "method": "dynamic, activations by what each step finds",
        "weights": "int8",
        "activations": "uint8",
    }
    if dtype in BITS:
        about = {"method": f"weights alone, blocks of {BLOCK}", "weights": f"int{BITS[dtype]}"}
        about["activations"] = "float16" if engine == "cuda" else "float32"
    about |= {"kept": sorted(keep), **(record or {})}

    def write(bundle: Bundle, path: Path) -> GraphEntry:
        if engine == "cuda":
            return _of_half(bundle, path, dtype)
        return weights_graph(bundle, path, dtype, keep) if dtype in BITS else dynamic_graph(bundle, path, keep)

    return _add(bundle_path, engine, dtype, about, options, progress, write)


def dtypes_of(engine: str, dtype: str) -> str:
    """In words, which quantized graphs are made for an engine that has none in `dtype`."""
    static = [dtype for name, dtype in STATIC if name == engine]
    if not static:
        return f"quantized graphs are for {', '.join(dict.fromkeys(name for name, _ in STATIC))}"
    made = f"for '{engine}' there are {', '.join([*static, *WITHOUT_DATA.get(engine, ())])}"
    return f"{made}. {NO_INT8_ON_CUDA}" if (engine, dtype) == ("cuda", "int8") else made


def _of_half(bundle: Bundle, path: Path, dtype: str) -> GraphEntry:
    """A graph with few bits of weights, of the step in float16."""
    from rmt_trt.export.plain import plain_graph
    from rmt_trt.export.recover import model_from_bundle

    if bundle.manifest.model is None:
        raise FormatError(
            f"{bundle.path} holds a step of the user's own, which no file describes, and a graph for CUDA is made of the step "
            f"in float16. Take --engine cpu"
        )
    initial = {state.initial: value for state, value in zip(bundle.spec.states, bundle.initial(), strict=True)}
    with tempfile.TemporaryDirectory(prefix="half.", dir=path.parent) as folder:
        half = Path(folder) / "half.onnx"
        plain_graph(model_from_bundle(bundle), bundle.spec, "fp16", half, initial)
        return half_weights_graph(bundle, half, path, dtype)


def _add(
    path: Path | str,
    engine: str,
    dtype: str,
    about: dict[str, Any],
    options: EngineOptions | None,
    progress: Progress,
    write: Callable[[Bundle, Path], GraphEntry],
) -> EngineGraphs:
    from rmt_trt.export.engine_graphs import EngineGraphs, EngineOptions, add_written

    bundle = Bundle(path)

    def written(folder: Path) -> EngineGraphs:
        with quantizable(bundle):
            entry = write(bundle, folder / f"{engine}-{dtype}-step-all.onnx")
        return EngineGraphs(engine, dtype, (replace(entry, engine=engine),), {}, about["method"], quantization=about)

    return add_written(bundle, written, EngineOptions() if options is None else options, progress)
