"""Quantized graphs for a bundle: written, verified along the recurrence by the agreement of the answers, then added."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.static import FP8, INT8, UINT8_INT8, Rescale, static_graph
from rmt_trt.errors import ContractError

if TYPE_CHECKING:
    from rmt_trt.export.engine_graphs import EngineGraphs, EngineOptions

Progress = Callable[[str, int, int], None]

STATIC = {
    ("cpu", "int8"): UINT8_INT8,
    ("cpu", "fp8"): FP8,
    **{(engine, "int8"): INT8 for engine in ("cuda", "tensorrt", "tensorrt-rtx")},
    **{(engine, "fp8"): FP8 for engine in ("cuda", "tensorrt", "tensorrt-rtx")},
}


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
) -> EngineGraphs:
    """Adds a static graph to a bundle, for `engine` in "int8" or "fp8"; one that the bundle has for this use is replaced.

    keep, rescale  as `static_graph`
    options        `segments`, `tolerance` and `accept_drift` of the verification are read
    progress       called with (stage, done, total); stages are "graphs" and "verify"
    record         what the manifest is to say of it in addition, as plain values

    Where this machine cannot run the engine, the graph is verified on the CPU engine, and the record says so.
    Errors: ContractError for an engine or a dtype without static graphs, and as `static_graph`; VerificationError, when
    the answers differ.
    """
    kind = STATIC.get((engine, dtype))
    if kind is None:
        known = ", ".join(f"{dtype} for {engine}" for engine, dtype in STATIC)
        raise ContractError(f"no static graph is made in {dtype!r} for engine {engine!r}; expected one of {known}")
    about = {
        "method": f"static, ranges by {ranges.method} from {ranges.segments} segments of {len(ranges.documents)} documents",
        "weights": kind.weight.removeprefix("Q").lower(),
        "activations": kind.activation.removeprefix("Q").lower(),
        "kept": sorted(keep),
        "rescaled": sorted(rescale or {}),
        **(record or {}),
    }
    return _add(
        bundle_path, engine, dtype, about, options, progress,
        lambda bundle, path: static_graph(bundle, ranges, path, kind, keep, rescale),
    )  # fmt: skip


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
        entry = write(bundle, folder / f"{engine}-{dtype}-step-all.onnx")
        return EngineGraphs(engine, dtype, (replace(entry, engine=engine),), {}, about["method"], quantization=about)

    return add_written(bundle, written, EngineOptions() if options is None else options, progress)
