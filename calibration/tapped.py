"""The step's graph with some of its inner tensors as outputs, in an ONNX Runtime session on the CPU."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration.products import Product
from rmt_trt.errors import ContractError, FormatError, RMTError, require
from rmt_trt.files import cannot_write
from rmt_trt.runtime.engines.cpu import open_session

GRAPH = "tapped.onnx"


def tapped_session(
    bundle: Bundle, folder: Path, choose: Callable[[Any], tuple[Product, ...]], threads: int | None
) -> tuple[Any, tuple[Product, ...]]:
    """A session of the bundle's fp32 step, with every activation that `choose` names as an output; and what it chose.

    folder: an empty one for the altered graph; it is needed until the session is there.
    Errors: ContractError, when the step has nothing that can be quantized; FormatError and EngineError, as the CPU engine.
    """
    onnx = require("onnx", "export", "calibration")
    entry = step_entry(bundle)
    with quantizable(bundle):
        model = onnx.load(str(bundle.graph_path(entry)), load_external_data=False)
        chosen = choose(model)
    if not chosen:
        raise ContractError(
            f"{bundle.path}: its step has no product of an activation with a constant float32 weight; there is nothing to "
            f"quantize"
        )
    given = {value.name for value in (*model.graph.input, *model.graph.output)}
    lacking = [name for name in (*bundle.spec.inputs, *bundle.spec.outputs) if name not in given]
    if lacking:
        raise FormatError(
            f"{bundle.path}: its fp32 step has no {lacking[0]!r}, which its spec names. Export the model again"
        )
    for name in dict.fromkeys(product.activation for product in chosen):
        if name not in given:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    try:
        onnx.save(model, str(folder / GRAPH))
        for name in entry.data:
            _link(bundle.file(name), folder / Path(name).name)
    except OSError as err:
        raise cannot_write(folder, err) from err
    return open_session(folder / GRAPH, threads), chosen


def step_entry(bundle: Bundle) -> GraphEntry:
    """The fp32 graph of the step. Errors: FormatError."""
    entry = bundle.graph("cpu", "fp32")
    if entry is None:
        raise FormatError(f"{bundle.path} holds no fp32 graph of its step. Export the model again")
    return entry


@contextlib.contextmanager
def quantizable(bundle: Bundle) -> Iterator[None]:
    """onnx and onnxruntime.quantization trust a graph: one that was altered fails them anywhere. Errors: FormatError then."""
    try:
        yield
    except (RMTError, OSError, MemoryError):
        raise
    except Exception as err:
        raise FormatError(
            f"{bundle.path}: its fp32 step cannot be quantized ({type(err).__name__}: {err!s:.300}). If the bundle was altered, "
            f"export the model again"
        ) from err


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copyfile(source, target)
