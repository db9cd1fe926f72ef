"""A dynamic INT8 graph of a step: activations are quantized by what each step finds in them, so that no data is needed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rmt_trt.bundle import Bundle, GraphEntry
from rmt_trt.calibration.step_graph import ready_step, write_step
from rmt_trt.calibration.tables import quantize_tables
from rmt_trt.errors import require

DTYPE = "int8-dynamic"


def dynamic_graph(bundle: Bundle | Path | str, path: Path, keep: Collection[str] = frozenset()) -> GraphEntry:
    """Writes the step with integer products for the CPU to `path`, its weights in `path`.data where one file cannot hold
    them, by onnxruntime.quantization.

    Weights are int8, symmetric, with a scale for each output channel; activations uint8, with scale and zero point of the
    whole tensor in each step. The products are those of a static graph, and embedding tables and tied heads are as there.

    keep: nodes (`Product.node`), tables or their tied heads that stay float32, by name. Returns its entry; names are
    those of the files. Errors: FormatError, when nothing can be quantized; ContractError for names that the step lacks.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    quantization = require("onnxruntime.quantization", "export", "a quantized graph")
    onnx_quantizer = require("onnxruntime.quantization.onnx_quantizer", "export", "a quantized graph")
    model, chosen, lookups = ready_step(bundle, keep)
    quantizer = onnx_quantizer.ONNXQuantizer(
        model, per_channel=True, reduce_range=False, mode=quantization.quant_utils.QuantizationMode.IntegerOps,
        static=False, weight_qType=quantization.QuantType.QInt8, activation_qType=quantization.QuantType.QUInt8,
        tensors_range=None, nodes_to_quantize=[product.node for product in chosen], nodes_to_exclude=[],
        op_types_to_quantize=["MatMul"], extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
    )  # fmt: skip
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized = quantizer.model.model
    quantize_tables(quantized, lookups)
    return write_step(quantized, model, path, DTYPE)
