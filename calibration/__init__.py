"""Calibration: what a step is fed along a recurrence, the ranges of its tensors there, and quantized graphs."""

from rmt_trt.calibration.add import STATIC, WITHOUT_DATA, add_static, add_without_data
from rmt_trt.calibration.collect import CollectOptions, collect
from rmt_trt.calibration.documents import Source
from rmt_trt.calibration.feeds import Feed, recurrent_feeds
from rmt_trt.calibration.ranges import Ranges, TensorRange, compare, load_ranges
from rmt_trt.calibration.static import FP8, INT8, UINT8_INT8, Kind, static_graph

__all__ = [
    "FP8", "INT8", "STATIC", "UINT8_INT8", "WITHOUT_DATA", "CollectOptions", "Feed", "Kind", "Ranges", "Source", "TensorRange",
    "add_static", "add_without_data", "collect", "compare", "load_ranges", "recurrent_feeds", "static_graph",
]  # fmt: skip
