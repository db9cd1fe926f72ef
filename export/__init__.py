"""Export: a segment step becomes one ONNX graph, and a bundle that is proved against its PyTorch recurrence."""

from rmt_trt.export.bundle import ExportOptions, export_model, export_step_bundle
from rmt_trt.export.step_to_onnx import export_step
from rmt_trt.export.verify import TOLERANCES, Report, verify

__all__ = ["TOLERANCES", "ExportOptions", "Report", "export_model", "export_step", "export_step_bundle", "verify"]
