"""FP8 graphs for the CUDA engine whose products are multiplied in FP8, by rmt-trt's own operators: from ranges of a step.

The ranges are of step.onnx's products. Which layer of the backbone a product is of is known by its place in the graph, and
proved by its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.step_graph import chosen_products, read_step
from rmt_trt.errors import ContractError, EngineError, FormatError, require
from rmt_trt.runtime import native as operators

if TYPE_CHECKING:
    from rmt_trt.export.engine_graphs import EngineGraphs, EngineOptions
    from rmt_trt.export.fused.layers import Backbone
    from rmt_trt.model.step import RMTModel

ENGINE, DTYPE = "cuda", "fp8"
MULTIPLE = 16  # of both sides of a matrix in FP8, for cuBLASLt
SMALLEST = 1e-6  # of a threshold: a tensor that was always 0 has none


@dataclass(frozen=True)
class Mapped:
    """thresholds: what the inputs of products in FP8 are cut at, by the names of `Native.thresholds`. kept: the step's
    products that stay in 16 bits, by node."""

    thresholds: dict[str, float]
    kept: tuple[str, ...]


def mapped(bundle: Bundle, ranges: Ranges, backbone: Backbone, keep: Collection[str]) -> Mapped:
    """The ranges' thresholds, by the layers of a backbone.

    keep: nodes of step.onnx that stay in 16 bits. With one of a layer's query, key and value stay the others, which read
    the same tensor. What is no layer's product, such as a head's, stays too, and so do matrices that the GPU has no FP8
    product for.
    Errors: FormatError, for ranges that are another model's, and when the step's products are not the backbone's, one by
    one; ContractError for a name in `keep` that is none of them, and when nothing is left.
    """
    ranges.require_model(bundle.spec, bundle.path)
    model, found = read_step(bundle)
    chosen_products(found, (), keep)
    weights = _weights(model)
    by_name: dict[str, list[Any]] = {}
    for place, (name, weight) in enumerate(_expected(backbone, weights[found[0].weight].shape)):
        product = found[place] if place < len(found) else None
        if product is None or not _fits(weights[product.weight], weight, backbone.heads):
            what = "no product is left" if product is None else f"node {product.node!r:.80} has other weights"
            raise FormatError(
                f"the products of {bundle.path}'s step are not those of its model's layers in their order: {what} where "
                f"{name} was expected. Export the model again with rmt-export"
            )
        by_name.setdefault(name, []).append(product)
    thresholds = {}
    for name, products in by_name.items():
        missing = [product.activation for product in products if product.activation not in ranges.tensors]
        if missing:
            raise FormatError(
                f"there is no range of the tensor {missing[0]!r:.80}: the ranges were taken from another export. Calibrate "
                f"with rmt-calibrate"
            )
        fits = all(side % MULTIPLE == 0 for product in products for side in weights[product.weight].shape)
        if fits and not any(product.node in keep for product in products):
            thresholds[name] = max(SMALLEST, *(ranges.tensors[product.activation].threshold for product in products))
    if not thresholds:
        raise ContractError(
            f"no product of {bundle.path} is left for FP8: all are kept in 16 bits, or have matrices whose sides are no "
            f"multiples of {MULTIPLE}. Take fp16: rmt-export {bundle.path} --engine cuda --dtype fp16"
        )
    low = {product.node for name in thresholds for product in by_name[name]}
    return Mapped(thresholds, tuple(product.node for product in found if product.node not in low))


def add_native(
    bundle: Bundle,
    ranges: Ranges,
    keep: Collection[str],
    about: dict[str, Any],
    options: EngineOptions,
    progress: Callable[[str, int, int], None],
) -> EngineGraphs:
    """Adds fused FP8 graphs to a bundle, by role and head; those of the same use are replaced. about: what the record says
    of the quantization; what is kept in 16 bits is added to it.

    They are verified along the recurrence on this machine's GPU, or where it has none that can, by their float32 twins with
    tensors rounded to E4M3, on the CPU.
    Errors: CannotFuse, for a backbone that no graph with our own operators is known for; EngineError, where these were not
    built; as `mapped`; VerificationError, when the answers differ.
    """
    require("onnx_ir", "export", "a fused graph")
    from rmt_trt.export.engine_graphs import EngineGraphs, add_written
    from rmt_trt.export.fused import Native, backbone_of, fused_graphs
    from rmt_trt.export.fused.native_decoder import check_layers

    step = _step(bundle)
    backbone = backbone_of(step)
    check_layers(backbone)
    if (reason := operators.unused()) is not None:
        raise EngineError(f"FP8 graphs for CUDA are made of rmt-trt's own operators, and {reason}")
    found = mapped(bundle, ranges, backbone, keep)
    native = Native(thresholds=found.thresholds)
    about = {**about, "kept": list(found.kept)}

    def written(folder: Path) -> EngineGraphs:
        made = fused_graphs(step, bundle.spec, DTYPE, folder, native=native)
        return EngineGraphs(ENGINE, DTYPE, made.entries, made.fused, quantization=about)

    def twin(folder: Path) -> EngineGraphs:
        entries = fused_graphs(step, bundle.spec, "fp32", folder, grouped=True, native=native).entries
        return EngineGraphs(ENGINE, DTYPE, tuple(_for_cpu(entries)), {}, quantization=about)

    return add_written(bundle, written, options, progress, twin, step)


def _step(bundle: Bundle) -> RMTModel:
    from rmt_trt.export.fused import CannotFuse
    from rmt_trt.export.recover import model_from_bundle

    if bundle.manifest.model is None:
        raise CannotFuse("the bundle holds a step of the user's own")
    return model_from_bundle(bundle)


def _for_cpu(entries: tuple[GraphEntry, ...]) -> Iterator[GraphEntry]:
    """What the CPU engine runs: one graph, of any batch and with all rows of logits."""
    for entry in entries:
        if (entry.role, entry.head) == ("step", "all"):
            yield replace(entry, dtype=DTYPE)


def _fits(weight: np.ndarray, wanted: np.ndarray, heads: int) -> bool:
    """Whether a step's matrix is that of a layer: of query, key and value at once also head by head, as GPT-NeoX has them."""
    if _equal(weight, wanted):
        return True
    rows, columns = wanted.shape
    return columns % (3 * heads) == 0 and _equal(
        weight, wanted.reshape(rows, 3, heads, -1).transpose(0, 2, 1, 3).reshape(rows, columns)
    )


def _expected(backbone: Backbone, first: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, weight (in, out)) of each product, in the order of a step. first: shape of the first one's weight, which tells
    whether query, key and value are one product."""
    for number, layer in enumerate(backbone.layers):
        inputs = [part.weight.detach().float().numpy() for part in (layer.query, layer.key, layer.value)]
        if first == (inputs[0].shape[0], sum(part.shape[1] for part in inputs)):
            inputs = [np.concatenate(inputs, axis=1)]
        named = [("qkv", part) for part in inputs]
        gate = [] if layer.gate is None else [("up", layer.gate)]
        rest = [("out", layer.out), *gate, ("up", layer.up), ("down", layer.down)]
        named += [(name, part.weight.detach().float().numpy()) for name, part in rest]
        for name, weight in named:
            yield f"layer{number}.{name}", weight


def _weights(model: Any) -> dict[str, np.ndarray]:
    """The step's matrices by name, each (in, out)."""
    onnx = require("onnx", "export", "a quantized graph")
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer if len(one.dims) == 2}
    turned = {
        node.input[1]
        for node in model.graph.node
        if node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)
    }
    return {name: value.T if name in turned else value for name, value in arrays.items()}


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit: zeros of either sign differ."""
    return a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
