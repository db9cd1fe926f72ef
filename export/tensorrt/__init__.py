"""TensorRT builds: the step of a bundle becomes engines for some GPUs, added to the bundle as one change."""

from rmt_trt.engine_record import EngineRecord
from rmt_trt.export.tensorrt.engines import BuiltEngine, add_engines, check_build
from rmt_trt.export.tensorrt.options import BuildOptions

__all__ = ["BuildOptions", "BuiltEngine", "EngineRecord", "add_engines", "check_build"]
