"""What is quantized or kept as one: a product, those that read one tensor, a layer's, a table, and the way of the memory."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rmt_trt.calibration.products import Product
from rmt_trt.calibration.tables import Table
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError

Grouping = Literal["products", "inputs", "layers"]
GROUPINGS: tuple[Grouping, ...] = ("products", "inputs", "layers")
READ, WRITE = "read", "write"
MOST_PRODUCTS = 48  # beyond that, those that read one tensor go together, unless another grouping is asked for
_SCOPES = "pkg.torch.onnx.name_scopes"  # written by PyTorch's exporter beside each node
_LAYER = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True)
class Unit:
    """nodes: the products by name. Or `table`, an embedding table's name. Or one way of a state: `way` is "read" or
    "write", `state` its name in the graph."""

    name: str
    nodes: tuple[str, ...] = ()
    table: str = ""
    way: str = ""
    state: str = ""

    @property
    def keep(self) -> tuple[str, ...]:
        """What `static_graph` is told to keep for this unit to stay float32."""
        return (*self.nodes, self.table) if self.table else self.nodes


def units_of(model: Any, chosen: Sequence[Product], grouping: Grouping | None = None) -> tuple[Unit, ...]:
    """The products as units, in the graph's order, each named by the module that it belongs to. model: an onnx.ModelProto.

    grouping  None takes "products", and "inputs" where these would be many. Errors: ContractError, for an unknown one.
    """
    grouping = check_grouping(grouping) or ("inputs" if len(chosen) > MOST_PRODUCTS else "products")
    modules = _modules(model.graph.node, {product.node for product in chosen})
    groups: dict[str, list[Product]] = {}
    for product in chosen:
        groups.setdefault(_key(product, modules[product.node], grouping), []).append(product)
    taken: set[str] = set()
    found = []
    for members in groups.values():
        name = _name([modules[product.node] for product in members], grouping)
        name = name if name not in taken else f"{name} ({members[0].node})"
        taken.add(name)
        found.append(Unit(name, tuple(product.node for product in members)))
    return tuple(found)


def check_grouping(value: str | None) -> Grouping | None:
    """Errors: ContractError."""
    for known in GROUPINGS:
        if value == known:
            return known
    if value is not None:
        raise ContractError(f"--units is {value!r:.60}; expected one of {', '.join(GROUPINGS)}")
    return None


def table_units(found: Sequence[Table]) -> tuple[Unit, ...]:
    """A unit for each table, its tied head with it."""
    return tuple(Unit(table.name, table=table.name) for table in found)


def memory_units(spec: StepSpec) -> tuple[Unit, ...]:
    """What is read out of each float32 state at the step's beginning, and what is written into it at its end."""
    names = [state.input for state in spec.states if state.dtype == "float32"]
    reads = (Unit(f"{name} read", way=READ, state=name) for name in names)
    return (*reads, *(Unit(f"{name} written", way=WRITE, state=name) for name in names))


def _key(product: Product, module: str, grouping: Grouping) -> str:
    if grouping == "products":
        return product.node
    layer = _LAYER.match(module)
    return layer[0] if layer and grouping == "layers" else product.activation


def _name(modules: Sequence[str], grouping: Grouping) -> str:
    """One module's name; of several "layer.0.attention.self.query+key+value", or the layer's where they are all of it."""
    layer = _LAYER.match(modules[0])
    if grouping == "layers" and layer:
        return layer[0]
    if len(modules) == 1:
        return modules[0]
    parts = [module.split(".") for module in modules]
    same = 0
    while all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    return ".".join([*parts[0][:same], "+".join(".".join(part[same:]) for part in parts)])


def _modules(nodes: Iterable[Any], wanted: set[str]) -> dict[str, str]:
    """The module of each node, without what all of them begin with, and those of layers without what layers begin with; a
    node's own name where nothing tells its module."""
    found = {node.name: _scope(node) for node in nodes if node.name in wanted}
    short = dict(found)
    for group in ([name for name in found if found[name]], [name for name in found if _LAYER.match(found[name])]):
        parts = [short[name].split(".") for name in group]
        same = 0
        while parts and all(_goes_on(one, same) and one[same] == parts[0][same] for one in parts):
            same += 1
        short |= {name: ".".join(one[same:]) for name, one in zip(group, parts, strict=True)}
    return {name: module or name for name, module in short.items()}


def _goes_on(parts: Sequence[str], place: int) -> bool:
    """Whether enough is left of a name without its part `place`: "layer" of "layer.0" stays."""
    return len(parts) > place + 1 and not parts[place + 1].isdigit()


def _scope(node: Any) -> str:
    """The innermost module of a node, by its path, or nothing."""
    text = next((item.value for item in node.metadata_props if item.key == _SCOPES), "")
    try:
        scopes = ast.literal_eval(text)
        return str(scopes[-2]) if len(scopes) > 1 else ""
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError):
        return ""
