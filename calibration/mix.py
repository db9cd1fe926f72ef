"""`mix.json`: which products a quantized graph keeps in float32, the evidence for it, and the budget that it meets."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rmt_trt.calibration.beside import Drifted
from rmt_trt.calibration.recall import Answered
from rmt_trt.calibration.sensitivity import UnitDrift
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.files import read_json, write_file

FORMAT = "rmt-trt-mix"
FORMAT_VERSION = 1
LIMIT = 8 << 20


@dataclass(frozen=True)
class Budget:
    """max_drift: of the memory, as `Drifted.drift` says it. min_recall: share of right answers at each number of segments.
    At least one of them."""

    max_drift: float | None = None
    min_recall: float | None = None

    def __post_init__(self) -> None:
        for name, what in (("max_drift", "a relative error"), ("min_recall", "a share of right answers")):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ContractError(
                    f"--{name.replace('_', '-')} is {value!r:.60}; expected {what}, above 0 and up to 1"
                )

    def __bool__(self) -> bool:
        return self.max_drift is not None or self.min_recall is not None

    def __str__(self) -> str:
        parts = {"--max-drift": self.max_drift, "--min-recall": self.min_recall}
        return " and ".join(f"{name} {value:g}" for name, value in parts.items() if value is not None)


@dataclass(frozen=True)
class Reached:
    """What was measured of a graph: drift, and recall at each number of segments; None and () where it was not."""

    drifted: Drifted | None = None
    recall: tuple[Answered, ...] = ()

    def holds(self, budget: Budget) -> bool:
        return self.shortfall(budget) <= 0

    def shortfall(self, budget: Budget) -> float:
        """How far from the budget, as a share of it; 0 or less where it holds. inf where what it asks for was not measured."""
        found = []
        if budget.max_drift is not None:
            found.append(math.inf if self.drifted is None else self.drifted.drift / budget.max_drift - 1)
        if budget.min_recall is not None and not any(short > 0 for short in found):
            least = min((one.share for one in self.recall), default=-math.inf)
            found.append(1 - least / budget.min_recall)
        return max(found, default=0.0)

    def __str__(self) -> str:
        parts = [] if self.drifted is None else [f"drift {self.drifted.drift:.1e}"]
        parts += [f"{one.right} of {one.count} right at {one.segments} segments" for one in self.recall]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        drifted = None if self.drifted is None else drifted_json(self.drifted)
        return {"drift": drifted, "recall": [asdict(one) for one in self.recall]}


@dataclass(frozen=True)
class Mix:
    """Of one model and dtype.

    kept      units that stay float32, and `products`: what `static_graph` is told to keep for that; of `of` products and tables
    smooth    alpha of the rescaling it was found with, or None
    units     each unit quantized alone, worst first: name, products, drift; () where the budget held with all quantized
    budget, reached, tried, fp32   what was asked for, what the mix measured, what others measured, by how many units each
              kept, and what the fp32 graph answers; plain values
    data      what a command was given, for a reader
    """

    fingerprint: str
    dtype: str
    kept: tuple[str, ...]
    products: tuple[str, ...]
    of: int
    smooth: float | None = None
    units: tuple[dict[str, Any], ...] = ()
    budget: dict[str, Any] = field(default_factory=dict)
    reached: dict[str, Any] = field(default_factory=dict)
    tried: tuple[dict[str, Any], ...] = ()
    fp32: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Errors: FormatError, when it cannot be written."""
        value = asdict(self) | {"format": FORMAT, "format_version": FORMAT_VERSION}
        write_file(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())

    @property
    def said(self) -> str:
        """What it reached, in words."""
        drift = self.reached.get("drift") or {}
        parts = [f"drift of the memory {drift['worst']:.1e}"] if isinstance(drift.get("worst"), float) else []
        for name, recall in (("", self.reached.get("recall", ())), ("fp32: ", self.fp32.get("recall", ()))):
            parts += [f"{name}{one['right']} of {one['count']} right at {one['segments']} segments" for one in recall]
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """What a bundle's manifest says of it: of each unit its largest errors."""
        units = [
            {name: unit.get(name) for name in ("unit", "keep", "worst", "logits", "changed")} for unit in self.units
        ]
        value = {name: getattr(self, name) for name in ("kept", "budget", "reached", "fp32", "smooth")}
        return {"mix": {**value, "units": units}}

    def require(self, spec: StepSpec, dtype: str, known: Collection[str], where: Path) -> None:
        """known: what the step has that could be kept. Errors: FormatError, for a mix of another model, dtype or export."""
        if self.fingerprint != spec.fingerprint:
            raise FormatError(
                f"{where} is a mix of a model with fingerprint {self.fingerprint[:12]!r}..., and the bundle holds "
                f"{spec.fingerprint[:12]}... Find one for this model with --max-drift or --min-recall"
            )
        if self.dtype != dtype:
            raise FormatError(
                f"{where} is a mix found for {self.dtype!r:.20}; the evidence says nothing of {dtype}. Find one for it"
            )
        unknown = sorted(set(self.products) - set(known))
        if unknown:
            raise FormatError(
                f"{where} keeps {unknown[0]!r:.80}, which is no product of this bundle's step: it was found with another export. "
                f"Find one for this bundle with --max-drift or --min-recall"
            )


def load_mix(path: Path | str) -> Mix:
    """Reads what `Mix.save` wrote. Errors: FormatError, naming the file and what is wrong in it."""
    path = Path(path)
    value = read_json(path, LIMIT, "a mix that rmt-calibrate wrote")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FormatError(
            f'{path} holds no mix (no "format": "{FORMAT}"). Write one with rmt-calibrate --max-drift or --min-recall'
        )
    if type(value.get("format_version")) is not int or value["format_version"] != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {value.get('format_version')!r:.40}; this rmt-trt reads version {FORMAT_VERSION}"
        )
    try:
        json.dumps(value, allow_nan=False)  # its evidence goes into a manifest, which is to be JSON for any reader
        known = {one.name: value[one.name] for one in fields(Mix)}
        for name in ("kept", "products", "units", "tried"):
            if not isinstance(known[name], list):
                raise ValueError(f"{name} is {known[name]!r:.40}")
        for name in ("kept", "products"):
            known[name] = tuple(_text(name, one) for one in known[name])
        for name in ("fingerprint", "dtype"):
            _text(name, known[name])
        for name in ("units", "tried"):
            known[name] = tuple({**one} for one in known[name])
        smooth = known["smooth"]
        if smooth is not None and not (type(smooth) in (int, float) and 0 <= smooth <= 1):
            raise ValueError(f"smooth is {smooth!r:.40}")
        for name in ("budget", "reached", "fp32", "data", "made_by"):
            known[name] = {**known[name]}
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise FormatError(
            f"{path} is damaged or was altered ({err!s:.200}). Write it again with rmt-calibrate"
        ) from err
    return Mix(**known)


def drifted_json(drifted: Drifted) -> dict[str, Any]:
    """Plain values of JSON, which knows no infinity: None stands for it."""
    along = [{name: _finite(item) for name, item in asdict(at).items()} for at in drifted.along]
    end = {name: _finite(item) for name, item in asdict(drifted.end).items()}
    return {
        "worst": _finite(drifted.drift), "logits": _finite(drifted.logits), "along": along, "end": end,
        "changed": drifted.changed, "ends_changed": drifted.ends,
    }  # fmt: skip


def units_json(found: Sequence[UnitDrift]) -> tuple[dict[str, Any], ...]:
    """Plain values, worst first."""
    rows = sorted(found, key=lambda one: -one.drifted.drift)
    return tuple({"unit": one.unit.name, "keep": list(one.unit.keep), **drifted_json(one.drifted)} for one in rows)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} holds {value!r:.40}")
    return value
