"""Rescaling by channel before quantization, as in SmoothQuant (Xiao et al. 2022, arXiv 2211.10438)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from rmt_trt.bundle import Bundle
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.step_graph import read_step, split_gemms
from rmt_trt.errors import ContractError, FormatError, require


def smoothed(
    bundle: Bundle, ranges: Ranges, alpha: float, keep: Collection[str] = frozenset()
) -> tuple[Ranges, dict[str, np.ndarray]]:
    """Ranges and `rescale` for `static_graph`: channel j of a tensor is divided by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),
    section 4 of the paper, and row j of the weights multiplied by it.

    x_j  the largest magnitude along the recurrence, w_j that of all products that read the tensor: they share s
    keep  products that stay float32; a tensor that only such ones read is left as it is

    A channel that is 0 throughout, or that no weight reads, keeps s_j = 1. The range of a rescaled tensor is that of its
    channels; where the method had cut it off below the largest magnitude, it is cut off at the same share of it.
    Errors: ContractError, for alpha beyond 0 to 1; FormatError, for ranges without channels or of another export.
    """
    check_alpha(alpha)
    ranges.require_model(bundle.spec, bundle.path)
    if not ranges.channels:
        raise FormatError(
            "the ranges hold no largest magnitudes of channels, which rescaling goes by: an older rmt-calibrate took them. "
            "Take them anew from the documents, or leave --smooth out"
        )
    largest_rows = _rows(bundle)
    rescale, tensors = {}, dict(ranges.tensors)
    for name, (nodes, rows) in largest_rows.items():
        if nodes <= set(keep):
            continue
        largest = np.array(ranges.channels.get(name, ()), np.float32)
        if largest.shape != rows.shape or name not in tensors:
            raise FormatError(
                f"the ranges hold {len(largest)} channels of the tensor {name!r:.80}, and its weights have {len(rows)} rows: they "
                f"were taken from another export. Calibrate with rmt-calibrate"
            )
        rescale[name] = scales(largest, rows, alpha)
        share = tensors[name].threshold / max(float(largest.max()), 1e-30)
        tensors[name] = replace(tensors[name], threshold=float((largest / rescale[name]).max()) * min(1.0, share))
    return replace(ranges, tensors=tensors), rescale


def check_alpha(alpha: float) -> None:
    """Errors: ContractError."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ContractError(
            f"--smooth is {alpha!r:.60}; expected a number from 0 to 1: the share of the channels' differences that moves from "
            f"the activations into the weights, such as 0.5"
        )


def scales(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """(k,) float32 s out of the largest magnitudes of channels and of rows, each (k,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = activations.astype(np.float64) ** alpha / weights.astype(np.float64) ** (1 - alpha)
    usable = (activations > 0) & (weights > 0) & np.isfinite(found)
    return np.where(usable, found, 1.0).astype(np.float32)


def _rows(bundle: Bundle) -> dict[str, tuple[set[str], np.ndarray]]:
    """By activation: the products that read it, and the largest magnitude of each row of their weights, (k,)."""
    onnx = require("onnx", "export", "rescaling")
    model, found = read_step(bundle)
    activations = {product.node: product.activation for product in found}
    split_gemms(model.graph, activations)  # of which some hold their weights transposed
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    rows: dict[str, tuple[set[str], np.ndarray]] = {}
    for node in model.graph.node:
        if node.name in activations:
            largest = np.abs(onnx.numpy_helper.to_array(weights[node.input[1]])).max(axis=1)
            nodes, before = rows.get(activations[node.name], (set(), largest))
            rows[activations[node.name]] = ({*nodes, node.name}, np.maximum(before, largest))
    return rows
