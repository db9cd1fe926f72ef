"""Graphs with fused nodes for ONNX Runtime's CUDA provider, written from a model's weights.

A graph is written per role and head; all of a dtype share one file of weights. Beside them there may be graphs with
rmt-trt's own operators (`rmt_trt.runtime.native`), and such whose operators have kernels for one kind of GPU (`hopper`), which
read the same file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rmt_trt.bundle import GraphEntry
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.export.fused.decoder import decoder_step
from rmt_trt.export.fused.encoder import encoder_step
from rmt_trt.export.fused.graph import FLOATS, OPSET, Graph, Weights
from rmt_trt.export.fused.hopper import fits
from rmt_trt.export.fused.layers import EXACT_GELU, TANH_GELU, Backbone, CannotFuse, backbone_of
from rmt_trt.export.fused.native import Native
from rmt_trt.export.fused.native_decoder import gates, rotates
from rmt_trt.initial_state import to_metadata
from rmt_trt.model.step import RMTModel
from rmt_trt.runtime.native import HOPPER, NEED

__all__ = ["CannotFuse", "FusedGraphs", "Native", "backbone_of", "fused_graphs"]

# Full rows from which on a step takes three products for query, key and value (`blocks.separate_attention`), by form: where
# the two ways meet on an H200. See docs/performance.md.
SEPARATE_FROM = {"encoder": 8, "decoder": 16}
HEADS = {"classifier": ("none", "all"), "lm": ("none", "last", "all", "loglik")}


# With operators of our own. Of few rows only the MLP's first product is quicker so, with bias and GELU in its epilogue; of
# many all are. See docs/performance.md.
FEW, MANY = Native(qkv=False, out=False, down=False), Native()


@dataclass(frozen=True)
class FusedGraphs:
    """entries: the files that were written, by role and head. fused: what one node does in place of several, counted
    in one step. native, native_fused: the same of graphs with operators of our own that stand beside them. hopper,
    hopper_fused: of such for GPUs of compute capability 9.0."""

    entries: tuple[GraphEntry, ...]
    fused: dict[str, int]
    native: tuple[GraphEntry, ...] = ()
    native_fused: dict[str, int] = field(default_factory=dict)
    hopper: tuple[GraphEntry, ...] = ()
    hopper_fused: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A role's graphs, from `min_batch` documents on. separate: query, key and value by three products."""

    role: str
    min_batch: int
    separate: bool
    native: Native | None = None

    def file(self, dtype: str, head: str) -> str:
        own = "" if self.native is None else "-hopper" if self.native.hopper else "-native"
        return f"cuda-{dtype}{own}-{self.role}-{head}{f'-from-{self.min_batch}' if self.min_batch > 1 else ''}.onnx"

    @property
    def needs(self) -> tuple[str, ...]:
        if self.native is None or self.native.by_nodes:
            return ()
        return (HOPPER, NEED) if self.native.hopper else (NEED,)


def fused_graphs(
    model: RMTModel,
    spec: StepSpec,
    dtype: str,
    folder: Path,
    grouped: bool | None = None,
    native: Native | None = None,
    beside: bool = False,
    by_nodes: bool = False,
) -> FusedGraphs:
    """Writes `cuda-DTYPE-ROLE-HEAD.onnx` for every role and head, those for large batches with the smallest of these in
    their name, and `cuda-DTYPE.data`, into a folder.

    The graphs take segments of exactly S places, padded with -1 in role "step". Inputs and outputs are those of the
    contract, states in float32.
    grouped  whether attention with rotary positions may be GroupQueryAttention, which the CUDA provider has for half
             precision only; None takes what fits the dtype
    native   by which of rmt-trt's own operators all graphs are written; None is none. dtype "fp8" has
             thresholds in it, and is float16 where it is not in FP8
    beside   also writes graphs with these operators, where that is quicker: `cuda-DTYPE-native-ROLE-HEAD.onnx`, and with
             those for compute capability 9.0: `cuda-DTYPE-hopper-ROLE-HEAD.onnx`
    by_nodes each operator in the graphs beside is written as the nodes that it stands for, and nothing is needed

    Errors: CannotFuse, when a backbone has something that no fused node knows.
    """
    half = "fp16" if dtype == "fp8" and native is not None and native.thresholds else dtype
    if half not in FLOATS:
        raise ContractError(f"dtype is {dtype!r}; graphs with fused nodes are written in {', '.join(FLOATS)}")
    if any(state.dtype != "float32" for state in spec.states):
        raise CannotFuse("the step carries its memory in float16, and fused graphs carry it in float32")
    backbone = backbone_of(model)
    metadata = to_metadata(spec, {"memory": model.memory.detach().numpy()})
    weights = Weights(folder / f"cuda-{dtype}.data", half)
    own_variants = _native_variants(backbone, spec, by_nodes) if beside else []
    of_one_kind = _roles(Native(hopper=True, by_nodes=by_nodes)) if beside and fits(backbone) else []
    joined = bool(own_variants) and gates(backbone)

    def written(variants: list[Variant]) -> tuple[tuple[GraphEntry, ...], dict[str, int]]:
        found = []
        for variant in variants:
            for head in HEADS[spec.logits]:
                graph = Graph(weights, half != "fp32" if grouped is None else grouped, joined)
                _step(graph, model, spec, backbone, variant, head)
                name = variant.file(dtype, head)
                graph.save(folder / name, metadata)
                entry = GraphEntry(
                    name, variant.role, "cuda", dtype, head, OPSET, (weights.path.name,), variant.min_batch,
                    variant.needs,
                )  # fmt: skip
                found.append((entry, dict(graph.fused)))
        return tuple(entry for entry, _ in found), found[0][1] if found else {}

    try:
        graphs = written(_variants(backbone, spec, native))
        own = written(own_variants)
        hopper = written(of_one_kind)
    finally:
        weights.close()
    return FusedGraphs(*graphs, *own, *hopper)


def _variants(backbone: Backbone, spec: StepSpec, native: Native | None) -> list[Variant]:
    # Rotary attention takes query and key apart by itself, whatever the batch.
    large = [] if backbone.rotary is not None else [Variant("full", SEPARATE_FROM[spec.form], True, native)]
    return [Variant("full", 1, False, native), *large, Variant("step", 1, False, native)]


def _native_variants(backbone: Backbone, spec: StepSpec, by_nodes: bool) -> list[Variant]:
    """Of few rows, only where more than a bias goes into a product: else nothing would be gained."""
    if backbone.parallel:
        return []  # such layers have no place for them
    epilogue = backbone.activation in (EXACT_GELU, TANH_GELU) and all(layer.gate is None for layer in backbone.layers)
    if backbone.rotary is not None:
        return _roles(_rotary(backbone, by_nodes)) if epilogue or rotates(backbone) or gates(backbone) else []
    large = Variant("full", SEPARATE_FROM[spec.form], True, replace(MANY, by_nodes=by_nodes))
    return [large, *(_roles(replace(FEW, by_nodes=by_nodes)) if epilogue else [])]


def _rotary(backbone: Backbone, by_nodes: bool) -> Native:
    """Products of our own where these have a bias or an activation to take in; without, ONNX Runtime's are as quick."""
    layer = backbone.layers[0]
    qkv = any(part.bias is not None for part in (layer.query, layer.key, layer.value))
    up = layer.gate is None or layer.gate.bias is not None or layer.up.bias is not None
    return Native(qkv=qkv, out=False, up=up, down=False, by_nodes=by_nodes)


def _roles(native: Native) -> list[Variant]:
    return [Variant("full", 1, False, native), Variant("step", 1, False, native)]


def _step(graph: Graph, model: RMTModel, spec: StepSpec, backbone: Backbone, variant: Variant, head: str) -> None:
    if spec.form == "encoder":
        encoder_step(graph, model.config, spec, backbone, variant.role, head, variant.separate, variant.native)
    else:
        decoder_step(graph, model.config, spec, backbone, variant.role, head, variant.separate, variant.native)
