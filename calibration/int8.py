"""A static INT8 graph of a step: Q/DQ nodes around its products, by onnxruntime.quantization, from ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration.products import Product, products
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.tapped import step_entry
from rmt_trt.errors import FormatError, require
from rmt_trt.files import cannot_write
from rmt_trt.initial_state import INITIAL_KEY, SPEC_KEY

if TYPE_CHECKING:
    from rmt_trt.export.engine_graphs import EngineGraphs, EngineOptions

ENGINE, DTYPE = "cpu", "int8"
NAME = f"{ENGINE}-{DTYPE}-step-all.onnx"
EXTERNAL_DATA_BYTES = (1 << 31) - (16 << 20)  # protobuf refuses 2 GiB
QUANTIZER = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    # A bias costs nothing in float32, and other engines refuse one of int32.
    "QuantizeBias": False,
    "QDQDisableWeightAdjustForInt32Bias": True,
    # A pair for each product: a shared one would stand before the residual stream too.
    "DedicatedQDQPair": True,
    # A product's output is added to the residual stream, or normalised: it stays as it is.
    "OpTypesToExcludeOutputQuantization": ["MatMul"],
}


def int8_graph(bundle: Bundle | Path | str, ranges: Ranges, path: Path) -> GraphEntry:
    """Writes the step with int8 products, for the CPU, to `path`, its weights in `path`.data where one file cannot hold them.

    Weights are int8 by output channel, activations 8 bits from -threshold to threshold, both symmetric; biases,
    normalisation, attention's products, and what reads and writes the memory stay float32.
    Returns its entry; names are those of the files. Errors: FormatError, for ranges that are another model's or do not
    cover the graph.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    onnx = require("onnx", "export", "an INT8 graph")
    ranges.require_model(bundle.spec, bundle.path)
    entry = step_entry(bundle)
    model = onnx.load(str(bundle.graph_path(entry)))
    chosen = products(model, bundle.spec)
    missing = [product.activation for product in chosen if product.activation not in ranges.tensors]
    if missing or not chosen:
        what = f"no range of the tensor {missing[0]!r:.80}" if missing else "nothing to quantize in the graph"
        raise FormatError(f"there is {what}: the ranges were taken from another export. Calibrate with rmt-calibrate")
    metadata = {item.key: item.value for item in model.metadata_props}
    _split_gemms(onnx, model.graph, {product.node for product in chosen})
    quantized = _quantized(model, chosen, ranges)
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, {key: metadata[key] for key in (SPEC_KEY, INITIAL_KEY)})
    large = quantized.ByteSize() >= EXTERNAL_DATA_BYTES
    data = f"{path.name}.data"
    try:
        onnx.save(quantized, str(path), save_as_external_data=large, location=data)
    except OSError as err:
        raise cannot_write(path, err) from err
    return GraphEntry(path.name, "step", ENGINE, DTYPE, "all", entry.opset, (data,) if large else ())


def _split_gemms(onnx: Any, graph: Any, names: Iterable[str]) -> None:
    """Makes MatMul and Add of the Gemm nodes named: ONNX Runtime has no int8 kernel for a Gemm with a bias in float32."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "Gemm" or node.name not in names:
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


def _quantized(model: Any, chosen: tuple[Product, ...], ranges: Ranges) -> Any:
    """The model with Q/DQ nodes before the chosen products."""
    quantization = require("onnxruntime.quantization", "export", "an INT8 graph")
    bounds = {name: np.float32(ranges.tensors[name].threshold) for name in dict.fromkeys(p.activation for p in chosen)}
    tensors = quantization.TensorsData(
        quantization.CalibrationMethod.MinMax,
        {name: quantization.TensorData(lowest=-bound, highest=bound) for name, bound in bounds.items()},
    )
    # On x86, ONNX Runtime fuses products of uint8 (here with zero point 128) and int8. Of int8 and int8 it fused 8 of the
    # example's 24, and where it was told to fuse all, a step took five times as long.
    quantizer = quantization.QDQQuantizer(
        model, per_channel=True, reduce_range=False, weight_qType=quantization.QuantType.QInt8,
        activation_qType=quantization.QuantType.QUInt8, tensors_range=tensors,
        nodes_to_quantize=[product.node for product in chosen], nodes_to_exclude=[],
        op_types_to_quantize=["MatMul"], extra_options=dict(QUANTIZER),
    )  # fmt: skip
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model


def add_int8(
    bundle_path: Path | str,
    ranges: Ranges,
    options: EngineOptions | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> EngineGraphs:
    """Adds the INT8 graph to a bundle, verified along the recurrence by the agreement of the answers; one that the bundle
    has is replaced.

    options   `segments`, `tolerance` and `accept_drift` of the verification are read
    progress  called with (stage, done, total); stages are "graphs" and "verify"

    Errors: FormatError, as `int8_graph`; VerificationError, when the answers differ.
    """
    from rmt_trt.export.engine_graphs import EngineGraphs, EngineOptions, add_written

    bundle = Bundle(bundle_path)

    def write(folder: Path) -> EngineGraphs:
        entry = int8_graph(bundle, ranges, folder / NAME)
        about = f"INT8 products, ranges by {ranges.method} from {ranges.segments} segments"
        return EngineGraphs(ENGINE, DTYPE, (entry,), {}, about)

    return add_written(bundle, write, EngineOptions() if options is None else options, progress)
