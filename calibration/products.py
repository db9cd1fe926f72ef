"""Which products of a step are quantized: those of an activation with a weight, off the way of the memory itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rmt_trt.contract import StepSpec

# They move values without computing: what a memory is after them is still that memory.
MOVING = ("Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class Product:
    """A node by name, and the tensors that it multiplies."""

    node: str
    activation: str
    weight: str


def products(model: Any, spec: StepSpec, of: int = 1) -> tuple[Product, ...]:
    """The products to quantize, in the graph's order. model: an onnx.ModelProto, its external data not needed. of: their
    weights' type, a value of onnx.TensorProto; 1 is FLOAT.

    A product that reads a state directly, or whose output is moved into a state, keeps float32. So do products of two
    activations, such as attention's, and those whose weight is computed in the graph, such as a tied head's.
    """
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == of and len(tensor.dims) == 2}
    read = _moved(graph.node, {state.input for state in spec.states})
    written = _sources(graph.node, {state.output for state in spec.states})
    return tuple(
        Product(node.name, node.input[0], node.input[1])
        for node in graph.node
        if _is_product(node)
        and node.input[1] in weights
        and node.input[0] not in weights | read
        and node.output[0] not in written
    )


def _is_product(node: Any) -> bool:
    """A MatMul, or a Gemm that is one with a bias."""
    values = {item.name: item.i if item.type == item.INT else item.f for item in node.attribute}
    plain = values.get("alpha", 1.0) == values.get("beta", 1.0) == 1.0 and not values.get("transA", 0)
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and plain)


def _moved(nodes: Iterable[Any], names: set[str]) -> set[str]:
    """`names` and what the graph moves them to; nodes stand in order of use."""
    found = set(names)
    for node in nodes:
        if node.op_type in MOVING and node.input[0] in found:
            found.update(node.output)
    return found


def _sources(nodes: Iterable[Any], names: set[str]) -> set[str]:
    """`names` and what is moved into them, through the choice of a frozen row too."""
    found = set(names)
    for node in reversed(list(nodes)):
        if found.intersection(node.output):
            if node.op_type in MOVING:
                found.add(node.input[0])
            elif node.op_type == "Where":
                found.update(node.input[1:])
    return found
