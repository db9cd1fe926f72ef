"""Which GPUs multiply in 8 bits: said before minutes are spent on a graph that none of the kernels fits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rmt_trt.bundle import Bundle
from rmt_trt.contract import QUANTIZED
from rmt_trt.engine_record import BUILT
from rmt_trt.errors import ContractError
from rmt_trt.runtime.engine_fit import dotted
from rmt_trt.runtime.products import PRODUCTS

# TensorRT-RTX has no float32 products for 7.5: "FP32 GEMM is not supported", its compiler says.
WITHOUT_FLOAT32 = {"tensorrt-rtx": (75,)}


def check_dtypes(dtypes: Sequence[str]) -> None:
    """Errors: ContractError, for what no engine is built in."""
    wrong = [dtype for dtype in dtypes if dtype not in BUILT]
    if wrong or not dtypes:
        raise ContractError(f"dtype is {', '.join(map(repr, wrong)) or 'missing'}; expected one of {', '.join(BUILT)}")


def check_products(engine: str, dtypes: Sequence[str], capabilities: Collection[int], bundle: Bundle | None) -> None:
    """Errors: ContractError, for a dtype that one of the GPUs does not multiply in, with what to take instead."""
    for dtype in dtypes:
        lacking = [value for value in capabilities if dtype in QUANTIZED and dtype not in PRODUCTS.get(value, (dtype,))]
        if lacking:
            have = [value for value, known in PRODUCTS.items() if dtype in known]
            instead = [name for name in BUILT if name in QUANTIZED and all(name in PRODUCTS[v] for v in lacking)]
            raise ContractError(
                f"compute capability {dotted(lacking)} has no {dtype} products; {dotted(have)} have. Build {dtype} for those, "
                f"or for {dotted(lacking)} with --dtype {' or '.join([*instead, 'fp16'])}"
            )
        without = [value for value in capabilities if value in WITHOUT_FLOAT32.get(engine, ())]
        if without and _has_float32(bundle, engine, dtype):
            raise ContractError(
                f"engine '{engine}' has no float32 products for compute capability {dotted(without)}, and the {dtype} graph of "
                f"{bundle.path if bundle else 'the bundle'} computes in float32 what is not in 8 bits. Make it anew with "
                f"rmt-calibrate, without --rest fp32, or take --dtype fp16"
            )


def _has_float32(bundle: Bundle | None, engine: str, dtype: str) -> bool:
    """Whether a quantized graph that the bundle lists is recorded as float32 where it is not quantized."""
    value: Any = None if bundle is None else bundle.manifest.verification
    for key in ("engines", engine, dtype, "quantization", "rest"):
        value = value.get(key) if isinstance(value, dict) else None
    return bool(value == "fp32")
