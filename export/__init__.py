"""Export: a segment step becomes one ONNX graph, and a bundle that is proved against its PyTorch recurrence."""

from rmt_trt.export.bundle import ExportOptions, export_model, export_step_bundle
from rmt_trt.export.engine_graphs import EngineGraphs, EngineOptions, add_engine_graphs
from rmt_trt.export.recover import model_from_bundle
from rmt_trt.export.step_to_onnx import export_step
from rmt_trt.export.verify import TOLERANCES, Report, verify

__all__ = [
    "TOLERANCES",
    "EngineGraphs",
    "EngineOptions",
    "ExportOptions",
    "Report",
    "add_engine_graphs",
    "export_model",
    "export_step",
    "export_step_bundle",
    "model_from_bundle",
    "verify",
]
