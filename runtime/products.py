"""Which GPUs multiply in 8 bits, and which engine does not."""

from __future__ import annotations

# By compute capability. From "Hardware and Precision" in the support matrices of TensorRT 8.5 and 10.1, and of TensorRT-RTX
# 1.7; for 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1 also by building a small BERT, GPT-2 and Llama step in both dtypes with
# TensorRT-RTX 1.7.1. What is not listed is left to the library that multiplies.
PRODUCTS: dict[int, tuple[str, ...]] = {
    60: (), 61: ("int8",), 70: ("int8",), 72: ("int8",), 75: ("int8",),
    80: ("int8",), 86: ("int8",), 87: ("int8",), 89: ("int8", "fp8"),
    90: ("int8", "fp8"), 100: ("int8", "fp8"), 101: ("int8", "fp8"), 103: ("int8", "fp8"),
    120: ("int8", "fp8"), 121: ("int8", "fp8"),
}  # fmt: skip


# Tried with version 1.31.1: some of a Q/DQ graph's INT8 nodes stay on the CPU provider, and a session of the GPU alone
# refuses that.
NO_INT8_ON_CUDA = (
    "ONNX Runtime's CUDA provider has no INT8 products of Q/DQ graphs. What multiplies in 8 bits there is fp8; int8 is for "
    "engines tensorrt, tensorrt-rtx and cpu"
)


def products_refusal(dtype: str | None, capability: int) -> str | None:
    """Why a GPU of this compute capability (89 is 8.9) runs no products of a quantized dtype, or None."""
    known = PRODUCTS.get(capability)
    if known is None or dtype in known or not any(dtype in listed for listed in PRODUCTS.values()):
        return None
    least = min(value for value, listed in PRODUCTS.items() if dtype in listed)
    return (
        f"{dtype} products take compute capability {least / 10:.1f} or higher, and this GPU has {capability / 10:.1f}. "
        f"Take --dtype {' or '.join([*known, 'fp16'])}"
    )
