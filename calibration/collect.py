"""Ranges along the recurrence: documents are stepped through on the CPU, and drawn segments are looked at."""

from __future__ import annotations

import io
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.bundle import Bundle, made_by
from rmt_trt.calibration.documents import Counted, Source, all_counted, opened
from rmt_trt.calibration.products import products
from rmt_trt.calibration.ranges import Ranges, TensorRange
from rmt_trt.calibration.statistics import METHODS, OCTAVES, Statistics
from rmt_trt.calibration.tapped import tapped_session
from rmt_trt.contract import SEGMENT
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.files import check_target, read_bounded, write_file
from rmt_trt.runtime.runtime import MAX_THREADS
from rmt_trt.runtime.segments import Cut

SAVE_SECONDS = 5.0
PARTIAL_LIMIT = 4 << 30
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CollectOptions:
    """method: "minmax", "entropy" or "percentile". draws: segments drawn from each third of a document, beside the first,
    the last and those after 1, 2, 4, 8, ... others. seed: of the draws. threads: of a step; None takes all cores.
    first_only: look at the first segment of each document alone, as a calibration that knows of no recurrence would."""

    method: str = "minmax"
    draws: int = 8
    seed: int = 0
    threads: int | None = None
    first_only: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ContractError(f"method is {self.method!r:.60}; expected one of {', '.join(METHODS)}")
        for name, least, most in (("draws", 1, 1 << 20), ("seed", 0, 1 << 62), ("threads", 1, MAX_THREADS)):
            value = getattr(self, name)
            if name == "threads" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ContractError(f"{name} is {value!r:.60}; expected a whole number from {least} to {most}")


@dataclass
class _Place:
    """Where the work stands: the next segment of a document, and the states before it, each (1, *shape)."""

    document: int
    segment: int
    states: list[np.ndarray]


def collect(
    bundle: Bundle | Path | str,
    sources: Sequence[Source],
    options: CollectOptions = CollectOptions(),
    partial: Path | None = None,
    progress: Progress = lambda done, total: None,
    data: Mapping[str, Any] | None = None,
) -> Ranges:
    """Steps through every document with the bundle's fp32 graph and takes the ranges of its states, and of the tensors
    that are to be quantized, in segments drawn early, middle and late. Memory does not grow with the length.

    partial   a file in which the work is kept as it goes on, and from which it goes on where it was stopped; removed at
              the end. The ranges are those of a run without a stop
    progress  called with (tokens read, tokens in all)
    data      what the documents are, for the record

    Errors: ContractError without documents or products, for a tensor that is constant, nan or infinite (by its name);
    TokenError for a document that is empty, too short, or holds ids out of range; FormatError for a partial file of
    other work.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    spec = bundle.spec
    about = all_counted(sources, spec, options.draws, options.seed)
    if options.first_only:
        about = [replace(one, drawn=(0,)) for one in about]
    if partial is not None:
        check_target(partial)
    with tempfile.TemporaryDirectory(prefix="rmt-calibrate-") as folder:
        session, chosen = tapped_session(bundle, Path(folder), lambda model: products(model, spec), options.threads)
        states = [state.input for state in spec.states]
        names = [*states, *dict.fromkeys(product.activation for product in chosen)]
        statistics = Statistics(names, options.method, len(states))
        key = _key(spec.fingerprint, options, about, statistics.names)
        place = _Place(0, 0, _initial(bundle))
        if partial is not None and partial.exists():
            place = _resumed(partial, key, statistics, len(states))
        _run(bundle, session, sources, about, statistics, place, partial, key, progress)
    found = _ranges(statistics)
    for name in statistics.names[len(states) :]:
        if found[name].low == found[name].high:
            raise ContractError(
                f"tensor '{name}' is constant, {found[name].low:g} in every segment that was looked at: it has no range to be "
                f"quantized in. Calibrate with documents as the model reads them in use"
            )
    if partial is not None:
        partial.unlink(missing_ok=True)
    return Ranges(
        spec.fingerprint, options.method, options.seed,
        {name: found[name] for name in states}, {name: found[name] for name in statistics.names[len(states) :]},
        tuple(asdict(one) for one in about), dict(data or {}), made_by(onnxruntime=version("onnxruntime")),
        {name: tuple(statistics.channels[name].tolist()) for name in statistics.names[len(states) :]},
    )  # fmt: skip


def _run(
    bundle: Bundle,
    session: Any,
    sources: Sequence[Source],
    about: Sequence[Counted],
    statistics: Statistics,
    place: _Place,
    partial: Path | None,
    key: str,
    progress: Progress,
) -> None:
    spec, saved = bundle.spec, time.monotonic()
    inputs, outputs = [state.input for state in spec.states], [state.output for state in spec.states]
    tapped = [name for name in statistics.names if name not in inputs]
    total = sum(one.tokens for one in about)
    while place.document < len(about):
        one, source = about[place.document], sources[place.document]
        reader, plan = opened(source, one, spec)
        reader.skip(_tokens_before(plan, place.segment))
        done = sum(before.tokens for before in about[: place.document])
        drawn = set(one.drawn)
        while place.segment <= one.drawn[-1]:
            ids = reader.read(plan.size(place.segment))
            feeds = {**dict(zip(inputs, place.states, strict=True)), SEGMENT: ids[None]}
            looked = place.segment in drawn
            values = session.run([*outputs, *tapped] if looked else outputs, feeds)
            if looked:
                taken = {**feeds, **dict(zip(tapped, values[len(outputs) :], strict=True))}
                statistics.add(taken, one.part(place.segment), place.segment, one.name)
            place.states, place.segment = values[: len(outputs)], place.segment + 1
            if partial is not None and time.monotonic() - saved >= SAVE_SECONDS:
                _save(partial, key, statistics, place)
                saved = time.monotonic()
            behind = place.segment > one.drawn[-1]
            progress(done + (one.tokens if behind else _tokens_before(plan, place.segment)), total)
        place.document, place.segment, place.states = place.document + 1, 0, _initial(bundle)


def _tokens_before(plan: Cut, segment: int) -> int:
    return 0 if segment == 0 else plan.first + (segment - 1) * plan.rest


def _initial(bundle: Bundle) -> list[np.ndarray]:
    return [value[None] for value in bundle.initial()]


def _ranges(statistics: Statistics) -> dict[str, TensorRange]:
    """What was gathered, by tensor."""
    thresholds, found = statistics.thresholds(), {}
    for number, name in enumerate(statistics.names):
        octaves = [(octave, *statistics.along[number, octave].tolist()) for octave in range(OCTAVES)]
        along = tuple(((1 << octave) // 2, low, high) for octave, low, high in octaves if low <= high)
        bounds = [(float(low), float(high)) for low, high in statistics.parts[number]]
        middle, late = (part if part[0] <= part[1] else None for part in bounds[1:])
        found[name] = TensorRange(float(thresholds[number]), bounds[0], middle, late, along)
    return found


def _key(fingerprint: str, options: CollectOptions, about: Sequence[Counted], names: Sequence[str]) -> str:
    """What has to be the same for work to go on."""
    what = {"method": options.method, "draws": options.draws, "seed": options.seed}
    return json.dumps([fingerprint, what, [asdict(one) for one in about], list(names)], sort_keys=True)


def _save(path: Path, key: str, statistics: Statistics, place: _Place) -> None:
    held = io.BytesIO()
    states = {f"state.{number}": value for number, value in enumerate(place.states)}
    at = np.array([place.document, place.segment])
    np.savez(held, key=np.array(key), at=at, **states, **statistics.arrays())  # type: ignore[arg-type]
    write_file(path, held.getvalue())


def _resumed(path: Path, key: str, statistics: Statistics, states: int) -> _Place:
    """Errors: FormatError, for a file that is none of this work's."""
    data = read_bounded(path, PARTIAL_LIMIT, "the kept work of a calibration")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        same = str(arrays["key"]) == key
        if same:
            statistics.restore(arrays)
            document, segment = map(int, arrays["at"])
            return _Place(document, segment, [arrays[f"state.{number}"] for number in range(states)])
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as err:
        raise FormatError(f"{path} is no kept work of a calibration ({err!s:.200}). Remove it to begin anew") from err
    raise FormatError(
        f"{path} is kept work of a calibration with another model, other documents or options. Remove it to begin anew, or "
        f"give what it was begun with"
    )
