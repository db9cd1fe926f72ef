"""Graphs with weights of 8 or 4 bits alone, by onnxruntime.quantization: activations stay as they are, no data is needed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration.products import products
from rmt_trt.calibration.step_graph import drop_unused, ready_step, split_gemms, write_step
from rmt_trt.calibration.tables import Table, quantize_tables
from rmt_trt.errors import require

BITS = {"int8-weights": 8, "int4-weights": 4}
BLOCK = 32  # weights of an output channel that share a scale
# MatMulNBits multiplies float32 unless it is told that it may round activations to int8, by blocks of their own.
ACCURACY_LEVEL = 0


def weights_graph(
    bundle: Bundle | Path | str, path: Path, dtype: str, keep: Collection[str] = frozenset()
) -> GraphEntry:
    """Writes the step with its products' weights in `dtype`, a key of BITS, for the CPU to `path`, its weights in
    `path`.data where one file cannot hold them.

    Weights are rounded to the nearest, symmetric, with a scale for each 32 of an output channel. Embedding tables are of
    int8 rows; a tied head gets weights of its own.

    keep: nodes (`Product.node`), tables or their tied heads that stay float32, by name. Returns its entry; names are
    those of the files. Errors: FormatError, when nothing can be quantized; ContractError for names that the step lacks.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    model, chosen, lookups = ready_step(bundle, keep)
    heads = _own_weights(model.graph, lookups)
    quantized = by_blocks(model, {*(product.node for product in chosen), *heads}, BITS[dtype])
    quantize_tables(quantized, [Table(table.name, table.lookups) for table in lookups])
    return write_step(quantized, model, path, dtype)


def half_weights_graph(bundle: Bundle, half: Path, path: Path, dtype: str) -> GraphEntry:
    """The same for the CUDA engine, of a graph of the bundle's step in float16, `half`; tables and tied heads stay float16."""
    onnx = require("onnx", "export", "a quantized graph")
    model = onnx.load(str(half))
    nodes = [product.node for product in products(model, bundle.spec, onnx.TensorProto.FLOAT16)]
    split_gemms(model.graph, nodes)
    return write_step(by_blocks(model, set(nodes), BITS[dtype]), model, path, dtype)


def by_blocks(model: Any, nodes: Collection[str], bits: int) -> Any:
    """The model with MatMulNBits nodes in the place of the MatMul nodes named."""
    onnx = require("onnx", "export", "a quantized graph")
    with _root_logger_as_it_is():
        library = require("onnxruntime.quantization.matmul_nbits_quantizer", "export", "a quantized graph")
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    config = library.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL, op_types_to_quantize=("MatMul",), bits=bits
    )
    others = [node.name for node in copied.graph.node if node.name not in nodes]
    quantizer = library.MatMulNBitsQuantizer(copied, algo_config=config, nodes_to_exclude=others)
    quantizer.process()
    found = quantizer.model.model
    drop_unused(found.graph)
    return found


@contextmanager
def _root_logger_as_it_is() -> Iterator[None]:
    """The library, when it is imported, makes the root logger tell everything."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _own_weights(graph: Any, lookups: Collection[Table]) -> list[str]:
    """Gives tied heads the transposed table as a constant of their own, which is then quantized by blocks; their names."""
    onnx = require("onnx", "export", "a quantized graph")
    values = {tensor.name: tensor for tensor in graph.initializer}
    owner = {head: table.name for table in lookups for head in table.heads}
    for node in graph.node:
        if node.name in owner and node.op_type == "MatMul":
            turned = f"{owner[node.name]}_turned"
            if all(tensor.name != turned for tensor in graph.initializer):
                table = onnx.numpy_helper.to_array(values[owner[node.name]])
                graph.initializer.append(onnx.numpy_helper.from_array(table.T.copy(), turned))
            node.input[1] = turned
    drop_unused(graph)
    return list(owner)
