"""`ranges.json`: the ranges of a step's tensors along the recurrence, to be read, compared and used again."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.calibration.documents import PARTS
from rmt_trt.calibration.statistics import METHODS, OCTAVES
from rmt_trt.contract import StepSpec
from rmt_trt.errors import FormatError
from rmt_trt.files import read_json, write_file

FORMAT = "rmt-trt-ranges"
FORMAT_VERSION = 1
LIMIT = 256 << 20
CHANNELS_VERSION = 1  # of `channels` alone: readers that do not know it pass it over
MOST_CHANNELS = 1 << 20  # of one tensor
LARGEST = float(np.finfo(np.float32).max)
Bounds = tuple[float, float]


@dataclass(frozen=True)
class TensorRange:
    """Smallest and largest value of a tensor.

    threshold  it is quantized from -threshold to threshold
    early, middle, late   the bounds in the segments drawn from that third of the documents; None where none was drawn
    along      (first segment of an octave, lowest, highest): segment 0, 1, from 2 on, from 4 on, ...; octaves out of
               which no segment was drawn are left out
    """

    threshold: float
    early: Bounds
    middle: Bounds | None
    late: Bounds | None
    along: tuple[tuple[int, float, float], ...] = ()

    @property
    def low(self) -> float:
        return min(part[0] for part in (self.early, self.middle, self.late) if part is not None)

    @property
    def high(self) -> float:
        return max(part[1] for part in (self.early, self.middle, self.late) if part is not None)


@dataclass(frozen=True)
class Ranges:
    """Of one model, by what they were taken from.

    fingerprint  of the model; ranges of another are refused
    states       the ranges of the states by the graph's names, which are not quantized
    tensors      those of the products' inputs, by name
    documents    what `Counted` says of each, the segments that were looked at among it
    data         what a command was given, for a reader
    channels     largest magnitude of each tensor in each place of its last axis, (k,) float32 values; {} of files that were
                 written before these were taken
    """

    fingerprint: str
    method: str
    seed: int
    states: dict[str, TensorRange]
    tensors: dict[str, TensorRange]
    documents: tuple[dict[str, Any], ...]
    data: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)
    channels: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def segments(self) -> int:
        """How many segments were looked at."""
        return sum(len(document["drawn"]) for document in self.documents)

    def save(self, path: Path) -> None:
        """Errors: FormatError, when it cannot be written."""
        value = asdict(self) | {"format": FORMAT, "format_version": FORMAT_VERSION}
        coded = {name: _coded(channels) for name, channels in self.channels.items()}
        value["channels"] = {
            "version": CHANNELS_VERSION,
            "encoding": "base64 of little-endian float32",
            "values": coded,
        }
        for group in ("states", "tensors"):
            for name, tensor in getattr(self, group).items():
                value[group][name] |= {"low": tensor.low, "high": tensor.high}
        write_file(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())

    def require_model(self, spec: StepSpec, where: object) -> None:
        """Errors: FormatError, for ranges of another model than `where` holds."""
        if self.fingerprint != spec.fingerprint:
            raise FormatError(
                f"the ranges were taken from a model with fingerprint {self.fingerprint[:12]}..., and {where} holds "
                f"{spec.fingerprint[:12]}... Calibrate this model with rmt-calibrate"
            )


def compare(a: Ranges, b: Ranges) -> dict[str, float]:
    """How many times as wide each quantized tensor's range is in `b` as in `a`; 1 where they agree.

    Errors: FormatError, for ranges of two models, or of other tensors.
    """
    if a.fingerprint != b.fingerprint:
        raise FormatError(
            f"ranges of two models are compared, {a.fingerprint[:12]}... and {b.fingerprint[:12]}...; expected one model"
        )
    other = sorted(a.tensors.keys() ^ b.tensors.keys())
    if other:
        raise FormatError(f"only one of the two ranges has the tensor {other[0]!r:.80}; take both from one export")
    return {name: b.tensors[name].threshold / a.tensors[name].threshold for name in a.tensors}


def load_ranges(path: Path | str) -> Ranges:
    """Reads what `Ranges.save` wrote. Errors: FormatError, naming the file and what is wrong in it."""
    path = Path(path)
    value = read_json(path, LIMIT, "ranges that rmt-calibrate wrote")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FormatError(f'{path} holds no ranges (no "format": "{FORMAT}"). Write them with rmt-calibrate')
    if type(value.get("format_version")) is not int or value["format_version"] != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {value.get('format_version')!r:.40}; this rmt-trt reads version {FORMAT_VERSION}"
        )
    try:
        known = {one.name: value[one.name] for one in fields(Ranges) if one.name != "channels"}
        known["channels"] = _channels(value.get("channels"))
        for group in ("states", "tensors"):
            known[group] = {name: _tensor(name, one) for name, one in known[group].items()}
        known["documents"] = tuple(_document(one) for one in known["documents"])
        ranges = Ranges(**known)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
        raise FormatError(
            f"{path} is damaged or was altered ({err!s:.200}). Write it again with rmt-calibrate"
        ) from err
    if ranges.method not in METHODS or not isinstance(ranges.fingerprint, str) or not ranges.tensors:
        raise FormatError(f"{path} is damaged: it lacks a known method, a fingerprint or tensors. Write it again")
    return ranges


def _document(value: Any) -> dict[str, Any]:
    if not all(type(number) is int for number in value["drawn"]):
        raise ValueError("a document's drawn segments are no whole numbers")
    return {**value, "drawn": tuple(value["drawn"])}


def _tensor(name: str, value: Mapping[str, Any]) -> TensorRange:
    if len(value["along"]) > OCTAVES:
        raise ValueError(f"tensor {name!r:.80} has {len(value['along'])} octaves")
    along = tuple((int(start), *_bounds(name, bounds)) for start, *bounds in value["along"])
    threshold = float(value["threshold"])
    if not 0 <= threshold <= LARGEST:
        raise ValueError(f"tensor {name!r:.80} has the threshold {threshold}")
    middle, late = (None if value[part] is None else _bounds(name, value[part]) for part in PARTS[1:])
    return TensorRange(threshold, _bounds(name, value["early"]), middle, late, along)


def _coded(channels: tuple[float, ...]) -> str:
    return base64.b64encode(np.array(channels, "<f4").tobytes()).decode("ascii")


def _channels(value: Any) -> dict[str, tuple[float, ...]]:
    """Those of a version that is known; {} of any other."""
    if value is None or value["version"] != CHANNELS_VERSION:
        return {}
    found = {}
    for name, text in value["values"].items():
        if len(text) > 6 * MOST_CHANNELS:
            raise ValueError(f"tensor {name!r:.80} has more than {MOST_CHANNELS} channels")
        channels = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
        if not len(channels) or not np.isfinite(channels).all() or channels.min() < 0:
            raise ValueError(f"tensor {name!r:.80} has channels that are no magnitudes")
        found[name] = tuple(channels.tolist())
    return found


def _bounds(name: str, value: Any) -> Bounds:
    low, high = map(float, value)
    if not -LARGEST <= low <= high <= LARGEST:
        raise ValueError(f"tensor {name!r:.80} has the bounds {low} to {high}")
    return low, high
