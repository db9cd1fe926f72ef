"""A model out of its bundle: the graph holds every weight, and its metadata says where each one stands.

The exporter transposes matrices, keeps equal tensors once and leaves zero biases out, so names alone do not lead back
to the checkpoint. `places_of` writes the way back while both sides are at hand; it costs nothing when the graph runs.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from rmt_trt.bundle import Bundle
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.model.checkpoint import check_sizes
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.step import RMTModel, build_model, fingerprint

WEIGHTS_KEY = "rmt_trt.weights"
# The memory's first value travels as the initial state.
MEMORY = "memory"
CORNER = 8
# A tied head takes a tensor twice, and fresh biases and norms many times. A stranger's graph that lets one matrix stand
# for a thousand layers would fill the memory from a small file.
LARGEST_REUSE = 4
REUSE_FREE = 1 << 20
CHECKPOINT_NEEDED = "Give the checkpoint that it was exported from (--model model.pt)"


def places_of(state: Mapping[str, torch.Tensor], graph: Mapping[str, Any]) -> str:
    """Where each tensor of a state dict stands among a graph's initializers (name -> what has `numpy()`), as JSON.

    `{"name": {"tensor": initializer, "transposed": true}}`, or `{"name": {"value": 0.0, "length": 5}}` for a vector of
    one value that is nowhere in the graph. A tensor that cannot be found bit by bit is left out.
    """
    index: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, value in graph.items():
        array = value.numpy()
        if array.dtype == np.float32:
            index[_key(array)].append(name)
    places: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        value = tensor.detach().cpu().numpy()
        if name != MEMORY and value.dtype == np.float32:
            place = _find(name, value, index, graph)
            if place is not None:
                places[name] = place
    return json.dumps(places, sort_keys=True)


def model_from_bundle(bundle: Bundle | Path | str) -> RMTModel:
    """The model that a bundle was exported from, in evaluation mode, its fingerprint compared.

    Errors: FormatError, when the bundle holds a step of the user's own, was written without the places of its weights,
    or does not give the weights that its fingerprint was taken of: the checkpoint is needed then.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    manifest, where = bundle.manifest, bundle.path
    if manifest.model is None:
        raise FormatError(f"{where} holds a step of the user's own, whose PyTorch module no file describes")
    weights = _weights(bundle)
    weights[MEMORY] = torch.from_numpy(bundle.initial()[0].astype(np.float32))
    try:
        config = ModelConfig.from_json(manifest.model)
        if config.spec(bundle.spec.fingerprint) != bundle.spec:
            raise FormatError("its step spec and its model config disagree")
        model = build_model(config, weights)
        check_sizes(model)
    except (FormatError, ContractError) as err:
        raise FormatError(
            f"{where} does not hold the model that its manifest describes: {err}. {CHECKPOINT_NEEDED}"
        ) from err
    if fingerprint(model, {MEMORY: torch.from_numpy(bundle.initial()[0])}) != bundle.spec.fingerprint:
        raise FormatError(f"{where} gives other weights than its fingerprint was taken of. {CHECKPOINT_NEEDED}")
    return model


def _key(array: np.ndarray) -> tuple[Any, ...]:
    """Shape and corner: what equal tensors have in common and others hardly ever do."""
    return array.shape, array[(slice(CORNER),) * array.ndim].tobytes()


def _find(
    name: str, value: np.ndarray, index: Mapping[tuple[Any, ...], list[str]], graph: Mapping[str, Any]
) -> dict[str, Any] | None:
    for transposed in (False, True) if value.ndim == 2 else (False,):
        wanted = value.T if transposed else value
        candidates = index.get(_key(wanted), [])
        for candidate in sorted(candidates, key=lambda other: other != name):
            # Bit by bit: the fingerprint tells -0.0 from 0.0.
            if np.array_equal(graph[candidate].numpy().view(np.int32), wanted.view(np.int32)):
                return {"tensor": candidate, "transposed": True} if transposed else {"tensor": candidate}
    if value.ndim == 1 and value.size and (value.view(np.int32) == value.view(np.int32)[0]).all():
        return {"value": float(value[0]), "length": len(value)}
    return None


def _weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    """The state dict without the memory. Tensors may be views of the file and of each other."""
    entry = bundle.graph("cpu", "fp32")
    if entry is None:
        raise FormatError(f"{bundle.path} holds no fp32 graph to take the weights from. {CHECKPOINT_NEEDED}")
    path = bundle.graph_path(entry)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as err:  # protobuf's errors, which derive from Exception alone
        raise FormatError(f"{path} is no readable ONNX graph ({err}). Copy the bundle again") from err
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    files = {name: bundle.file(name) for name in entry.data}
    read: dict[str, np.ndarray] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, place in _places(model, path).items():
        source = place.get("tensor")
        if source is None:
            weights[name] = torch.tensor(place["value"], dtype=torch.float32).expand(place["length"])
            continue
        if source not in tensors:
            raise FormatError(f"{path} says that '{name}' stands in '{source}', which it lacks. {CHECKPOINT_NEEDED}")
        if source not in read:
            read[source] = _values(tensors[source], files, path)
        with (
            warnings.catch_warnings()
        ):  # the weights are copied into the model, so a view that cannot be written is fine
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(read[source])
        if place.get("transposed") and tensor.ndim != 2:
            raise FormatError(
                f"{path} says that '{name}' is '{source}' transposed, which is no matrix: its shape is {tuple(tensor.shape)}. "
                f"{CHECKPOINT_NEEDED}"
            )
        weights[name] = tensor.T if place.get("transposed") else tensor
    held, claimed = sum(v.size for v in read.values()), sum(t.numel() for t in weights.values())
    if claimed > LARGEST_REUSE * held + REUSE_FREE:
        raise FormatError(f"{path} claims {claimed} weights and holds {held}; it was altered. {CHECKPOINT_NEEDED}")
    return weights


def _places(model: Any, path: Path) -> dict[str, dict[str, Any]]:
    """The metadata that `places_of` wrote, its types checked."""
    text = next((entry.value for entry in model.metadata_props if entry.key == WEIGHTS_KEY), None)
    if text is None:
        raise FormatError(
            f"{path} does not say where its weights stand: an older rmt-trt wrote it. {CHECKPOINT_NEEDED}"
        )
    try:
        places = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise FormatError(f"{path}: its '{WEIGHTS_KEY}' is not valid JSON ({err}). {CHECKPOINT_NEEDED}") from err
    if not isinstance(places, dict) or not all(_is_place(place) for place in places.values()):
        raise FormatError(f"{path}: its '{WEIGHTS_KEY}' does not say where tensors stand. {CHECKPOINT_NEEDED}")
    return places


def _is_place(place: object) -> bool:
    if not isinstance(place, dict):
        return False
    if set(place) <= {"tensor", "transposed"}:
        return isinstance(place.get("tensor"), str) and place.get("transposed", True) is True
    value, length = place.get("value"), place.get("length")
    return set(place) == {"value", "length"} and type(value) is float and type(length) is int and 0 < length < 1 << 32


def _values(tensor: onnx.TensorProto, files: Mapping[str, Path], where: Path) -> np.ndarray:
    """A float32 initializer as a view of the file or of the parsed graph; every size is compared, none believed."""
    shape = tuple(tensor.dims)
    size = 4 * math.prod(shape)
    # No model has a weight without values, and numpy refuses shapes such as (0, 2**62).
    if tensor.data_type != onnx.TensorProto.FLOAT or any(axis < 1 for axis in shape) or len(shape) > 8:
        raise FormatError(f"{where}: weight '{tensor.name}' is no float32 tensor of shape {shape}. {CHECKPOINT_NEEDED}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        file = files.get(facts.get("location", ""))
        offset = _whole(facts.get("offset", "0"))
        length = _whole(facts.get("length", ""))
        if file is None or length != size or not 0 <= offset <= file.stat().st_size - size:
            raise FormatError(
                f"{where}: weight '{tensor.name}' does not stand where the graph says. Copy the bundle again"
            )
        return np.memmap(file, "<f4", "r", offset, shape)
    if tensor.float_data and len(tensor.float_data) == size // 4:
        return np.array(tensor.float_data, np.float32).reshape(shape)
    if len(tensor.raw_data) != size:
        raise FormatError(f"{where}: weight '{tensor.name}' has not the {size} bytes of its shape. {CHECKPOINT_NEEDED}")
    return np.frombuffer(tensor.raw_data, "<f4").reshape(shape)


def _whole(text: str) -> int:
    """A number as external data states it, or -1, which fits nothing."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else -1
