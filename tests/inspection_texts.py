"""What the tests of a look inside engines share: what inspector and profiler say, and what rmt-info shows."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from rmt_trt.commands import info

# As TensorRT documents it: up to 10, from 11 on, and of an engine that was built for names alone.
GEMM = "gemm_mma_fp16_128x64"


OLD: dict[str, Any] = {
    "Layers": [
        {
            "Name": "node_MatMul_1 + node_Add_2", "LayerType": "CaskGemmMatrixMultiply",
            "Inputs": [
                {"Name": "memory", "Dimensions": [8, 4, 32], "Format/Datatype": "Row major linear FP16 format"},
                {"Name": "mask", "Location": "Device", "Dimensions": [], "Format/Datatype": "N/A due to dynamic shapes"},
            ],
            "Outputs": [{"Name": "new_memory", "Dimensions": [8, 4, 32], "Format/Datatype": "Half"}],
            "ParameterType": "MatrixMultiply", "Bias": {"Type": "Half", "Count": 32}, "TacticName": GEMM,
            "TacticValue": "0x11bde0e1d9f2f35d", "StreamId": 0,
            "Metadata": "[ONNX Layer: node_MatMul_1]\x1f[ONNX Layer: node_Add_2 | model.layer.0]",
        },
        {
            "Name": "Reformatting CopyNode for Input Tensor 0", "LayerType": "Reformat", "Inputs": [], "Outputs": [],
            "TacticValue": "0x0000000000000000",
        },
    ],
    "Bindings": ["memory", "segment", "new_memory"],
}  # fmt: skip
NEW: dict[str, Any] = {
    "Layers": [
        {
            "Name": "__myl_MulSumTran_myl0_1", "LayerType": "kgen",
            "Inputs": [{"Name": "segment", "Dimensions": [8, 20], "Format": "Row major linear", "Datatype": "Int64"}],
            "Outputs": [{"Name": "__mye1", "Dimensions": [8, 20, 32], "DataType": "Half"}],
            "TacticName": "__myl_MulSumTran_0x3a", "StreamId": 0,
            "Metadata": "[ONNX Layer: node_Mul_7][ONNX Layer: node_Sum_8][ONNX Layer: node_Mul_7]",
        },
    ],
    "I/O Tensors": [{"Name": "segment", "IOMode": "Input", "DataType": "Int64", "Dimensions": [-1, -1]}],
    "Engine Metadata": {"Multi-Device": "Disabled"},
}  # fmt: skip
NAMES = {"Layers": ["node_MatMul_1 + node_Add_2", "{ForeignNode[a...b]}"], "Bindings": ["memory"]}
STEP = ("softmax", "gemm", "gemm")


def times(number: int) -> list[tuple[str, float]]:
    """Of warm-up 1000 ms a layer; then gemm takes twice 3, 1, 2, 5, 4 ms, and softmax 2."""
    first = 1000.0 if number <= 10 else (3.0, 1.0, 2.0, 5.0, 4.0)[(number - 11) % 5]
    return [(name, first if name == "gemm" else 2.0) for name in STEP]


def shown(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What rmt-info prints: of a failure its one line, without the command's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rmt-info", *map(str, arguments)])
        patch.setenv("COLUMNS", "240")
        with pytest.raises(SystemExit) as ended:
            info.main()
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    if code == 0:
        return printed.out
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("rmt-info: ")
