"""What a quantized graph leaves in float, in half precision: conversion by onnxruntime.transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rmt_trt.contract import SEGMENT, StepSpec
from rmt_trt.errors import FormatError, require

# Norms stay float32: squares of large activations are beyond float16, and so is a small epsilon.
NORMS = ("LayerNormalization", "Pow", "ReduceMean", "Sqrt", "Reciprocal")
# So do angles, and all that they are made of: positions above 2048 are no numbers of float16.
ANGLES = ("Cos", "Sin")


# How the library names its casts to float16, of what a float32 node made and of the graph's inputs.
OWN, INPUT = "_cast_to_fp16_node", "graph_input_cast"


def in_half(model: Any, spec: StepSpec) -> Any:
    """An onnx.ModelProto of a step computed in float16 where it was in float32, norms apart. Its inputs and outputs stay
    float32, and a row of padding gives back its states bit for bit, which a cast of the states would not.

    Errors: FormatError, when the graph cannot be converted.
    """
    onnx = require("onnx", "export", "a graph in half precision")
    float16 = require("onnxruntime.transformers.float16", "export", "a graph in half precision")
    library = require("onnxruntime.quantization.onnx_model", "export", "a graph in half precision")
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    try:
        half = float16.convert_float_to_float16(
            copied, keep_io_types=True, op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *NORMS, *ANGLES],
            node_block_list=[*_between(model.graph), *_angles(model.graph)],
        )  # fmt: skip
    except (ValueError, RuntimeError) as err:  # what it raises of a model beyond protobuf's 2 GiB, among others
        raise FormatError(f"the graph cannot be made float16 ({err!s:.200}). Leave it float32") from err
    del half.graph.value_info[:]  # some of it is what the tensors were before
    _once_each(half.graph)
    _directly(onnx, half.graph)
    _freeze_padding(onnx, half.graph, spec)
    sorted_model = library.ONNXModel(half)
    sorted_model.topological_sort()
    return sorted_model.model


def _between(graph: Any) -> Iterator[str]:
    """Names of nodes that add an epsilon to a mean of squares."""
    means = {node.output[0] for node in graph.node if node.op_type == "ReduceMean"}
    rooted = {name for node in graph.node if node.op_type in ("Sqrt", "Reciprocal") for name in node.input}
    for node in graph.node:
        if means.intersection(node.input) and rooted.intersection(node.output):
            yield node.name


def _angles(graph: Any) -> list[str]:
    """Names of the nodes that angles are made by, up to quantized products."""
    makers = {name: node for node in graph.node for name in node.output}
    waiting = [name for node in graph.node if node.op_type in ANGLES for name in node.input]
    found: dict[str, None] = {}
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.op_type != "DequantizeLinear" and node.name not in found:
            found[node.name] = None
            waiting.extend(node.input)
    return list(found)


def _once_each(graph: Any) -> None:
    """Leaves the first of nodes that make one tensor: the library casts an initializer once for each node that reads it."""
    made: set[str] = set()
    nodes = []
    for node in graph.node:
        if not made.intersection(node.output):
            nodes.append(node)
        made.update(node.output)
    del graph.node[:]
    graph.node.extend(nodes)


def _directly(onnx: Any, graph: Any) -> None:
    """Hands float32 from one node that stays float32 to the next: the library makes it float16 in between."""
    casts = [node for node in graph.node if node.op_type == "Cast"]
    narrowed = {node.output[0]: node.input[0] for node in casts if node.name.endswith(OWN) or INPUT in node.name}
    widened = {
        node.output[0]: narrowed[node.input[0]]
        for node in casts
        if node.attribute[0].i == onnx.TensorProto.FLOAT and node.input[0] in narrowed
    }
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in widened:
                node.input[place] = widened[name]
    outputs = {value.name for value in graph.output}
    read = {name for node in graph.node for name in node.input} | outputs
    nodes = [node for node in graph.node if node.op_type != "Cast" or node.output[0] in read]
    del graph.node[:]
    graph.node.extend(nodes)


def _freeze_padding(onnx: Any, graph: Any, spec: StepSpec) -> None:
    """States of rows that are padding from the first token on become those that came in."""
    make, values = onnx.helper.make_node, onnx.helper
    graph.initializer.extend(
        [
            values.make_tensor("padding_zero", onnx.TensorProto.INT64, [], [0]),
            values.make_tensor("padding_first", onnx.TensorProto.INT64, [1], [0]),
        ]
    )
    nodes = [
        # Padding stands at a row's end only: the first token says whether there is any text.
        make("Gather", [SEGMENT, "padding_first"], ["padding_token"], "padding_token", axis=1),
        make("GreaterOrEqual", ["padding_token", "padding_zero"], ["padding_alive"], "padding_alive"),
    ]
    for number, state in enumerate(spec.states):
        for node in graph.node:
            for place, name in enumerate(node.output):
                if name == state.output:
                    node.output[place] = f"padding_new_{number}"
        axes, alive = f"padding_axes_{number}", "padding_alive"
        if len(state.shape) > 1:
            graph.initializer.append(
                values.make_tensor(axes, onnx.TensorProto.INT64, [len(state.shape) - 1], range(2, len(state.shape) + 1))
            )
            alive = f"padding_alive_{number}"
            nodes.append(make("Unsqueeze", ["padding_alive", axes], [alive], alive))
        nodes.append(
            make("Where", [alive, f"padding_new_{number}", state.input], [state.output], f"padding_freeze_{number}")
        )
    graph.node.extend(nodes)
