"""Ranges of tensors, gathered segment by segment at constant memory; histograms and thresholds by onnxruntime.quantization.

Its calibrators as a whole keep every activation of a call, skip NaN without a word and cannot be stopped and resumed.
So their histogram collector is fed here, one segment at a time.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmt_trt.calibration.documents import PARTS
from rmt_trt.errors import ContractError, require

METHODS = ("minmax", "entropy", "percentile")
PERCENTILE = 99.999
# Half the bins are positive values', so that the entropy method has 64 to 512 of them to choose a threshold from. With
# its own default, 128 bins for 128 steps, there would be nothing to choose.
BINS = {"entropy": 1024, "percentile": 2048}
MOST_BINS = 2048  # a range that grows widens the bins from here on
STEPS = 128
OCTAVES = 41  # segment 0, 1, 2-3, 4-7, ...: no document has more than 2**40 segments


class Statistics:
    """parts (n, 3, 2) and along (n, OCTAVES, 2): smallest and largest value of each tensor by part and octave.
    channels: largest magnitude of each tensor in each place of its last axis, float32, of those that are to be quantized.

    states  so many of the names come first that are not to be quantized: their threshold is their largest magnitude
    """

    def __init__(self, names: Sequence[str], method: str, states: int = 0) -> None:
        self.names = tuple(names)
        self._states = states
        self.method = method
        empty = np.array([np.inf, -np.inf], np.float32)
        self.parts = np.tile(empty, (len(names), len(PARTS), 1))
        self.along = np.tile(empty, (len(names), OCTAVES, 1))
        self.channels: dict[str, np.ndarray] = {}
        self._collector: Any = None
        if method != "minmax":
            calibrate = require("onnxruntime.quantization.calibrate", "export", "calibration")
            self._collector = calibrate.HistogramCollector(method, True, BINS[method], STEPS, PERCENTILE, "same")

    def add(self, values: Mapping[str, np.ndarray], part: int, segment: int, where: str) -> None:
        """One segment's tensors. Errors: ContractError, naming the tensor, for values that are not finite."""
        for number, name in enumerate(self.names):
            value = np.asarray(values[name], np.float32)
            found = np.array([value.min(), value.max()])
            if not np.isfinite(found).all():
                raise ContractError(
                    f"tensor '{name}' is {'nan' if np.isnan(found).any() else 'infinite'} in segment {segment} of {where}: the "
                    f"fp32 step itself fails there, so that no range can be taken. See with rmt-verify where it begins"
                )
            for kept in (self.parts[number, part], self.along[number, segment.bit_length()]):
                kept[:] = min(kept[0], found[0]), max(kept[1], found[1])
            if number < self._states:
                continue
            channels = np.abs(value).max(axis=tuple(range(value.ndim - 1)))
            self.channels[name] = np.maximum(channels, self.channels.get(name, channels))
            if self._collector is not None:
                self._count(name, value, float(np.abs(found).max()))

    def _count(self, name: str, value: np.ndarray, largest: float) -> None:
        held = self._collector.histogram_dict
        if name in held:
            coarser = _coarser if self.method == "entropy" else _coarser_magnitudes
            held[name] = coarser(held[name], largest)
        # `collect` itself prints a line each time.
        count = self._collector.collect_value if self.method == "entropy" else self._collector.collect_absolute_value
        count({name: value})

    def thresholds(self) -> np.ndarray:
        """(n,) float32: what each tensor is to be quantized with is -threshold to threshold."""
        # A third out of which no segment was looked at has no bounds.
        largest: np.ndarray = np.abs(np.where(np.isfinite(self.parts), self.parts, 0)).max(axis=(1, 2))
        if self._collector is None:
            return largest
        with contextlib.redirect_stdout(io.StringIO()):
            found = self._collector.compute_collection_result()
        for number, name in enumerate(self.names[self._states :], self._states):
            # A bin's edge may lie a little beyond the largest value.
            largest[number] = min(largest[number], np.abs(np.array(found[name][:2], np.float32)).max())
        return largest

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was gathered, by name, for a file to go on from."""
        found = {"parts": self.parts, "along": self.along}
        for number, name in enumerate(self.names):
            if name in self.channels:
                found[f"channels.{number}"] = self.channels[name]
        if self._collector is not None:
            for number, name in enumerate(self.names):
                for place, value in enumerate(self._collector.histogram_dict.get(name, ())):
                    found[f"histogram.{number}.{place}"] = np.asarray(value)
        return found

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `arrays` gave. Errors: KeyError or ValueError, where it is not that."""
        for name in ("parts", "along"):
            getattr(self, name)[...] = arrays[name]
        held = {name: f"channels.{number}" for number, name in enumerate(self.names)}
        self.channels = {name: arrays[key] for name, key in held.items() if key in arrays}
        if self._collector is None:
            return
        for number, name in enumerate(self.names):
            places = [key for key in arrays if key.startswith(f"histogram.{number}.")]
            values = [arrays[f"histogram.{number}.{place}"] for place in range(len(places))]
            if values:
                self._collector.histogram_dict[name] = tuple(value if value.ndim else value[()] for value in values)


def _coarser_magnitudes(held: tuple[Any, ...], largest: float) -> tuple[Any, ...]:
    """A histogram of magnitudes whose bins are so wide that MOST_BINS of them reach `largest`."""
    counts, edges, *rest = held
    while (largest - edges[0]) / (edges[1] - edges[0]) > MOST_BINS:
        if len(counts) % 2:
            counts, edges = np.append(counts, 0), np.append(edges, 2 * edges[-1] - edges[-2])
        counts, edges = counts[::2] + counts[1::2], edges[::2]
    return counts, edges, *rest


def _coarser(held: tuple[Any, ...], largest: float) -> tuple[Any, ...]:
    """The same of a histogram from -bound to bound, whose middle stays an edge."""
    counts, edges, low, high, bound = held
    while bound > 0 and len(counts) * largest / bound > MOST_BINS:
        if len(counts) % 4:
            counts, bound = np.pad(counts, 1), bound * (len(counts) + 2) / len(counts)
        counts = counts[::2] + counts[1::2]
        edges = np.linspace(-bound, bound, len(counts) + 1).astype(np.float32)
    return counts, edges, low, high, np.asarray(bound, np.float32)
