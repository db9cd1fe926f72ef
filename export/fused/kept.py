"""The rows of the last layer that are read: of the others nothing but keys and values is needed there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rmt_trt.export.fused.graph import Graph


@dataclass(frozen=True, eq=False)
class Kept:
    """`size` rows. at: the first of them, the others follow; or where each document has its own, (batch, size, 1) int64."""

    size: int
    at: int | ir.Value

    def rows(self, graph: Graph, value: ir.Value) -> ir.Value:
        """(batch, L, d) -> (batch, size, d)"""
        if isinstance(self.at, int):
            return graph.slice(value, self.at, self.at + self.size)
        return graph.node("GatherND", value, self.at, batch_dims=1)


def rows_from(graph: Graph, count: int | ir.Value, start: int, size: int) -> Kept:
    """`size` rows from row `count` + `start` on. count: one for all documents, or (batch, 1) int64 of each."""
    if isinstance(count, int):
        return Kept(size, count + start)
    places = graph.node("Add", count, graph.constant(np.arange(start, start + size)[None]))
    return Kept(size, graph.node("Unsqueeze", places, graph.constant([2])))


def rows_of(graph: Graph, kept: Kept | None, value: ir.Value) -> ir.Value:
    """The rows that are kept; all without."""
    return value if kept is None else kept.rows(graph, value)
