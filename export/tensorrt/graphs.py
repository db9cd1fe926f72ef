"""Which ONNX graph is compiled: the one that the bundle lists, or one that is made for the build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rmt_trt.bundle import GRAPHS, Bundle, GraphEntry
from rmt_trt.contract import Head
from rmt_trt.errors import FormatError
from rmt_trt.export.external_data import check_external_data
from rmt_trt.export.graph_check import GraphCheck, check_graphs
from rmt_trt.export.plain import HALVES, plain_graph
from rmt_trt.export.recover import model_from_bundle
from rmt_trt.export.step_to_onnx import OPSET
from rmt_trt.export.verify import TOLERANCES, model_reference, step_reference
from rmt_trt.model.step import DecoderStep, EncoderStep, fingerprint

Progress = Callable[[str, int, int], None]

# The opset of the graphs that are made, by dtype, for all flavours. In 20 attention is products and a softmax, which the
# builder joins by itself; from 23 on it could be a standard Attention node. Kernels of a step with 20 / 23, as TensorRT-RTX
# 1.7.1 lists them in its engines:
#                BERT-base    GPT-2 small    a Llama of that size; 12 layers each
#   fp16, bf16   139 / 151     125 / 172     148 / 171
#   fp32         210 / 222     185 / 209     195 / 195
# In half precision attention is one kernel a layer either way. Around an Attention node the builder rearranges queries,
# keys, values and the result in kernels of their own; what stands apart it joins with the products beside it. In fp32,
# which compiles step.onnx, there is no such kernel, and an Attention node has to be taken apart again.
OPSETS = {"fp16": OPSET, "bf16": OPSET}


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph to compile, its entry with the name that it has or would get in the bundle, and whether it is new.

    check  the errors on the CPU of a new one, or None
    """

    path: Path
    entry: GraphEntry
    new: bool
    check: GraphCheck | None = None


def check_listed(bundle: Bundle | None, engine: str, dtype: str) -> None:
    """Errors: FormatError, when the graph that a dtype needs is not in the bundle; None is one that is not there yet."""
    if dtype in HALVES or (bundle is not None and _listed_entry(bundle, engine, dtype, "all") is not None):
        return
    if bundle is None and dtype == "fp32":
        return
    where = "a new bundle" if bundle is None else bundle.path
    command = f"rmt-calibrate {'NAME.rmt' if bundle is None else bundle.path} --engine {engine} --dtype {dtype}"
    raise FormatError(
        f"{where} lists no {dtype} graph for engine '{engine}', and none is made for a build. Add one with {command}, or take "
        f"--dtype fp16"
    )


def listed_graph(bundle: Bundle, engine: str, dtype: str, head: Head) -> Graph | None:
    """The graph that the bundle has for this use, without logits or with them; in fp32 the last resort is step.onnx.

    Errors: FormatError, when it was altered, or reads weights from a file that the bundle does not list as its own.
    """
    entry = _listed_entry(bundle, engine, dtype, head)
    if entry is None:
        return None
    path = bundle.graph_path(entry)
    check_external_data(path, entry.file, entry.data)
    return Graph(path, entry, new=False)


def _listed_entry(bundle: Bundle, engine: str, dtype: str, head: Head) -> GraphEntry | None:
    own = bundle.graph(engine, dtype, head) or bundle.graph(engine, dtype)
    return own or (bundle.graph("cpu", "fp32") if dtype == "fp32" else None)


def made_graph(
    bundle: Bundle,
    engine: str,
    dtype: str,
    model: nn.Module | None,
    folder: Path,
    check_segments: int,
    progress: Progress = lambda stage, done, total: None,
) -> Graph:
    """A plain graph in half precision, checked on the CPU where that has the dtype: it has no bf16.

    model  the float32 step of the user's own; None takes a published model out of the bundle
    Errors: FormatError, when the bundle does not give its model, or `model` is another; VerificationError, when the
    graph does not compute it.
    """
    step = _step(bundle, dtype, model)
    initial = {state.initial: value for state, value in zip(bundle.spec.states, bundle.initial(), strict=True)}
    path = folder / f"{engine}-{dtype}-step-all.onnx"
    progress("graph", 0, 1)
    entry = plain_graph(step, bundle.spec, dtype, path, initial, engine=engine, opset=OPSETS[dtype])
    progress("graph", 1, 1)
    check = None
    if check_segments and dtype == "fp16":
        if isinstance(step, (EncoderStep, DecoderStep)):
            reference = model_reference(step)
        else:
            reference = step_reference(step, bundle.spec, bundle.initial())
        check = check_graphs(
            (entry,), folder, bundle.spec, bundle.initial(), reference, check_segments, TOLERANCES[dtype],
            progress=lambda done, total: progress("check", done, total),
        )  # fmt: skip
    data = tuple(f"{GRAPHS}/{name}" for name in entry.data)
    return Graph(path, replace(entry, file=f"{GRAPHS}/{entry.file}", data=data), True, check)


def _step(bundle: Bundle, dtype: str, model: nn.Module | None) -> nn.Module:
    """The float32 module of the bundle, proved to be its own."""
    if model is None:
        if bundle.manifest.model is None:
            raise FormatError(
                f"{bundle.path} holds a step of the user's own, which no file describes: its {dtype} graph is made from its "
                f"PyTorch module. Pass it: rmt_trt.export.tensorrt.add_engines(path, dtypes=('{dtype}',), model=step)"
            )
        return model_from_bundle(bundle)
    values = zip(bundle.spec.states, bundle.initial(), strict=True)
    if fingerprint(model, {s.initial: torch.from_numpy(value) for s, value in values}) != bundle.spec.fingerprint:
        raise FormatError(f"the model holds other weights than {bundle.path} was exported from. Give the right one")
    return model.eval()
