"""What was added to a bundle for an engine, and what its manifest records of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rmt_trt.bundle import GraphEntry
from rmt_trt.export.graph_check import GraphCheck
from rmt_trt.export.verify import Report
from rmt_trt.runtime.native import HOPPER, NEED


@dataclass(frozen=True)
class NativeGraphs:
    """Graphs with rmt-trt's own operators that were added beside the others: what is known of them.

    fused       as of EngineGraphs
    check       the errors of their twins on the CPU provider, or None where that was left out
    by          what the twins had in the operators' place: "operators", their own kernels for the CPU, or "nodes" of ONNX
                Runtime's that they stand for
    report, unverified   as of EngineGraphs
    """

    fused: dict[str, int]
    check: GraphCheck | None = None
    by: str | None = None
    report: Report | None = None
    unverified: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "fused": dict(sorted(self.fused.items())),
            "check": None if self.check is None else {**self.check.to_json(), "by": self.by},
            "verification": None if self.report is None else summary(self.report),
            "unverified": self.unverified,
        }


@dataclass(frozen=True)
class EngineGraphs:
    """What was added. fused: how often a fused node stands in one step, by its kind; {} of plain graphs.

    plain       why the graphs are plain ones, or None
    check       the errors on the CPU provider, or None where it was left out or is not possible
    report      the verification on the engine, or None
    unverified  why there is none, or None
    native      graphs with rmt-trt's own operators, which stand in `entries` too, or None
    hopper      the same of graphs with kernels for compute capability 9.0
    quantization  of quantized graphs: how, and which products were kept in float, as plain values; else None
    verified_on   the engine that the report is of, where it is another: quantized graphs are verified on the CPU
                  where the machine cannot run their own
    """

    engine: str
    dtype: str
    entries: tuple[GraphEntry, ...]
    fused: dict[str, int]
    plain: str | None = None
    check: GraphCheck | None = None
    report: Report | None = None
    unverified: str | None = None
    native: NativeGraphs | None = None
    hopper: NativeGraphs | None = None
    quantization: dict[str, Any] | None = None
    verified_on: str | None = None

    @property
    def own(self) -> dict[str, NativeGraphs]:
        """Graphs with operators of our own by what they need, the least first."""
        both = {NEED: self.native, HOPPER: self.hopper}
        return {need: graphs for need, graphs in both.items() if graphs is not None}

    def with_own(self, own: Mapping[str, NativeGraphs]) -> EngineGraphs:
        """The same with other knowledge of these."""
        return replace(self, native=own.get(NEED), hopper=own.get(HOPPER))

    def to_json(self) -> dict[str, Any]:
        """What the manifest records: `verification.engines.ENGINE.DTYPE`."""
        return {
            "fused": dict(sorted(self.fused.items())),
            "plain": self.plain,
            "check": None if self.check is None else self.check.to_json(),
            "verification": None if self.report is None else summary(self.report),
            "unverified": self.unverified,
            **{need: own.to_json() for need, own in self.own.items()},
            **({} if self.quantization is None else {"quantization": self.quantization}),
            **({} if self.verified_on is None else {"verified_on": self.verified_on}),
        }


def summary(report: Report) -> dict[str, Any]:
    """What a manifest keeps of a verification."""
    return {
        "passed": report.passed,
        "worst": report.to_json()["worst"],
        "tolerance": report.tolerance,
        **({} if report.needed is None else {"agreement": report.agreement, "needed": report.needed}),
        "segments": report.segments,
        "accepted_drift": not report.passed,
    }


def recorded(verification: Mapping[str, Any], engine: str, dtype: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's `verification` with the record of an engine and dtype in it."""
    engines = verification.get("engines")
    engines = dict(engines) if isinstance(engines, dict) else {}
    before = engines.get(engine)
    engines[engine] = {**(before if isinstance(before, dict) else {}), dtype: dict(record)}
    return {**verification, "engines": engines}
