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
    backbone, positions, d = config.backbone, config.positions, config.width
    layers = _first(backbone, ("num_hidden_layers", "n_layer", "n_layers"), 12)
    heads = _first(backbone, ("num_attention_heads", "n_head", "n_heads"), 12)
    inner = _first(backbone, ("intermediate_size", "n_inner", "hidden_dim"), 4 * d)
    key_value = d * _first(backbone, ("num_key_value_heads",), heads) // heads
    gated = backbone["model_type"] in ("llama", "mistral", "qwen2", "qwen3")
    products = 2 * positions * d * (2 * d + 2 * key_value) + 2 * positions * d * inner * (3 if gated else 2)
    pairs = positions * positions if config.form == "encoder" else positions * (positions + 1) // 2
    return layers * (products + 4 * pairs * d)


def _first(config: dict[str, Any], names: tuple[str, ...], default: int) -> int:
    return next((int(config[name]) for name in names if config.get(name)), default)
