"""Which files an ONNX graph reads weights from, against those that its bundle lists.

TensorRT's parser keeps to the graph's folder by names alone: it follows links, and no hash covers a file that the manifest
does not name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from rmt_trt.errors import FormatError


def check_external_data(path: Path, file: str, listed: Collection[str]) -> None:
    """Reads the graph at `path`, without its external data. file: its name in the bundle. listed: the files, by their names
    in the bundle, that its weights may come from, which were checked.

    Errors: FormatError, when the graph is none, or reads from any other file.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as err:  # protobuf's errors, which derive from Exception alone
        raise FormatError(f"{path} is no readable ONNX graph ({err}). Copy the bundle again") from err
    folder = PurePosixPath(file).parent
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if str(folder / location) not in listed:
            raise FormatError(
                f"{path}: the weight {tensor.name!r:.80} is read from {location!r:.200}, which the bundle does not list as a file "
                f"of this graph. Export it again"
            )


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of a model: of its graph, of graphs inside nodes, and of its functions."""
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += (attribute.g, *attribute.graphs)
