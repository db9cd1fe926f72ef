"""The runtime: drives a segment step over documents of any length."""

from rmt_trt.runtime.many import Many
from rmt_trt.runtime.results import BatchResult, Piece, RunResult
from rmt_trt.runtime.runtime import RMTRuntime
from rmt_trt.runtime.state import State
from rmt_trt.runtime.stream import Stream

__all__ = ["BatchResult", "Many", "Piece", "RMTRuntime", "RunResult", "State", "Stream"]
