"""ONNX graph -> TensorRT network, strongly typed, compared with the step spec before minutes are spent on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmt_trt.contract import LOGITS, SEGMENT, Head, StepSpec
from rmt_trt.errors import ContractError, EngineError, FormatError
from rmt_trt.runtime.engines.tensorrt_log import one_line

ANY = -1
Fact = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def read_network(trt: Any, builder: Any, log: Any, path: Path, title: str) -> tuple[Any, Any]:
    """The network of a graph, and the parser, which owns its weights: both must live until the build is over.

    Errors: FormatError with the parser's own words, naming the node that it does not take.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    with log.capture() as lines:
        if not parser.parse_from_file(str(path)):
            problems = [_problem(trt, parser.get_error(index)) for index in range(parser.num_errors)]
            raise FormatError(f"{title} cannot read '{path.name}': {one_line(problems or lines)}")
    return network, parser


def _problem(trt: Any, problem: Any) -> str:
    """A parser's error in one line: which node, and why. Of an operator that it does not know it says no more than the
    condition that did not hold."""
    node, operator, desc = problem.node_name(), problem.node_operator(), problem.desc()
    where = f"node '{node}' ({operator}): " if node or operator else ""
    inside = list(problem.local_function_stack())
    if operator and (problem.code() == trt.ErrorCode.UNSUPPORTED_NODE or "plugin" in desc.lower()):
        desc = (
            f"it has no operator {operator} ({desc}). It reads standard ONNX alone, and rmt-trt brings no plugins: export the "
            f"step with other nodes"
        )
    return f"{where}{desc}{f' (inside {inside})' if inside else ''}"


def check_network(trt: Any, network: Any, spec: StepSpec, name: str, head: Head) -> None:
    """Compares inputs and outputs with the spec; head "none" is a graph without logits.

    Errors: ContractError, when names, dtypes or shapes are not those of the spec, or an axis is frozen that should vary.
    """
    text = ANY if spec.segment_length > 1 else 1
    rows = (ANY, spec.num_logits) if spec.logits == "classifier" else (ANY, text, spec.num_logits)
    states = spec.states
    inputs = [(s.input, s.dtype, (ANY, *s.shape)) for s in states] + [(SEGMENT, "int64", (ANY, text))]
    outputs = [(s.output, s.dtype, (ANY, *s.shape)) for s in states] + [(LOGITS, "float32", rows)] * (head == "all")
    for kind, wanted, found in (
        ("inputs", inputs, _inputs(trt, network)),
        ("outputs", outputs, _outputs(trt, network)),
    ):
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


def take_head(trt: Any, network: Any, spec: StepSpec, head: Head) -> dict[str, list[dict[str, Any]]]:
    """Leaves the logits out of a network for head "none": the builder then drops what computes them alone.

    Returns the tables of inputs and outputs: name, dtype and shape, -1 where it varies. Errors: EngineError.
    """
    logits = len(spec.states)
    if head == "none" and network.num_outputs > logits:
        network.unmark_output(network.get_output(logits))
    found = {"inputs": _table(_inputs(trt, network)), "outputs": _table(_outputs(trt, network))}
    names = [entry["name"] for entry in found["outputs"]]
    if names != list(spec.outputs[: logits + (head == "all")]):
        raise EngineError(f"an engine with the outputs {names} was about to be built for head '{head}'")
    return found


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention node of a network. float32: its products are of float32."""

    name: str
    float32: bool
    attention: Any

    def take_apart(self) -> None:
        """Lets the builder make it of several kernels. Errors: EngineError."""
        self.attention.decomposable = True
        if not self.attention.decomposable:
            raise EngineError(f"attention node '{self.name}' cannot be marked as decomposable")


def attention_of(trt: Any, network: Any) -> tuple[Attention, ...]:
    """The attention nodes. Graphs of opset 22 and before have none: the builder joins products and softmax by itself."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give the base class
            attention = layer.attention
            float32 = attention.get_input(0).dtype == trt.DataType.FLOAT
            found.append(Attention(str(layer.name), float32, attention))
    return tuple(found)


def _inputs(trt: Any, network: Any) -> list[Fact]:
    return [_facts(trt, network.get_input(index)) for index in range(network.num_inputs)]


def _outputs(trt: Any, network: Any) -> list[Fact]:
    return [_facts(trt, network.get_output(index)) for index in range(network.num_outputs)]


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
