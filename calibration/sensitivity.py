"""How far each unit of a step, quantized alone, makes memory and logits drift along the recurrence."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rmt_trt.bundle import Bundle
from rmt_trt.calibration.beside import Drifted, Step, Through, beside
from rmt_trt.calibration.documents import Source
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.static import Kind, Rescale
from rmt_trt.calibration.step_graph import read_step
from rmt_trt.calibration.switched import States, Switched, switched
from rmt_trt.calibration.tables import tables
from rmt_trt.calibration.tapped import quantizable
from rmt_trt.calibration.units import Grouping, Unit, memory_units, table_units, units_of


@dataclass(frozen=True)
class UnitDrift:
    """A unit, and what came of quantizing it and nothing else."""

    unit: Unit
    drifted: Drifted


def sensitivity(
    bundle: Bundle,
    ranges: Ranges,
    kind: Kind,
    sources: Sequence[Source],
    through: Through | None = None,
    grouping: Grouping | None = None,
    rescale: Rescale | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    partial: Path | None = None,
) -> tuple[UnitDrift, ...]:
    """Drives the step with each unit quantized alone, and with none, through the documents, all in one session.

    The products come first, in the graph's order, and embedding tables; then the ways of the memory, which are measured all the same though
    nothing quantizes them: what the step reads of each state, and what it writes into it, in one range each, the state's.
    progress is called with (segments done, segments of the longest document); partial is as `beside` has it. Errors: as
    `static_graph` and `beside`.
    """
    model, found = read_step(bundle)
    with quantizable(bundle):
        looked_up = table_units(tables(model)) if kind.tables else ()
        units = (*units_of(model, found, grouping), *looked_up, *memory_units(bundle.spec))
    del model
    with quantizable(bundle), tempfile.TemporaryDirectory(prefix="rmt-calibrate-") as folder:
        graph = switched(bundle, ranges, kind, units, Path(folder), rescale, threads)
    steps = [_with(graph, place) for place in range(len(units))]
    thresholds = {name: tensor.threshold for name, tensor in {**ranges.states, **ranges.tensors}.items()}
    key = json.dumps([kind.weight, kind.activation, [unit.name for unit in units], thresholds, sorted(rescale or {})])
    drifted = beside(bundle, _with(graph, None), steps, sources, through or Through(), progress, partial, _digest(key))
    return tuple(UnitDrift(unit, one) for unit, one in zip(units, drifted, strict=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _with(graph: Switched, place: int | None) -> Step:
    """The step with one unit quantized, or with none."""
    quantized = [number == place for number in range(len(graph.units))]

    def step(states: States, segment: np.ndarray) -> tuple[States, np.ndarray]:
        return graph.step(states, segment, quantized)

    return step


def worst_first(found: Sequence[UnitDrift], logits: bool) -> tuple[Unit, ...]:
    """The units that can be kept, those first that do the most harm. logits: to the answers too, not to the memory alone."""
    products = [one for one in found if not one.unit.way]
    harm = {one.unit: max(one.drifted.drift, one.drifted.logits if logits else 0.0) for one in products}
    return tuple(sorted(harm, key=lambda unit: -harm[unit]))
