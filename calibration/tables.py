"""Embedding tables in 8 bits, for graphs that ONNX Runtime runs: int8 rows, each with a scale of its own.

A lookup becomes three: of int8 rows, of their scales, and the product of both. A head that is tied to the table, its
transpose as the weight of a product, takes the same int8 rows: each is then an output channel with its own scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmt_trt.errors import require

LEAST_BYTES = 1 << 20  # of a table in float32: a smaller one is not worth three nodes
LARGEST = 127


@dataclass(frozen=True)
class Table:
    """An initializer by its name, the Gather nodes that look rows up in it, and products with its transpose, by name."""

    name: str
    lookups: tuple[str, ...]
    heads: tuple[str, ...] = ()


def tables(model: Any, least_bytes: int | None = None) -> tuple[Table, ...]:
    """The tables of a step that can be quantized: constant float32 of two axes, read by lookups of rows and tied heads alone.

    model: an onnx.ModelProto, its external data not needed. least_bytes: None takes LEAST_BYTES.
    """
    least = LEAST_BYTES if least_bytes is None else least_bytes
    readers = defaultdict(list)
    for node in model.graph.node:
        for name in set(node.input):
            readers[name].append(node)
    outputs = {value.name for value in model.graph.output}
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_type != tensor.FLOAT or len(tensor.dims) != 2 or 4 * tensor.dims[0] * tensor.dims[1] < least:
            continue
        lookups = [node for node in readers[tensor.name] if _is_lookup(node, tensor.name)]
        turned = [node for node in readers[tensor.name] if _is_transpose(node)]
        heads = [head for node in turned for head in readers[node.output[0]]]
        tied = all(head.op_type == "MatMul" and head.input[0] != turned[0].output[0] for head in heads)
        alone = len(lookups) + len(turned) == len(readers[tensor.name]) and tensor.name not in outputs
        if lookups and alone and tied:
            found.append(
                Table(tensor.name, tuple(node.name for node in lookups), tuple(dict.fromkeys(h.name for h in heads)))
            )
    return tuple(found)


def kept_apart(found: Collection[Table], keep: Collection[str]) -> list[Table]:
    """Those of which neither the table nor a head is in `keep`."""
    return [table for table in found if not {table.name, *table.heads} & set(keep)]


def quantize_tables(model: Any, found: Collection[Table]) -> None:
    """Rewrites lookups and tied heads of an onnx.ModelProto. A head multiplies in integers, its activation in 8 bits by what
    each step finds in it: ONNX Runtime makes one node of that."""
    onnx = require("onnx", "export", "a quantized graph")
    graph = model.graph
    values = {tensor.name: tensor for tensor in graph.initializer if tensor.name in {table.name for table in found}}
    by_node = {node: table.name for table in found for node in (*table.lookups, *table.heads)}
    for table in found:
        rows, scales = quantized_rows(onnx.numpy_helper.to_array(values[table.name]))
        graph.initializer.append(onnx.numpy_helper.from_array(rows, f"{table.name}_rows"))
        graph.initializer.append(onnx.numpy_helper.from_array(scales, f"{table.name}_scales"))
    nodes: list[Any] = []
    for node in graph.node:
        name = by_node.get(node.name) if node.op_type in ("Gather", "MatMul") else None
        if name is None:
            nodes.append(node)
        elif node.op_type == "Gather":
            nodes += _lookup(onnx, node, name)
        else:
            nodes += _head(onnx, node, name)
    del graph.node[:]
    graph.node.extend(nodes)
    gone = {output for node in nodes if _is_transpose(node) and node.input[0] in values for output in node.output}
    _remove(graph, gone, values)


def quantized_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(v, d) float32 as int8 (v, d) and scales (v, 1) float32, symmetric; a row of zeros has the scale 1."""
    largest = np.abs(table).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / LARGEST, 1).astype(np.float32)
    return np.rint(table / scales).astype(np.int8), scales


def _lookup(onnx: Any, node: Any, table: str) -> list[Any]:
    """Gather of float32 rows -> Gather of int8 rows, Cast, Mul by their scales."""
    make, ids, name = onnx.helper.make_node, node.input[1], node.name
    return [
        make("Gather", [f"{table}_rows", ids], [f"{name}_rows"], f"{name}_rows", axis=0),
        make("Cast", [f"{name}_rows"], [f"{name}_values"], f"{name}_values", to=onnx.TensorProto.FLOAT),
        make("Gather", [f"{table}_scales", ids], [f"{name}_scales"], f"{name}_scales", axis=0),
        make("Mul", [f"{name}_values", f"{name}_scales"], list(node.output), name),
    ]


def _head(onnx: Any, node: Any, table: str) -> list[Any]:
    """MatMul with a table's transpose -> the same of 8-bit integers. The pattern is that of `quantize_dynamic`."""
    make, name, source = onnx.helper.make_node, node.name, node.input[0]
    return [
        make("DynamicQuantizeLinear", [source], [f"{name}_input", f"{name}_scale", f"{name}_zero"], f"{name}_quantize"),
        make("Transpose", [f"{table}_rows"], [f"{name}_weight"], f"{name}_transpose", perm=[1, 0]),
        make("Flatten", [f"{table}_scales"], [f"{name}_scales"], f"{name}_flatten", axis=0),
        make("MatMulInteger", [f"{name}_input", f"{name}_weight", f"{name}_zero"], [f"{name}_product"], f"{name}_int8"),
        make("Cast", [f"{name}_product"], [f"{name}_float"], f"{name}_cast", to=onnx.TensorProto.FLOAT),
        make("Mul", [f"{name}_scale", f"{name}_scales"], [f"{name}_both"], f"{name}_both"),
        make("Mul", [f"{name}_float", f"{name}_both"], list(node.output), name),
    ]


def _remove(graph: Any, outputs: Collection[str], initializers: Collection[str]) -> None:
    """Takes out what nothing reads any more."""
    read = {name for node in graph.node for name in node.input} - set(initializers)
    nodes = [node for node in graph.node if node.output[0] not in outputs or node.output[0] in read]
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [tensor for tensor in graph.initializer if tensor.name not in initializers]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _is_lookup(node: Any, table: str) -> bool:
    return node.op_type == "Gather" and node.input[0] == table and not any(item.i for item in node.attribute)


def _is_transpose(node: Any) -> bool:
    return node.op_type == "Transpose" and [list(item.ints) for item in node.attribute] in ([[1, 0]], [])
