"""rmt-calibrate's part about mixed precision: which products stay in float32, by a budget, by a file, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rmt_trt.bundle import Bundle
from rmt_trt.commands.app import printable
from rmt_trt.commands.bench import whole_numbers
from rmt_trt.commands.stages import shown_stages
from rmt_trt.errors import ContractError, EngineError

if TYPE_CHECKING:
    import numpy as np

    from rmt_trt.calibration import Kind, Ranges, Source
    from rmt_trt.calibration.mix import Mix
    from rmt_trt.calibration.search import Chosen, MixOptions
    from rmt_trt.calibration.sensitivity import UnitDrift
    from rmt_trt.training.tasks.task import Task

MIX, PLOT, PARTIAL = "mix.json", "sensitivity.png", "sensitivity.npz"
SHOWN = 12  # units in the table on the screen
LABELS = {"sensitivity": "each unit quantized alone", "drift": "the mix beside fp32", "recall": "asking the mix"}

MaxDrift = Annotated[
    float | None,
    typer.Option(
        help="Keep products in float32 until the memory's relative L2 error, at worst along the recurrence, is at most this."
    ),
]
MinRecall = Annotated[
    float | None,
    typer.Option(help="Keep products in float32 until this share of the --task's questions is answered right."),
]
Sensitivity = Annotated[bool, typer.Option("--sensitivity", help="Measure each unit quantized alone, in any case.")]
MixFile = Annotated[Path | None, typer.Option("--mix", help=f"{MIX} of an earlier run: keep what it keeps.")]
Units = Annotated[
    str | None, typer.Option(help="What is kept as one: products, inputs or layers. [default: by their number]")
]
Smooth = Annotated[
    float | None,
    typer.Option(help="Rescale channels before quantizing (SmoothQuant), with this alpha from 0 to 1. [default: not]"),
]
DriftSegments = Annotated[int, typer.Option(help="Segments of a document that drift is measured over.")]
DriftDocuments = Annotated[int, typer.Option(help="Documents that drift is measured over.")]
RecallSegments = Annotated[str, typer.Option(help="Segments of the questions' documents, with commas.")]
RecallQuestions = Annotated[int, typer.Option(help="Questions at each number of segments.")]


@dataclass(frozen=True)
class Wanted:
    """What the options say, checked. `options` lacks the questions until `fitted` has them.

    file, mix            an earlier run's
    segments, questions  of the recall
    """

    options: MixOptions
    file: Path | None
    mix: Mix | None
    segments: tuple[int, ...]
    questions: int

    @property
    def mixes(self) -> bool:
        """Whether anything but the plain quantized graph is asked for."""
        return self.measures or self.mix is not None or self.options.smooth is not None

    @property
    def measures(self) -> bool:
        """Whether documents are needed beside the ranges."""
        return bool(self.options.budget) or self.options.always


@dataclass(frozen=True)
class Plan:
    """What is to be written: `keep`, `rescale` and `record` of `add_static`, and the ranges for them."""

    ranges: Ranges
    keep: frozenset[str] = frozenset()
    rescale: dict[str, np.ndarray] | None = None
    record: dict[str, Any] = field(default_factory=dict)


def wanted(
    max_drift: float | None,
    min_recall: float | None,
    sensitivity: bool,
    file: Path | None,
    units: str | None,
    smooth: float | None,
    through: tuple[int, int],
    recall: tuple[str, int],
    task: str | None,
    documents: bool,
    threads: int | None,
) -> Wanted:
    """through: segments and documents. documents: whether there are any. Errors: ContractError."""
    from rmt_trt.calibration.beside import Through
    from rmt_trt.calibration.mix import Budget, load_mix
    from rmt_trt.calibration.recall import check_questions
    from rmt_trt.calibration.search import NO_QUESTIONS, MixOptions
    from rmt_trt.calibration.smooth import check_alpha
    from rmt_trt.calibration.units import check_grouping

    budget = Budget(max_drift, min_recall)
    if smooth is not None:
        check_alpha(smooth)
    if min_recall is not None and task is None:
        raise ContractError(NO_QUESTIONS)
    if file is not None and (budget or sensitivity):
        raise ContractError(
            f"--mix {file} is a mix that was found; leave out --max-drift, --min-recall and --sensitivity"
        )
    mix = None if file is None else load_mix(file)
    if mix is not None and smooth not in (None, mix.smooth):
        raise ContractError(
            f"--smooth is {smooth:g}, and {file} was found with {mix.smooth}; leave --smooth out, or find another mix"
        )
    if (budget or sensitivity) and not documents:
        asked = str(budget) or "--sensitivity"
        raise ContractError(f"{asked} is measured on documents; give --data FILE or --task NAMES beside --ranges")
    numbers = tuple(whole_numbers("--recall-segments", recall[0]))
    check_questions(numbers, recall[1])
    options = MixOptions(budget, Through(*through), check_grouping(units), None, sensitivity, smooth, threads)
    return Wanted(options, file, mix, numbers, recall[1])


def fitted(want: Wanted, bundle: Bundle, use: tuple[str, str], task: Task | None) -> Wanted:
    """The same with the questions of the task, when all of it fits the bundle. use: engine and dtype.

    Errors: FormatError, for a mix of another model, dtype or export; ContractError, for documents that are too short for
    their questions.
    """
    from rmt_trt.calibration.add import STATIC
    from rmt_trt.calibration.recall import Questions, check_lengths
    from rmt_trt.calibration.search import keepable

    if want.mix is not None and want.file is not None:
        kind = STATIC[use]
        known = keepable(bundle, kind)
        want.mix.require(bundle.spec, kind.dtype, known, want.file)
        if known <= set(want.mix.products):
            raise ContractError(
                f"{want.file} keeps all {len(known)} products; there is nothing left to quantize. Find a mix with a larger "
                f"--max-drift, or run the fp32 graph"
            )
    if want.options.budget.min_recall is None or task is None:
        return want
    questions = Questions(task, want.segments, want.questions)
    check_lengths(questions, bundle.spec)
    return replace(want, options=replace(want.options, questions=questions))


def plan(
    bundle: Bundle,
    ranges: Ranges,
    use: tuple[str, str],
    want: Wanted,
    sources: Sequence[Source],
    about: dict[str, Any],
    out: Path,
    resume: bool,
    screen: Console,
) -> Plan:
    """The mix that is asked for. use: engine and dtype. want: `fitted`. A measured one is written into `out`.

    Errors: as `choose_mix` and `smoothed`; ContractError for a mix that leaves nothing to quantize.
    """
    from rmt_trt.calibration.add import STATIC

    mix = want.mix
    if mix is not None:
        return _planned(bundle, ranges, mix.products, mix.smooth, mix.record())
    if not want.measures:
        return _planned(bundle, ranges, (), want.options.smooth, {})
    if not resume:
        (out / PARTIAL).unlink(missing_ok=True)
    chosen = _chosen(bundle, ranges, STATIC[use], want.options, sources, about, out, screen)
    _write(chosen, out, screen)
    return _planned(bundle, ranges, chosen.mix.products, chosen.mix.smooth, chosen.mix.record())


def _planned(
    bundle: Bundle, ranges: Ranges, products: Sequence[str], smooth: float | None, record: dict[str, Any]
) -> Plan:
    from rmt_trt.calibration.smooth import smoothed

    keep = frozenset(products)
    if smooth is None:
        return Plan(ranges, keep, None, record)
    rescaled, rescale = smoothed(bundle, ranges, smooth, keep)
    return Plan(rescaled, keep, rescale, {"smooth": smooth, **record})


def _chosen(
    bundle: Bundle,
    ranges: Ranges,
    kind: Kind,
    options: MixOptions,
    sources: Sequence[Source],
    about: dict[str, Any],
    out: Path,
    screen: Console,
) -> Chosen:
    from rmt_trt.calibration.search import choose_mix

    with shown_stages(screen, LABELS) as show:
        try:
            return choose_mix(bundle, ranges, kind, sources, options, show, about, out / PARTIAL)
        except KeyboardInterrupt:
            screen.print("interrupted; the ranges stand. Go on with --resume, and --ranges beside the documents")
            raise SystemExit(130) from None


def _write(chosen: Chosen, out: Path, screen: Console) -> None:
    """mix.json, the plot and the table of sensitivities, and what the mix reached."""
    from rmt_trt.calibration.mix_plot import draw_sensitivity

    mix, written = chosen.mix, [MIX]
    mix.save(out / MIX)
    if chosen.found:
        screen.print(_table(chosen.found, mix.kept))
        try:
            draw_sensitivity(out / PLOT, chosen.found, mix.kept)
            written.append(PLOT)
        except EngineError as err:
            screen.print(f"no plot: {err}")
    kept = ", ".join(map(printable, mix.kept)) if mix.kept else "nothing"
    screen.print(f"kept in float32: {kept}. {mix.said}")
    screen.print(", ".join(f"{out}/{name}" for name in written))


def _table(found: Sequence[UnitDrift], kept: Sequence[str]) -> Table:
    """The worst units, and the ways of the memory."""
    table = Table(title="each unit quantized alone: relative L2 error against fp32", title_justify="left")
    table.add_column("unit", no_wrap=True, overflow="ellipsis", min_width=36)
    for name in ("memory, worst", "at the end", "logits, worst", "answers changed"):
        table.add_column(name, justify="right")
    rows = sorted(found, key=lambda one: -one.drifted.drift)
    for place, one in enumerate(rows):
        if place < SHOWN or one.unit.way or one.unit.name in kept:
            drifted = one.drifted
            table.add_row(
                printable(one.unit.name) + (" *" if one.unit.name in kept else ""), f"{drifted.drift:.1e}",
                f"{drifted.end.memory:.1e}", f"{drifted.logits:.1e}", f"{drifted.changed:.1%}",
            )  # fmt: skip
    table.caption = f"{len(rows)} units" + (", * kept in float32" if kept else "")
    table.caption_justify = "left"
    return table
