"""What the machine can do, measured in the same run, and how much arithmetic a step is."""

from __future__ import annotations

from typing import Any

from rmt_trt.benchmarks.plan import Plan
from rmt_trt.benchmarks.rows import Results, Row
from rmt_trt.benchmarks.timing import Effort, measure
from rmt_trt.model.config import ModelConfig

COPY = "device copy"
MATRIX = "matrix product"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def limits(plan: Plan, results: Results) -> None:
    """Bytes per second of a large copy (read and written), and FLOP/s of a large matrix product in each dtype."""
    import torch

    device = plan.place

    def wait() -> None:
        if plan.gpu:
            torch.cuda.synchronize()

    effort = Effort(10, 1.0)
    with results.attempt("limit", COPY):
        values = 1 << (29 if plan.gpu else 25)
        source = torch.ones(values, dtype=torch.float32, device=device)
        target = torch.empty_like(source)

        def copy() -> None:
            target.copy_(source)
            wait()

        timing = measure(copy, effort)
        results.add(Row("limit", COPY, timing=timing, values={"bytes_per_second": 8 * values / timing.median}))
    side, repeats = (8192, 10) if plan.gpu else (1024, 1)
    for name in ("fp16", "bf16") if plan.gpu else ("fp32",):
        with results.attempt("limit", f"{MATRIX} {name}"):
            left = torch.randn(side, side, device=device).to(getattr(torch, DTYPES[name]))
            right, out = torch.randn_like(left), torch.empty_like(left)

            def call(left: Any = left, right: Any = right, out: Any = out) -> None:
                for _ in range(repeats):
                    torch.mm(left, right, out=out)
                wait()

            timing = measure(call, effort)
            rate = repeats * 2 * side**3 / timing.median
            results.add(
                Row("limit", f"{MATRIX} {name}", timing=timing, values={"flops_per_second": rate, "side": side})
            )


def step_flops(config: ModelConfig) -> int:
    """Floating-point operations of a full segment's step at batch 1, without the head: a multiply-add counts two.

    For P positions, width d, a layer has the products 2 P d (2 d + 2 d_kv) of attention's four matrices, 2 P d f of each of
    two matrices of the feed-forward part (three, where it is gated), and 4 P^2 d of scores and their weighted sum, of
    which a causal layer needs (P + 1) / 2P (Kaplan et al. 2020, arXiv 2001.08361, table 1, with the attention's P^2 written out).
    Embeddings, norms and activations are left out.
    """
    return _layers(config) * _layer_flops(config, config.positions)


def needed_flops(config: ModelConfig) -> int:
    """Those of them that the new memory needs: of the last layer's P rows the keys and values, and all else for the M that
    memory is written in."""
    return (_layers(config) - 1) * _layer_flops(config, config.positions) + _layer_flops(config, config.num_memory)


def _layer_flops(config: ModelConfig, rows: int) -> int:
    """A layer's, of which so many rows are read, in a decoder its last."""
    backbone, positions, d = config.backbone, config.positions, config.width
    heads = _first(backbone, ("num_attention_heads", "n_head", "n_heads"), 12)
    inner = _first(backbone, ("intermediate_size", "n_inner", "hidden_dim"), 4 * d)
    key_value = d * _first(backbone, ("num_key_value_heads",), heads) // heads
    gated = backbone["model_type"] in ("llama", "mistral", "qwen2", "qwen3")
    products = 4 * positions * d * key_value + 4 * rows * d * d + 2 * rows * d * inner * (3 if gated else 2)
    hidden = 0 if config.form == "encoder" else rows * (rows - 1) // 2
    return products + 4 * (rows * positions - hidden) * d


def _layers(config: ModelConfig) -> int:
    return _first(config.backbone, ("num_hidden_layers", "n_layer", "n_layers"), 12)


def _first(config: dict[str, Any], names: tuple[str, ...], default: int) -> int:
    return next((int(config[name]) for name in names if config.get(name)), default)
