"""The shortest list of units kept in float32 with which a quantized graph meets a budget, each mix measured as it is deployed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmt_trt.bundle import Bundle, made_by
from rmt_trt.calibration.beside import Drifted, Step, Through, beside
from rmt_trt.calibration.documents import Source
from rmt_trt.calibration.mix import Budget, Mix, Reached, units_json
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.recall import Answered, Questions, answered
from rmt_trt.calibration.sensitivity import UnitDrift, sensitivity, worst_first
from rmt_trt.calibration.smooth import smoothed
from rmt_trt.calibration.static import Kind, static_graph
from rmt_trt.calibration.step_graph import read_step
from rmt_trt.calibration.tables import tables
from rmt_trt.calibration.tapped import quantizable, step_entry
from rmt_trt.calibration.units import Grouping, Unit
from rmt_trt.contract import LOGITS
from rmt_trt.errors import ContractError, VerificationError
from rmt_trt.runtime.engines.cpu import open_session

GRAPH = "mix.onnx"
NO_QUESTIONS = "--min-recall is of a task's questions; name the task with --task, or set --max-drift instead"
Progress = Callable[[str, int, int], None]
Measure = Callable[[Sequence[Unit]], Reached]


@dataclass(frozen=True)
class MixOptions:
    """through: what drift is measured over. grouping: of the units. questions: for the recall, where the budget is of it.
    always: measure the sensitivities where the budget holds without them, too. smooth: alpha of the rescaling."""

    budget: Budget = field(default_factory=Budget)
    through: Through = field(default_factory=Through)
    grouping: Grouping | None = None
    questions: Questions | None = None
    always: bool = False
    smooth: float | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Chosen:
    """A mix, and the sensitivities that were measured for it; () where they were not."""

    mix: Mix
    found: tuple[UnitDrift, ...]


def choose_mix(
    bundle: Bundle,
    ranges: Ranges,
    kind: Kind,
    sources: Sequence[Source],
    options: MixOptions,
    progress: Progress = lambda stage, done, total: None,
    data: dict[str, Any] | None = None,
    partial: Path | None = None,
) -> Chosen:
    """Measures the graph with all quantized; while the budget does not hold, measures the units' sensitivities and keeps the
    worst of them in float32, as few as hold it by a search whose every step measures the graph itself.

    progress is called with (stage, done, total); stages are "sensitivity", "drift" and "recall". partial: a file in which the
    sensitivities are kept as they are measured, and from which they go on; removed at the end.
    Errors: VerificationError, when no mix meets the budget: it says how near they came; ContractError for a recall without
    questions; else as `static_graph` and `beside`.
    """
    if options.budget.min_recall is not None and options.questions is None:
        raise ContractError(NO_QUESTIONS)
    found: list[tuple[UnitDrift, ...]] = []
    rescaled, rescale = (ranges, None) if options.smooth is None else smoothed(bundle, ranges, options.smooth)

    def order() -> tuple[Unit, ...]:
        found.append(
            sensitivity(
                bundle, rescaled, kind, sources, options.through, options.grouping, rescale, options.threads,
                lambda done, total: progress("sensitivity", done, total), partial,
            )
        )  # fmt: skip
        return worst_first(found[0], logits=options.budget.min_recall is not None)

    def measure(kept: Sequence[Unit]) -> Reached:
        return measured(bundle, ranges, kind, [name for unit in kept for name in unit.keep], sources, options, progress)

    exact = Reached()
    if options.budget.min_recall is not None and options.questions is not None:
        entry = bundle.graph_path(step_entry(bundle))
        exact = Reached(None, _asked(entry, options.questions, options.threads, progress))
        if exact.shortfall(Budget(None, options.budget.min_recall)) > 0:
            raise VerificationError(
                f"no mix can meet --min-recall {options.budget.min_recall:g}: the fp32 graph itself has {exact}. Ask for less, or "
                f"train the model further",
                {"fp32": exact.to_json()},
            )
    kept, reached, tried = search(order, measure, options.budget)
    if options.always and not found:
        order()
    if partial is not None:
        partial.unlink(missing_ok=True)
    units = found[0] if found else ()
    mix = Mix(
        bundle.spec.fingerprint, kind.dtype, tuple(unit.name for unit in kept),
        tuple(name for unit in kept for name in unit.keep), len(keepable(bundle, kind)), options.smooth, units_json(units),
        {name: value for name, value in vars(options.budget).items() if value is not None},
        reached.to_json(), tuple(tried), exact.to_json(),
        {**(data or {}), "drift_segments": options.through.segments, "drift_documents": min(len(sources), options.through.documents)},
        made_by(),
    )  # fmt: skip
    return Chosen(mix, units)


def search(
    order: Callable[[], Sequence[Unit]], measure: Measure, budget: Budget
) -> tuple[tuple[Unit, ...], Reached, list[dict[str, Any]]]:
    """The first k units of `order` to be kept, for the smallest k that was found to hold: k grows by doubling until the budget
    holds, then the gap is halved. Each k is measured; that fewer would hold between two that do not is not looked for.

    Returns them, what they reached, and all that was tried. `order` is called only where quantizing everything breaches.
    Errors: VerificationError, when none holds that leaves a product quantized.
    """
    seen: dict[int, Reached] = {0: measure(())}
    if seen[0].holds(budget):
        return (), seen[0], _told(seen)
    units = order()
    most = max((place for place, unit in enumerate(units) if unit.nodes), default=0)
    low, high = 0, None
    while high is None:
        if low == most:
            raise _none(units, seen, budget)
        place = min(max(1, 2 * low), most)
        seen[place] = measure(units[:place])
        low, high = (low, place) if seen[place].holds(budget) else (place, None)
    while high - low > 1:
        place = (low + high) // 2
        seen[place] = measure(units[:place])
        low, high = (low, place) if seen[place].holds(budget) else (place, high)
    return tuple(units[:high]), seen[high], _told(seen)


def _none(units: Sequence[Unit], seen: dict[int, Reached], budget: Budget) -> VerificationError:
    place = min(seen, key=lambda kept: (seen[kept].shortfall(budget), kept))
    names = ", ".join(unit.name for unit in units[:place])
    kept = f"{place} of {len(units)} units kept in float32 ({names:.1500})" if place else "nothing kept in float32"
    return VerificationError(
        f"no mix meets {budget}: the nearest, with {kept}, has {seen[place]}. With all of them kept nothing would be quantized, so "
        f"that nothing was added. Allow more, try --smooth 0.5, or keep to fp32 or fp16",
        {"tried": _told(seen)},
    )


def _told(seen: dict[int, Reached]) -> list[dict[str, Any]]:
    return [{"kept": place, **seen[place].to_json()} for place in sorted(seen)]


def keepable(bundle: Bundle, kind: Kind) -> frozenset[str]:
    """What `static_graph` can be told to keep: products, and tables with their heads."""
    model, found = read_step(bundle)
    names = {name for table in tables(model) for name in (table.name, *table.heads)} if kind.tables else set()
    return frozenset(names | {product.node for product in found})


def measured(
    bundle: Bundle,
    ranges: Ranges,
    kind: Kind,
    keep: Sequence[str],
    sources: Sequence[Source],
    options: MixOptions,
    progress: Progress,
) -> Reached:
    """Writes the graph and measures it; recall is left out where the drift breaks the budget already."""
    with tempfile.TemporaryDirectory(prefix="rmt-calibrate-") as folder:
        path, rescale = Path(folder) / GRAPH, None
        if options.smooth is not None:
            ranges, rescale = smoothed(bundle, ranges, options.smooth, frozenset(keep))
        with quantizable(bundle):
            static_graph(bundle, ranges, path, kind, keep, rescale)
        drifted = drift_of(bundle, path, sources, options, progress)
        reached = Reached(drifted)
        if options.questions is None or reached.shortfall(Budget(options.budget.max_drift)) > 0:
            return reached
        return Reached(drifted, _asked(path, options.questions, options.threads, progress))


def drift_of(bundle: Bundle, path: Path, sources: Sequence[Source], options: MixOptions, progress: Progress) -> Drifted:
    """The drift of a graph beside the bundle's fp32 one, in ONNX Runtime on the CPU."""
    steps = [_stepping(bundle, one, options.threads) for one in (bundle.graph_path(step_entry(bundle)), path)]
    (drifted,) = beside(
        bundle, steps[0], steps[1:], sources, options.through, lambda done, total: progress("drift", done, total)
    )
    return drifted


def _stepping(bundle: Bundle, path: Path, threads: int | None) -> Step:
    session, spec = open_session(path, threads), bundle.spec
    outputs = [*(state.output for state in spec.states), LOGITS]

    def step(states: Any, segment: Any) -> Any:
        *new, logits = session.run(outputs, dict(zip(spec.inputs, (*states, segment), strict=True)))
        return tuple(new), logits

    return step


def _asked(path: Path, questions: Questions, threads: int | None, progress: Progress) -> tuple[Answered, ...]:
    return answered(path, questions, threads, lambda done, total: progress("recall", done, total))
