"""One graph for every mix: the fp32 step beside the quantized one, and an input that says of each unit which of them runs.

A graph for each unit would take minutes to build and to load. Here a product is an If: the nodes of the deployed static
graph in one branch, the fp32 product in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.bundle import Bundle
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.static import LARGEST_E4M3, Kind, Rescale, static_graph
from rmt_trt.calibration.step_graph import read_step, split_gemms, write_step
from rmt_trt.calibration.tables import Table, quantize_tables, tables
from rmt_trt.calibration.units import READ, Unit
from rmt_trt.contract import LOGITS, SEGMENT
from rmt_trt.errors import require
from rmt_trt.runtime.engines.cpu import open_session

SWITCHES = "quantized"  # (units,) bool
STATIC, GRAPH = "static.onnx", "switched.onnx"
# Type in the graph, zero point, and steps from 0 to the threshold, of what activations are quantized to.
CODED = {
    "QUInt8": ("UINT8", 128, 127.5),
    "QInt8": ("INT8", 0, 127.0),
    "QFLOAT8E4M3FN": ("FLOAT8E4M3FN", 0, LARGEST_E4M3),
}
States = tuple[np.ndarray, ...]


class Switched:
    """A session of the step on the CPU in which each unit is quantized or not, from step to step."""

    def __init__(self, session: Any, units: Sequence[Unit], states: Sequence[str], outputs: Sequence[str]) -> None:
        self.units = tuple(units)
        self._session, self._states, self._outputs = session, tuple(states), [*outputs, LOGITS]

    def step(self, states: States, segment: np.ndarray, quantized: Sequence[bool]) -> tuple[States, np.ndarray]:
        """states each (batch, *shape), segment (batch, s) int64 -> new states, logits. quantized: by unit."""
        feeds = {**dict(zip(self._states, states, strict=True)), SEGMENT: segment, SWITCHES: np.array(quantized, bool)}
        *new, logits = self._session.run(self._outputs, feeds)
        return tuple(new), logits


def switched(
    bundle: Bundle,
    ranges: Ranges,
    kind: Kind,
    units: Sequence[Unit],
    folder: Path,
    rescale: Rescale | None = None,
    threads: int | None = None,
) -> Switched:
    """The step with a switch for each unit. folder: an empty one for its files; needed until the session is there.

    Errors: as `static_graph`.
    """
    onnx = require("onnx", "export", "a graph with switches")
    model, chosen = read_step(bundle)
    looked_up = tables(model) if kind.tables else ()
    kept = {name for table in looked_up for name in (table.name, *table.heads)}
    static_graph(bundle, ranges, folder / STATIC, kind, kept, rescale)
    quantized = onnx.load(str(folder / STATIC))
    split_gemms(model.graph, {product.node for product in chosen})
    _add_switches(onnx, quantized.graph, len(units))
    number = {node: place for place, unit in enumerate(units) for node in unit.nodes}
    _switch_products(onnx, quantized.graph, model.graph, number)
    by_table = {unit.table: place for place, unit in enumerate(units) if unit.table}
    _switch_tables(onnx, quantized, [table for table in looked_up if table.name in by_table], by_table)
    _switch_states(onnx, quantized.graph, bundle, ranges, kind, units)
    write_step(quantized, model, folder / GRAPH, kind.dtype)
    del quantized, model
    session = open_session(folder / GRAPH, threads)
    states = bundle.spec.states
    return Switched(session, units, [state.input for state in states], [state.output for state in states])


def _add_switches(onnx: Any, graph: Any, count: int) -> None:
    """The input, and a scalar out of it for each unit."""
    helper = onnx.helper
    graph.input.append(helper.make_tensor_value_info(SWITCHES, onnx.TensorProto.BOOL, [count]))
    nodes = []
    for place in range(count):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(place, np.int64), f"{SWITCHES}.place.{place}"))
        nodes.append(helper.make_node("Gather", [SWITCHES, f"{SWITCHES}.place.{place}"], [f"{SWITCHES}.{place}"]))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _switch_products(onnx: Any, graph: Any, exact: Any, number: dict[str, int]) -> None:
    """Puts each product with its Q/DQ nodes into a branch, and the product of the fp32 graph into the other."""
    plain = {node.name: node for node in exact.node if node.name in number}
    weights = {node.input[1] for node in plain.values()}
    known = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(
        tensor for tensor in exact.initializer if tensor.name in weights and tensor.name not in known
    )
    makers = {name: node for node in graph.node for name in node.output}
    moved: dict[str, Any] = {}  # by output: names of Q/DQ nodes are not always their own
    for node in graph.node:
        if node.name not in number:
            continue
        dequantize, weight = makers[node.input[0]], makers[node.input[1]]
        branch = [makers[dequantize.input[0]], dequantize, weight, node]
        moved[node.output[0]] = _either(onnx, node.name, number[node.name], node.output[0], branch, plain[node.name])
        moved |= {one.output[0]: None for one in branch[:3]}
    nodes = [node for node in (moved.get(node.output[0], node) for node in graph.node) if node is not None]
    del graph.node[:]
    graph.node.extend(nodes)


def _switch_tables(onnx: Any, model: Any, found: Sequence[Table], by_table: dict[str, int]) -> None:
    """Puts lookups and tied heads into two branches each, of which one reads int8 rows."""
    if not found:
        return
    coded = onnx.ModelProto()
    coded.CopyFrom(model)
    quantize_tables(coded, found)
    known = {tensor.name for tensor in model.graph.initializer}
    model.graph.initializer.extend(tensor for tensor in coded.graph.initializer if tensor.name not in known)
    number = {name: by_table[table.name] for table in found for name in (*table.lookups, *table.heads)}
    old = {name for node in model.graph.node for name in node.output}
    makers = {name: node for node in coded.graph.node for name in node.output}
    nodes = [
        node if node.name not in number
        else _either(onnx, node.name, number[node.name], node.output[0], _chain(makers, node.output[0], old), node)
        for node in model.graph.node
    ]  # fmt: skip
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _chain(makers: dict[str, Any], output: str, old: set[str]) -> list[Any]:
    """The node that makes `output`, and before it those that it needs and that make no tensor of `old`."""
    node = makers[output]
    needed = [name for name in node.input if name in makers and name not in old]
    found = [one for name in needed for one in _chain(makers, name, old)]
    return [one for place, one in enumerate([*found, node]) if one not in found[:place]]


def _either(onnx: Any, name: str, place: int, output: str, quantized: Sequence[Any], plain: Any) -> Any:
    """An If node that gives `output`; the nodes in its branches get tensors of their own."""
    branches = []
    for label, nodes in (("quantized", quantized), ("plain", [plain])):
        own = {made: f"{name}.{label}.{made}" for node in nodes for made in node.output}
        copies = []
        for node in nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [own.get(read, read) for read in node.input]
            copy.output[:] = [own[made] for made in node.output]
            copies.append(copy)
        result = onnx.helper.make_tensor_value_info(copies[-1].output[0], onnx.TensorProto.FLOAT, None)
        branches.append(onnx.helper.make_graph(copies, f"{name}.{label}", [], [result]))
    return onnx.helper.make_node(
        "If", [f"{SWITCHES}.{place}"], [output], name, then_branch=branches[0], else_branch=branches[1]
    )


def _switch_states(onnx: Any, graph: Any, bundle: Bundle, ranges: Ranges, kind: Kind, units: Sequence[Unit]) -> None:
    """Puts a pair of Q and DQ behind a state's input, and one before its output, each with its switch."""
    by_input = {state.input: state for state in bundle.spec.states}
    before: list[Any] = []
    behind: list[Any] = []
    for place, unit in enumerate(units):
        if not unit.way:
            continue
        state = by_input[unit.state]
        if unit.way == READ:
            source, target = state.input, f"{state.input}.read"
            _rename(graph.node, state.input, target)
        else:
            source, target = f"{state.output}.exact", state.output
            _rename(graph.node, target, source)
        pair = _pair(onnx, graph, source, ranges.states[unit.state].threshold, kind, unit.way)
        plain = onnx.helper.make_node("Identity", [source], [f"{target}.same"])
        made = _either(onnx, target, place, target, pair, plain)
        (before if unit.way == READ else behind).append(made)
    # Behind the switches themselves, which are the graph's first nodes.
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes[: len(units)], *before, *nodes[len(units) :], *behind])


def _rename(nodes: Sequence[Any], old: str, new: str) -> None:
    """A tensor's name in all nodes, and in their branches."""
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
        for item in node.attribute:
            if item.HasField("g"):
                _rename(item.g.node, old, new)


def _pair(onnx: Any, graph: Any, source: str, threshold: float, kind: Kind, way: str) -> list[Any]:
    """Q and DQ of a whole tensor from -threshold to threshold, in the kind of the activations."""
    helper, middle, result = onnx.helper, f"{source}.{way}.coded", f"{source}.{way}.again"
    coded, zero, steps = CODED[kind.activation]
    names = [f"{source}.{way}.scale", f"{source}.{way}.zero"]
    graph.initializer.append(helper.make_tensor(names[0], onnx.TensorProto.FLOAT, [], [threshold / steps or 1.0]))
    graph.initializer.append(helper.make_tensor(names[1], getattr(onnx.TensorProto, coded), [], [zero]))
    return [
        helper.make_node("QuantizeLinear", [source, *names], [middle]),
        helper.make_node("DequantizeLinear", [middle, *names], [result]),
    ]
