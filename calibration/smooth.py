"""Rescaling by channel before quantization, as in SmoothQuant (Xiao et al. 2022, arXiv 2211.10438)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from rmt_trt.bundle import Bundle
from rmt_trt.calibration.ranges import Ranges
from rmt_trt.calibration.step_graph import read_step, split_gemms
from rmt_trt.errors import ContractError, FormatError, require

CREST = (
    6.0  # largest magnitude by root mean square: some 10**5 values of a normal distribution have 4.5, real tensors more
)


def smoothed(
    bundle: Bundle, ranges: Ranges, alpha: float, keep: Collection[str] = frozenset()
) -> tuple[Ranges, dict[str, np.ndarray]]:
    """Ranges and `rescale` for `static_graph`: channel j of a tensor is divided by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),
    section 4 of the paper, and row j of the weights multiplied by it.

    x_j  the largest magnitude along the recurrence, w_j that of all products that read the tensor: they share s
    keep  products that stay float32; a tensor that only such ones read is left as it is

    A tensor is rescaled only where that lowers the noise of the products that read it, as `noise` estimates it: where large
    activations meet large rows, as behind some GELUs, no alpha between suits both. `rescale` names those that are.
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
    rescale, tensors = {}, dict(ranges.tensors)
    for name, by_node in _weights(bundle).items():
        if by_node.keys() <= set(keep):
            continue
        weights = list(by_node.values())
        largest = np.array(ranges.channels.get(name, ()), np.float32)
        if largest.shape != weights[0].shape[:1] or name not in tensors:
            raise FormatError(
                f"the ranges hold {len(largest)} channels of the tensor {name!r:.80}, and its weights have {len(weights[0])} rows: "
                f"they were taken from another export. Calibrate with rmt-calibrate"
            )
        scale = scales(largest, np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0), alpha)
        share = min(1.0, tensors[name].threshold / max(float(largest.max()), 1e-30))
        threshold = share * float((largest / scale).max())
        after = noise(threshold, largest / scale, [weight * scale[:, None] for weight in weights])
        if after < noise(tensors[name].threshold, largest, weights):
            rescale[name], tensors[name] = scale, replace(tensors[name], threshold=threshold)
    return replace(ranges, tensors=tensors), rescale


def noise(threshold: float, largest: np.ndarray, weights: Sequence[np.ndarray]) -> float:
    """Expected square of what rounding to 8-bit integers adds to the products x @ w, summed over their outputs.

    largest: magnitudes of x by channel, (k,), of which it is taken that they are CREST times the root of the mean square.
    weights: each (k, n), rounded by column. A rounding error is even over a step, so that its square is a twelfth of the step's.
    """
    found, energy = 0.0, float(((largest.astype(np.float64) / CREST) ** 2).sum())
    for weight in weights:
        square = float((weight.astype(np.float64) ** 2).sum())
        columns = float(((np.abs(weight).max(axis=0).astype(np.float64) / 127) ** 2).sum())
        found += ((threshold / 127.5) ** 2 * square + columns * energy) / 12
    return found


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


def _weights(bundle: Bundle) -> dict[str, dict[str, np.ndarray]]:
    """By activation, and by product that reads it: its weight, (k, n)."""
    onnx = require("onnx", "export", "rescaling")
    model, found = read_step(bundle)
    activations = {product.node: product.activation for product in found}
    split_gemms(model.graph, activations)  # of which some hold their weights transposed
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    weights: dict[str, dict[str, np.ndarray]] = {}
    for node in model.graph.node:
        if node.name in activations:
            value = onnx.numpy_helper.to_array(values[node.input[1]])
            weights.setdefault(activations[node.name], {})[node.name] = value
    return weights
