"""What the tests of rmt-bench share: timings by hand, and models as it measures them."""

from __future__ import annotations

from pathlib import Path

from models import made, make_model
from shared import once

from rmt_trt.benchmarks import ort_peer
from rmt_trt.benchmarks.presets import Prepared
from rmt_trt.benchmarks.timing import Timing


def took(seconds: float) -> Timing:
    return Timing.of([seconds])


def prepared(name: str) -> Prepared:
    return Prepared(name, made(name).bundle, made(name).model, "random")


def lean_graph(name: str) -> Path:
    """The lean step of a model of the catalogue in opset 20, as rmt-bench exports it and reuses it."""
    return once(
        f"{name}-lean-fp32-20.onnx",
        lambda path: ort_peer.export_lean(make_model(name), "fp32", 20, path.parent, name),
    )
