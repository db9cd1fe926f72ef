"""PyTorch's exporter, made quicker for a session that exports a hundred models; what it exports stays the same."""

from __future__ import annotations

import copy
import functools


def keep_operator_table() -> None:
    """The exporter's table of operators, which it reads anew for every export, is read once per process."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read = functools.cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):
        return  # another version of PyTorch has it elsewhere: an export takes longer and gives the same

    def from_torchlib(*opset: int, **options: int) -> ONNXRegistry:
        table = copy.copy(read(*opset, **options))
        table.functions = {name: list(known) for name, known in table.functions.items()}  # an export may add its own
        return table

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
