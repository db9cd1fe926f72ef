"""What TensorRT's engine inspector says of an engine's layers, read into one form.

The JSON is documented by examples alone, and 11 changed it: `Bindings` became `I/O Tensors`, and a tensor's
`Format/Datatype` became two fields. Of an engine that was built for names alone, a layer is a plain string. So nothing
but JSON is expected here: what is missing stays empty, and what is unknown is kept as it came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rmt_trt.errors import EngineError

LAYERS = "Layers"
# One piece of a layer's metadata names one ONNX node; behind it may stand, after bars, what else is known of it. Pieces
# are parted by the control character "unit separator", or by nothing.
PIECES = re.compile(r"\x1f|(?<=\])(?=\[ONNX Layer: )")
NODE = re.compile(r"\[ONNX Layer: (.*?)(?: \| .*)?\]", re.DOTALL)
NO_TACTIC = re.compile(r"0x0*|0")


@dataclass(frozen=True)
class Port:
    """A tensor that a layer reads or writes. format: precision and layout in the library's words; shape: 8x10x768. Both
    are empty where nothing is said."""

    name: str
    format: str = ""
    shape: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer of an engine, which may do the work of many of the graph's nodes. All but the name may be empty.

    kind    the library's word for what it is
    nodes   ONNX nodes that were fused into it
    kernel  its tactic
    told    all that the inspector says of it, as it came
    """

    name: str
    kind: str = ""
    nodes: tuple[str, ...] = ()
    kernel: str = ""
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerInformation:
    """Layers in the engine's order, and what else stands beside them."""

    layers: tuple[Layer, ...]
    more: Mapping[str, Any]

    @property
    def detailed(self) -> bool:
        """Whether more than names is known."""
        return any(layer.told for layer in self.layers)


def read_information(text: str, where: str) -> LayerInformation:
    """Reads what `get_engine_information` gave. Errors: EngineError, naming `where` the engine is, for what is no JSON."""
    try:
        # Not strict: names may hold control characters that were not escaped.
        value = json.loads(text, strict=False) if text.strip() else {}
    except (ValueError, RecursionError) as err:
        raise EngineError(
            f"the engine inspector says of {where} what is no JSON ({err}): {' '.join(text[:80].split())!r}"
        ) from err
    if not isinstance(value, dict):
        raise EngineError(f"the engine inspector says of {where} {text[:80]!r}; expected an object with its layers")
    found = value.get(LAYERS)
    layers = tuple(_layer(one) for one in found) if isinstance(found, list) else ()
    known = (LAYERS,) if isinstance(found, list) else ()
    return LayerInformation(layers, {name: one for name, one in value.items() if name not in known})


def _layer(told: object) -> Layer:
    if not isinstance(told, dict):
        return Layer(str(told))
    tactic = _said(told, "TacticName") or _said(told, "TacticValue")
    return Layer(
        _said(told, "Name") or "without a name",
        _said(told, "LayerType"),
        _nodes(_said(told, "Metadata")),
        "" if NO_TACTIC.fullmatch(tactic) else tactic,
        _ports(told.get("Inputs")),
        _ports(told.get("Outputs")),
        told,
    )


def _ports(told: object) -> tuple[Port, ...]:
    return tuple(_port(one) for one in told) if isinstance(told, list) else ()


def _port(told: object) -> Port:
    if not isinstance(told, dict):
        return Port(str(told))
    sizes = told.get("Dimensions")
    shape = "x".join(map(str, sizes)) if isinstance(sizes, list) else ""
    words = [_said(told, name) for name in ("Datatype", "Format", "Format/Datatype")]
    return Port(_said(told, "Name"), ", ".join(filter(None, words)), shape)


def _said(told: Mapping[str, Any], name: str) -> str:
    """A field as text, whatever the case of its name, which differs between tables; "" where there is none."""
    found = next((value for key, value in told.items() if key.lower() == name.lower()), None)
    return "" if found is None else str(found)


def _nodes(metadata: str) -> tuple[str, ...]:
    """Names of the ONNX nodes, each once, in order."""
    pieces = [piece.strip() for piece in PIECES.split(metadata) if piece.strip()]
    named = [(NODE.fullmatch(piece), piece) for piece in pieces]
    return tuple(dict.fromkeys(match[1] if match else piece for match, piece in named))
