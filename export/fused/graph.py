"""Writing a graph node by node, its weights in one file that all graphs of a dtype share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

MICROSOFT = "com.microsoft"
OPSET = 20
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ONNX_FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
ALIGNMENT = 4096  # of a tensor in the file, so that it can be mapped
LARGEST = 448.0  # of E4M3

Tensor = torch.Tensor | Callable[[], torch.Tensor]  # made when it is written, where it takes time


class Weights:
    """The file of weights. A tensor is written when it is first used, under its name, and referred to from then on."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self._file = path.open("wb")
        self._entries: dict[str, ir.ExternalTensor] = {}
        self._steps: dict[str, float] = {}

    def tensor(self, name: str, value: Tensor) -> ir.ExternalTensor:
        """A tensor in the graphs' dtype; the same name is the same tensor."""
        if name not in self._entries:
            found = value if isinstance(value, torch.Tensor) else value()
            self._write(name, found.detach().to(FLOATS[self.dtype]), ONNX_FLOATS[self.dtype])
        return self._entries[name]

    def float8(self, name: str, matrix: Tensor) -> tuple[ir.ExternalTensor, float]:
        """A matrix (in, out) as (out, in) in E4M3, and the step that it counts in, which takes its largest magnitude to 448."""
        if name not in self._entries:
            weight = (matrix if isinstance(matrix, torch.Tensor) else matrix()).detach().float()
            self._steps[name] = step = max(float(weight.abs().max()), 1e-30) / LARGEST
            turned = (weight.T / step).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            self._write(name, turned, ir.DataType.FLOAT8E4M3FN)
        return self._entries[name], self._steps[name]

    def _write(self, name: str, value: torch.Tensor, kind: ir.DataType) -> None:
        data = value.contiguous()
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(data.view(torch.uint8).numpy().data)
        self._entries[name] = ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=self._file.tell() - offset,
            dtype=kind,
            shape=ir.Shape(data.shape),
            name=name,
            base_dir=self.path.parent,
        )

    def flush(self) -> None:
        """What was written so far can be read."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Graph:
    """Nodes in the order in which they are written. `fused` counts what one node does in place of several."""

    def __init__(self, weights: Weights, grouped: bool = True, joined: bool = False) -> None:
        """grouped: as `fused_graphs`. joined: as `blocks.gate_and_up`."""
        self.weights = weights
        self.dtype, self.grouped, self.joined = weights.dtype, grouped, joined
        self.fused: Counter[str] = Counter()
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def weight(self, name: str, value: Tensor) -> ir.Value:
        """A weight in the graph's dtype, kept in the file of weights."""
        return self._initializer(name, self.weights.tensor(name, value))

    def float8(self, name: str, matrix: Tensor) -> tuple[ir.Value, float]:
        """A matrix turned and in FP8, kept there too, and its step."""
        tensor, step = self.weights.float8(name, matrix)
        return self._initializer(name, tensor), step

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant inside the graph; equal ones are one."""
        array = np.array(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._initializer(name, ir.tensor(array, name=name))
        return self._constants[key]

    def scalar(self, value: float) -> ir.Value:
        """A number in the graph's dtype."""
        kinds = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
        return self.constant(value, kinds[self.dtype])

    def node(self, op: str, *inputs: ir.Value | None, domain: str = "", fused: str = "", **attributes: Any) -> ir.Value:
        """A node's only output."""
        return self.nodes(op, *inputs, domain=domain, fused=fused, wanted=(True,), **attributes)[0]

    def nodes(
        self,
        op: str,
        *inputs: ir.Value | None,
        wanted: Sequence[bool],
        domain: str = "",
        fused: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node's outputs; one that is not wanted gets no name, so that it is not computed."""
        number = len(self._nodes)
        outputs = [ir.Value(name=f"{op.lower()}_{number}_{i}" if want else "") for i, want in enumerate(wanted)]
        made = [ir.Attr(name, *_attribute(value)) for name, value in attributes.items()]
        self._nodes.append(ir.Node(domain, op, inputs, made, outputs=outputs, name=f"{op}_{number}"))
        if fused:
            self.fused[fused] += 1
        return [output for output, want in zip(outputs, wanted, strict=True) if want]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.node("Cast", value, to=int(dtype))

    def to_half(self, value: ir.Value) -> ir.Value:
        """float32 -> the graph's dtype."""
        return value if self.dtype == "fp32" else self.cast(value, ONNX_FLOATS[self.dtype])

    def to_float(self, value: ir.Value) -> ir.Value:
        """The graph's dtype -> float32."""
        if self.dtype == "fp32":
            return self.node("Identity", value)
        return self.cast(value, ir.DataType.FLOAT)

    def slice(self, value: ir.Value, start: int, stop: int, axis: int = 1) -> ir.Value:
        return self.node("Slice", value, self.constant([start]), self.constant([stop]), self.constant([axis]))

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes the graph; the weights stay in their file."""
        graph = ir.Graph(
            self._inputs, self._outputs, nodes=self._nodes, initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, **{node.domain: 1 for node in self._nodes if node.domain}}, name="segment_step",
        )  # fmt: skip
        model = ir.Model(graph, ir_version=10, producer_name="rmt-trt")
        model.metadata_props.update(metadata)
        ir.save(model, path)

    def _initializer(self, name: str, tensor: Any) -> ir.Value:
        if name not in self._initializers:
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self._initializers[name] = value
        return self._initializers[name]


def _attribute(value: Any) -> tuple[ir.AttributeType, Any]:
    if isinstance(value, float):
        return ir.AttributeType.FLOAT, value
    if isinstance(value, int):
        return ir.AttributeType.INT, value
    if isinstance(value, str):
        return ir.AttributeType.STRING, value
    return ir.AttributeType.INTS, list(value)
