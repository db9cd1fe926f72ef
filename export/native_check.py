"""Graphs with rmt-trt's own operators, checked without a GPU: their float32 twins on ONNX Runtime's CPU provider.

Small models' twins run the operators by their own kernels on the CPU. These are plain loops: of larger models, and where the
library was not built, each operator is written as the nodes of ONNX Runtime that it stands for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from rmt_trt.bundle import GraphEntry
from rmt_trt.contract import StepSpec
from rmt_trt.export.fused.layers import backbone_of
from rmt_trt.export.graph_check import GraphCheck, check_graphs
from rmt_trt.export.verify import TOLERANCES, model_reference
from rmt_trt.model.step import DecoderStep, EncoderStep
from rmt_trt.runtime import native

# Multiplications of a segment's products up to which the operators' own kernels need seconds for a whole check.
SMALL = 2 * 10**8
CHECKED = ("all", "last")  # all outputs, and those whose last layer computes nothing else
IN_A_LAYER = re.compile(r"\.(layer|layers|h)\.\d+\.")


def by_nodes(step: EncoderStep | DecoderStep, spec: StepSpec) -> bool:
    """Whether a model's twins are written with nodes of ONNX Runtime in the operators' place."""
    matrices = sum(p.numel() for name, p in step.named_parameters() if p.ndim == 2 and IN_A_LAYER.search(name))
    return native.library() is None or matrices * (spec.segment_length + spec.states[0].shape[0]) > SMALL


def check_native(
    entries: Sequence[GraphEntry],
    folder: Path,
    step: EncoderStep | DecoderStep,
    spec: StepSpec,
    initial: Sequence[np.ndarray],
    segments: int,
    progress: Callable[[int, int], None],
) -> GraphCheck:
    """Runs the twins with all outputs, and those with the last ones alone, along the recurrence, and compares them with the
    PyTorch recurrence whose layers have the tanh form of GELU where a product takes it in: not in gated MLPs.

    Errors: as `check_graphs`."""
    whole = [entry for entry in entries if entry.head in CHECKED]
    gated = any(layer.gate is not None for layer in backbone_of(step).layers)
    reference = model_reference(step if gated else with_tanh_gelu(step))
    return check_graphs(whole, folder, spec, initial, reference, segments, TOLERANCES["fp32"], progress)


def with_tanh_gelu(step: EncoderStep | DecoderStep) -> EncoderStep | DecoderStep:
    """The model with the tanh form in the place of its layers' exact GELU; it shares the weights."""
    from transformers.activations import GELUActivation

    twin = copy.deepcopy(step, {id(parameter): parameter for parameter in step.parameters()})
    exact = [
        name for name, m in twin.named_modules() if IN_A_LAYER.search(name) and isinstance(m, (GELUActivation, nn.GELU))
    ]
    for name in exact:
        owner, _, own = name.rpartition(".")
        setattr(twin.get_submodule(owner), own, nn.GELU(approximate="tanh"))
    return twin
