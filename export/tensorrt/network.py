"""ONNX graph -> TensorRT network, strongly typed, compared with the step spec before minutes are spent on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmt_trt.contract import LOGITS, SEGMENT, StepSpec
from rmt_trt.errors import ContractError, EngineError, FormatError
from rmt_trt.runtime.engines.tensorrt_log import one_line

ANY = -1


def read_network(trt: Any, builder: Any, log: Any, path: Path, title: str) -> tuple[Any, Any]:
    """The network of a graph, and the parser, which owns its weights: both must live until the build is over.

    Errors: FormatError with the parser's own words, naming the node that it does not take.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    with log.capture() as lines:
        if not parser.parse_from_file(str(path)):
            problems = [_problem(parser.get_error(index)) for index in range(parser.num_errors)]
            raise FormatError(f"{title} cannot read '{path.name}': {one_line(problems or lines)}")
    return network, parser


def _problem(problem: Any) -> str:
    """A parser's error in one line: which node, and why."""
    node, operator = problem.node_name(), problem.node_operator()
    where = f"node '{node}' ({operator}): " if node or operator else ""
    inside = list(problem.local_function_stack())
    return f"{where}{problem.desc()}{f' (inside {inside})' if inside else ''}"


def check_network(trt: Any, network: Any, spec: StepSpec, name: str) -> dict[str, list[dict[str, Any]]]:
    """The table of inputs and outputs: name, dtype and shape, -1 where it varies.

    Errors: ContractError, when names, dtypes or shapes are not those of the spec, or an axis is frozen that should vary.
    """
    text = ANY if spec.segment_length > 1 else 1
    rows = (ANY, spec.num_logits) if spec.logits == "classifier" else (ANY, text, spec.num_logits)
    states = spec.states
    inputs = [(s.input, s.dtype, (ANY, *s.shape)) for s in states] + [(SEGMENT, "int64", (ANY, text))]
    outputs = [(s.output, s.dtype, (ANY, *s.shape)) for s in states] + [(LOGITS, "float32", rows)]
    found_in = [_facts(trt, network.get_input(index)) for index in range(network.num_inputs)]
    found_out = [_facts(trt, network.get_output(index)) for index in range(network.num_outputs)]
    for kind, wanted, found in (("inputs", inputs, found_in), ("outputs", outputs, found_out)):
        loose = kind == "outputs"
        if [fact[0] for fact in found] != [want[0] for want in wanted]:
            raise ContractError(
                f"graph '{name}' has the {kind} {[fact[0] for fact in found]}; the step spec says "
                f"{[want[0] for want in wanted]}. Export the model again"
            )
        for want, fact in zip(wanted, found, strict=True):
            if not _same(want, fact, loose):
                raise ContractError(
                    f"graph '{name}': '{fact[0]}' is {fact[1]} of shape {fact[2]}; the step spec says {want[1]} of shape "
                    f"{want[2]}, where {ANY} varies. Export the model again"
                )
    return {"inputs": _table(found_in), "outputs": _table(found_out)}


def allow_decomposition(trt: Any, network: Any) -> tuple[str, ...]:
    """Lets the builder make an attention node of several kernels where it has no single one, as in fp32 or for small
    heads: without that it stops. Returns the names of the nodes; older opsets have none, and fuse by themselves."""
    names = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give the base class
            attention = layer.attention
            attention.decomposable = True
            if not attention.decomposable:
                raise EngineError(f"attention node '{layer.name}' cannot be marked as decomposable")
            names.append(str(layer.name))
    return tuple(names)


Fact = tuple[str, str, tuple[int, ...]]


def _facts(trt: Any, tensor: Any) -> Fact:
    kinds = {
        trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16",
        trt.DataType.INT64: "int64", trt.DataType.INT32: "int32",
    }  # fmt: skip
    return str(tensor.name), kinds.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)


def _same(want: Fact, fact: Fact, loose: bool) -> bool:
    """Whether a tensor is as wanted. loose: sizes that the parser leaves open are no fault; outputs have such, which a
    computation gives. A text axis of one token may be open too."""
    if want[1] != fact[1] or len(want[2]) != len(fact[2]):
        return False
    return all(a == b or (b == ANY and (loose or a == 1)) for a, b in zip(want[2], fact[2], strict=True))


def _table(facts: list[Fact]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in facts]
