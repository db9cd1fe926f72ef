"""Calibration: what a step is fed along a recurrence, for tools that measure ranges or compare graphs."""

from rmt_trt.calibration.feeds import Feed, recurrent_feeds

__all__ = ["Feed", "recurrent_feeds"]
