"""Calibration: what a step is fed along a recurrence, the ranges of its tensors there, and graphs quantized by them."""

from rmt_trt.calibration.collect import CollectOptions, collect
from rmt_trt.calibration.documents import Source
from rmt_trt.calibration.feeds import Feed, recurrent_feeds
from rmt_trt.calibration.int8 import add_int8, int8_graph
from rmt_trt.calibration.ranges import Ranges, TensorRange, compare, load_ranges

__all__ = [
    "CollectOptions", "Feed", "Ranges", "Source", "TensorRange",
    "add_int8", "collect", "compare", "int8_graph", "load_ranges", "recurrent_feeds",
]  # fmt: skip
