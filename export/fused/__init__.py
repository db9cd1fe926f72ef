"""Graphs with fused nodes for ONNX Runtime's CUDA provider, written from a model's weights.

A graph is written per role and head; all of a dtype share one file of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rmt_trt.bundle import GraphEntry
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.export.fused.decoder import decoder_step
from rmt_trt.export.fused.encoder import encoder_step
from rmt_trt.export.fused.graph import FLOATS, OPSET, Graph, Weights
from rmt_trt.export.fused.layers import CannotFuse, backbone_of
from rmt_trt.export.fused.native import Native
from rmt_trt.initial_state import to_metadata
from rmt_trt.model.step import RMTModel
from rmt_trt.runtime.native import NEED

__all__ = ["CannotFuse", "FusedGraphs", "Native", "fused_graphs"]

# Full rows from which on a step takes three products for query, key and value (`blocks.separate_attention`), by form: where
# the two ways meet on an H200. See docs/performance.md.
SEPARATE_FROM = {"encoder": 8, "decoder": 16}
HEADS = {"classifier": ("none", "all"), "lm": ("none", "last", "all", "loglik")}


@dataclass(frozen=True)
class FusedGraphs:
    """entries: the files that were written, by role and head. fused: what one node does in place of several, counted
    in one step."""

    entries: tuple[GraphEntry, ...]
    fused: dict[str, int]


def fused_graphs(
    model: RMTModel,
    spec: StepSpec,
    dtype: str,
    folder: Path,
    grouped: bool | None = None,
    native: Native | None = None,
) -> FusedGraphs:
    """Writes `cuda-DTYPE-ROLE-HEAD.onnx` for every role and head, those for large batches with the smallest of these in
    their name, and `cuda-DTYPE.data`, into a folder.

    The graphs take segments of exactly S places, padded with -1 in role "step". Inputs and outputs are those of the
    contract, states in float32.
    grouped  whether attention with rotary positions may be GroupQueryAttention, which the CUDA provider has for half
             precision only; None takes what fits the dtype
    native   by which of rmt-trt's own operators, for an encoder; None is none. dtype "fp8" has thresholds in it, and is
             float16 where it is not in FP8

    Errors: CannotFuse, when a backbone has something that no fused node knows.
    """
    half = "fp16" if dtype == "fp8" and native is not None and native.thresholds else dtype
    if half not in FLOATS:
        raise ContractError(f"dtype is {dtype!r}; graphs with fused nodes are written in {', '.join(FLOATS)}")
    if any(state.dtype != "float32" for state in spec.states):
        raise CannotFuse("the step carries its memory in float16, and fused graphs carry it in float32")
    if native is not None and spec.form != "encoder":
        raise CannotFuse(f"our own operators are written into encoders' graphs, and this is form '{spec.form}'")
    backbone = backbone_of(model)
    metadata = to_metadata(spec, {"memory": model.memory.detach().numpy()})
    weights = Weights(folder / f"cuda-{dtype}.data", half)
    # Rotary attention takes query and key apart by itself, whatever the batch.
    large = [] if backbone.rotary is not None else [("full", SEPARATE_FROM[spec.form])]
    written = []
    try:
        for role, min_batch in [("full", 1), *large, ("step", 1)]:
            for head in HEADS[spec.logits]:
                graph = Graph(weights, dtype != "fp32" if grouped is None else grouped)
                if spec.form == "encoder":
                    encoder_step(graph, model.config, spec, backbone, role, head, min_batch > 1, native)
                else:
                    decoder_step(graph, model.config, spec, backbone, role, head, separate=min_batch > 1)
                name = f"cuda-{dtype}-{role}-{head}{f'-from-{min_batch}' if min_batch > 1 else ''}.onnx"
                graph.save(folder / name, metadata)
                needs = () if native is None else (NEED,)
                entry = GraphEntry(name, role, "cuda", dtype, head, OPSET, (weights.path.name,), min_batch, needs)
                written.append((entry, dict(graph.fused)))
    finally:
        weights.close()
    return FusedGraphs(tuple(entry for entry, _ in written), written[0][1])
