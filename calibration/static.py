"""Static graphs of a step: Q/DQ nodes around its products, by onnxruntime.quantization, from ranges."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration.half import in_half
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.step_graph import drop_unused, ready_step, write_step
from rmt_trt.calibration.tables import quantize_tables
from rmt_trt.errors import ContractError, FormatError, require

Rescale = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """What a static graph's products are of. weight, activation: members of onnxruntime.quantization's QuantType.
    tables: embedding tables are of int8 rows, which is for ONNX Runtime alone. half: what stays float is float16."""

    dtype: str
    weight: str
    activation: str
    tables: bool = False
    half: bool = False


# On x86, ONNX Runtime fuses products of uint8 (here with zero point 128) and int8. Of int8 and int8 it fused 8 of the
# example's 24, and where it was told to fuse all, a step took five times as long.
UINT8_INT8 = Kind("int8", "QInt8", "QUInt8", tables=True)
INT8 = Kind("int8", "QInt8", "QInt8")  # zero points 0, which is all that TensorRT takes
FP8 = Kind("fp8", "QFLOAT8E4M3FN", "QFLOAT8E4M3FN")

LARGEST_E4M3 = 448.0
QUANTIZER = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    # A bias costs nothing in float32, and TensorRT refuses one of int32.
    "QuantizeBias": False,
    "QDQDisableWeightAdjustForInt32Bias": True,
    # A pair for each product: a shared one would stand before the residual stream too.
    "DedicatedQDQPair": True,
    # A product's output is added to the residual stream, or normalised: it stays as it is.
    "OpTypesToExcludeOutputQuantization": ["MatMul"],
}


def static_graph(
    bundle: Bundle | Path | str,
    ranges: Ranges,
    path: Path,
    kind: Kind,
    keep: Collection[str] = frozenset(),
    rescale: Rescale | None = None,
) -> GraphEntry:
    """Writes the step with its products in 8 bits to `path`, its weights in `path`.data where one file cannot hold them.

    Activations have one scale for each tensor, from its range; int8 weights one for each output channel, E4M3 weights
    one each. All is symmetric. Biases, normalisation, attention's products, and what reads and writes the memory stay
    float: float32, or float16 but for norms, as `kind` says.

    keep     nodes (`Product.node`) that stay float32 too, and embedding tables or their tied heads (`Table`), by name
    rescale  activation -> (k,) float32 s: the tensor is divided by s in front of its quantized products, and the rows of
             their weights are multiplied by it. `ranges` then has the range of the divided tensor, under the same name

    Returns its entry, for the CPU engine; names are those of the files. Errors: FormatError, for ranges that are another
    model's or do not cover the graph; ContractError for names in `keep` and `rescale` that the step does not have.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    ranges.require_model(bundle.spec, bundle.path)
    model, chosen, lookups = ready_step(bundle, keep, kind.tables)
    missing = [product.activation for product in chosen if product.activation not in ranges.tensors]
    if missing:
        raise FormatError(
            f"there is no range of the tensor {missing[0]!r:.80}: the ranges were taken from another export. Calibrate with "
            f"rmt-calibrate"
        )
    thresholds = {product.activation: ranges.tensors[product.activation].threshold for product in chosen}
    renamed = _rescaled(model.graph, {product.node for product in chosen}, thresholds, rescale or {})
    thresholds = {renamed.get(name, name): threshold for name, threshold in thresholds.items()}
    quantized = _quantized(model, [product.node for product in chosen], thresholds, kind)
    quantize_tables(quantized, lookups)
    if kind.half:
        quantized = in_half(quantized, bundle.spec)
    return write_step(quantized, model, path, kind.dtype)


def _rescaled(graph: Any, nodes: Collection[str], known: Collection[str], rescale: Rescale) -> dict[str, str]:
    """Divides activations and multiplies weights; returns the divided tensors' names by the old ones."""
    onnx = require("onnx", "export", "a quantized graph")
    unknown = sorted(set(rescale) - set(known))
    if unknown:
        raise ContractError(f"{unknown[0]!r:.80} is to be rescaled, and no quantized product reads it")
    weights = {tensor.name: tensor for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    for node in [node for node in graph.node if node.name in nodes and node.input[0] in rescale]:
        name, weight = node.input[0], onnx.numpy_helper.to_array(weights[node.input[1]])
        scale = np.asarray(rescale[name], np.float32)
        if scale.shape != weight.shape[:1] or not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ContractError(
                f"tensor {name!r:.80} is to be rescaled by an array of shape {scale.shape}; expected {weight.shape[:1]}, "
                f"finite and above 0"
            )
        if name not in renamed:
            renamed[name] = f"{name}_rescaled"
            graph.initializer.append(onnx.numpy_helper.from_array(1 / scale, f"{name}_factor"))
            graph.node.append(
                onnx.helper.make_node("Mul", [name, f"{name}_factor"], [renamed[name]], f"{name}_rescale")
            )
        graph.initializer.append(onnx.numpy_helper.from_array(weight * scale[:, None], f"{node.name}_rescaled_weight"))
        node.input[:] = [renamed[name], f"{node.name}_rescaled_weight"]
    drop_unused(graph)
    return renamed


def _quantized(model: Any, nodes: list[str], thresholds: Mapping[str, float], kind: Kind) -> Any:
    """The model with Q/DQ nodes before the MatMul nodes named."""
    quantization = require("onnxruntime.quantization", "export", "a quantized graph")
    bounds = {name: np.float32(threshold) for name, threshold in thresholds.items()}
    tensors = quantization.TensorsData(
        quantization.CalibrationMethod.MinMax,
        {name: quantization.TensorData(lowest=-bound, highest=bound) for name, bound in bounds.items()},
    )
    e4m3 = kind.weight == FP8.weight
    options = dict(QUANTIZER) | ({"TensorQuantOverrides": _e4m3_scales(model, nodes, bounds)} if e4m3 else {})
    quantizer = quantization.QDQQuantizer(
        model, per_channel=not e4m3, reduce_range=False,
        weight_qType=getattr(quantization.QuantType, kind.weight),
        activation_qType=getattr(quantization.QuantType, kind.activation),
        tensors_range=tensors, nodes_to_quantize=nodes, nodes_to_exclude=[], op_types_to_quantize=["MatMul"],
        extra_options=options,
    )  # fmt: skip
    quantizer.quantize_model()
    _only_for_products(quantizer.model.model.graph, nodes)
    quantizer.model.topological_sort()
    return quantizer.model.model


def _only_for_products(graph: Any, products: Collection[str]) -> None:
    """Gives what is no product the tensors themselves: where one product alone reads a tensor, the library puts its pair
    before the tensor's other readers too, such as the residual stream."""
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.name in products or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for place, name in enumerate(node.input):
            if name in makers and makers[name].op_type == "DequantizeLinear":
                node.input[place] = makers[makers[name].input[0]].input[0]


def _e4m3_scales(
    model: Any, nodes: Collection[str], bounds: Mapping[str, np.float32]
) -> dict[str, list[dict[str, Any]]]:
    """Scales by which the largest magnitude becomes the largest number of E4M3.

    The library's own are by the standard deviation, so that all beyond 4.5 of it would be cut off, which outliers are.
    """
    onnx = require("onnx", "export", "a quantized graph")
    read = {node.input[1] for node in model.graph.node if node.name in nodes}
    largest = {
        tensor.name: np.abs(onnx.numpy_helper.to_array(tensor)).max()
        for tensor in model.graph.initializer
        if tensor.name in read
    }
    zero = onnx.numpy_helper.to_array(onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0]))
    return {
        name: [{"scale": np.array(np.float32(bound / LARGEST_E4M3 or 1.0)), "zero_point": zero}]
        for name, bound in {**largest, **bounds}.items()
    }
