"""The fp32 graph of a step, read to be quantized, and what was made of it, written."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration.products import Product, products
from rmt_trt.calibration.tables import Table, kept_apart, tables
from rmt_trt.calibration.tapped import quantizable, step_entry
from rmt_trt.errors import ContractError, FormatError, require
from rmt_trt.files import cannot_write
from rmt_trt.initial_state import INITIAL_KEY, SPEC_KEY

EXTERNAL_DATA_BYTES = (1 << 31) - (16 << 20)  # protobuf refuses 2 GiB


def read_step(bundle: Bundle) -> tuple[Any, tuple[Product, ...]]:
    """The bundle's fp32 step as an onnx.ModelProto with its weights, and the products in it that can be quantized.

    Errors: FormatError, when there is no such graph or nothing in it to quantize.
    """
    onnx = require("onnx", "export", "a quantized graph")
    with quantizable(bundle):
        model = onnx.load(str(bundle.graph_path(step_entry(bundle))))
        chosen = products(model, bundle.spec)
    names = [product.node for product in chosen]
    if len(set(names)) != len(names) or "" in names:
        raise FormatError(
            f"{bundle.path}: products of its step have no names of their own, by which they are quantized. Export the model again"
        )
    if not chosen:
        raise FormatError(
            f"{bundle.path} has nothing to quantize: its step has no product of an activation with a constant float32 weight"
        )
    return model, chosen


def ready_step(
    bundle: Bundle, keep: Collection[str], with_tables: bool = True
) -> tuple[Any, tuple[Product, ...], list[Table]]:
    """The step as `read_step` gives it with the Gemms among its products split, the products that are quantized when `keep`
    stays as it is, and so the embedding tables; none without `with_tables`.

    Errors: as `read_step` and `chosen_products`.
    """
    model, found = read_step(bundle)
    looked_up = tables(model) if with_tables else ()
    chosen = chosen_products(found, looked_up, keep)
    split_gemms(model.graph, [product.node for product in chosen])
    return model, chosen, kept_apart(looked_up, keep)


def chosen_products(
    found: tuple[Product, ...], looked_up: tuple[Table, ...], keep: Collection[str]
) -> tuple[Product, ...]:
    """The products that are quantized when `keep` stays as it is: names of products, of tables, or of their tied heads.

    Errors: ContractError for a name that is none of these, and when no product is left.
    """
    known = {product.node for product in found} | {name for table in looked_up for name in (table.name, *table.heads)}
    unknown = sorted(set(keep) - known)
    if unknown:
        raise ContractError(
            f"{unknown[0]!r:.80} is no product of this step that could be quantized; expected names such as {found[0].node!r}"
        )
    chosen = tuple(product for product in found if product.node not in keep)
    if not chosen:
        raise ContractError(f"all {len(found)} products are to stay in float32; there is nothing left to quantize")
    return chosen


def write_step(model: Any, source: Any, path: Path, dtype: str) -> GraphEntry:
    """Writes a quantized step to `path`, its weights in `path`.data where one file cannot hold them. source: the model that
    it was made of, whose spec and initial state it gets. Returns its entry; names are those of the files.

    Errors: FormatError, when it cannot be written.
    """
    onnx = require("onnx", "export", "a quantized graph")
    metadata = {item.key: item.value for item in source.metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {key: metadata[key] for key in (SPEC_KEY, INITIAL_KEY)})
    large = model.ByteSize() >= EXTERNAL_DATA_BYTES
    data = f"{path.name}.data"
    try:
        onnx.save(model, str(path), save_as_external_data=large, location=data)
    except OSError as err:
        raise cannot_write(path, err) from err
    opset = max(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    return GraphEntry(path.name, dtype=dtype, opset=opset, data=(data,) if large else ())


def split_gemms(graph: Any, names: Iterable[str]) -> None:
    """Makes MatMul and Add of the Gemm nodes named: ONNX Runtime has no 8-bit kernel for a Gemm with a bias in float32."""
    onnx = require("onnx", "export", "a quantized graph")
    weights = {tensor.name: tensor for tensor in graph.initializer}
    wanted, nodes = set(names), []
    for node in graph.node:
        if node.op_type != "Gemm" or node.name not in wanted:
            nodes.append(node)
            continue
        weight = node.input[1]
        if any(item.name == "transB" and item.i for item in node.attribute):
            value = onnx.numpy_helper.to_array(weights[weight])
            weight = f"{node.name}_weight"
            graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value.T), weight))
        bias = list(node.input[2:])
        product = f"{node.name}_product" if bias else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], weight], [product], node.name))
        if bias:
            nodes.append(onnx.helper.make_node("Add", [product, *bias], list(node.output), f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)


def drop_unused(graph: Any) -> None:
    """Removes initializers that no node reads, and all but the first of a name; and nodes that move them to nobody."""
    outputs = {value.name for value in graph.output}
    read = {name for node in graph.node for name in node.input} | outputs
    nodes = [node for node in graph.node if node.op_type != "Transpose" or node.output[0] in read]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | outputs
    first = {tensor.name: tensor for tensor in reversed(graph.initializer) if tensor.name in read}
    kept = list(reversed(first.values()))
    del graph.initializer[:]
    graph.initializer.extend(kept)
