"""Nodes of rmt-trt's own operators, each run by itself on the CPU provider."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from rmt_trt.runtime import native

FLOAT8 = TensorProto.FLOAT8E4M3FN
LOW = ml_dtypes.float8_e4m3fn


def run(op: str, *inputs: np.ndarray, outputs: tuple[int, ...] = (TensorProto.FLOAT,), **attributes: Any) -> list[Any]:
    """Runs a node of ours by itself. E4M3 goes in and out as float32, which holds each of its values."""
    nodes, named, feeds = [], [], {}
    for number, value in enumerate(inputs):
        name, feeds[f"in{number}"] = f"in{number}", np.asarray(value, np.float32)
        if value.dtype == LOW:
            nodes.append(helper.make_node("Cast", [name], [f"low{number}"], to=FLOAT8))
            name = f"low{number}"
        named.append(name)
    made = [f"made{number}" for number in range(len(outputs))]
    nodes.append(helper.make_node(op, named, made, domain=native.DOMAIN, **attributes))
    nodes += [helper.make_node("Cast", [name], [f"{name}.out"], to=TensorProto.FLOAT) for name in made]
    graph = helper.make_graph(
        nodes, "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [f"{n}.{i}" for i in range(v.ndim)]) for n, v in feeds.items()],
        [helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None) for name in made],
    )  # fmt: skip
    return outputs_of(graph, feeds)


def outputs_of(graph: Any, feeds: dict[str, np.ndarray]) -> list[Any]:
    """Runs a graph with nodes of ours on the CPU provider."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(native.DOMAIN, 1)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    native.register(options)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def low(values: np.ndarray) -> np.ndarray:
    """E4M3 that saturates."""
    with np.errstate(invalid="ignore"):  # of NaN
        return np.clip(values, -448, 448).astype(LOW)
