"""What the tests of graphs added to a bundle share: short checks, and what each graph of a bundle is for."""

from __future__ import annotations

from pathlib import Path

from rmt_trt.bundle import Bundle
from rmt_trt.export import EngineOptions

FEW = EngineOptions(check_segments=3, segments=2)


def uses(path: Path) -> set[tuple[str, str, str, str]]:
    return {(graph.engine, graph.dtype, graph.role, graph.head) for graph in Bundle(path).manifest.graphs}
