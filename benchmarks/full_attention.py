"""Full attention: the same backbone over the whole text in one pass, FlashAttention through PyTorch, half precision.

No backbone here was trained for such lengths: its table of positions is tiled to the length, which changes nothing in
what a pass costs. A language model's head is computed for the last token alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rmt_trt.benchmarks.fits import fit
from rmt_trt.benchmarks.lean import lean_backbone
from rmt_trt.benchmarks.machine import Meters
from rmt_trt.benchmarks.peers import wait
from rmt_trt.benchmarks.plan import Plan, documents
from rmt_trt.benchmarks.presets import Prepared
from rmt_trt.benchmarks.rows import Results, Row
from rmt_trt.benchmarks.timing import Effort, measure
from rmt_trt.contract import StepSpec

FULL = "full attention"
FIRST_LENGTH = 4096
LAST_LENGTH = 1 << 23
WARM_LENGTH = 1 << 16  # a pass over more takes long enough to be warm by itself
TABLES = ("position_embeddings", "wpe")  # modules that hold a row per position
SPARE_POSITIONS = 8
BUFFERS = ("position_ids", "token_type_ids")  # (1, positions), where a backbone keeps them


class FullAttention:
    """One pass over tokens (1, n) int64 on the device; gives the last token's hidden state or logits."""

    def __init__(self, prepared: Prepared, dtype: str, device: str) -> None:
        self.backbone = lean_backbone(prepared.model, dtype, device)
        self.encoder = prepared.model.config.form == "encoder"
        self._tables = {
            name: module.weight.data
            for name, module in self.backbone.named_modules()
            if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in TABLES
        }

    def lengthen(self, length: int) -> None:
        """Makes room for `length` positions, and the few that RoBERTa leaves out at the start."""
        rows = length + SPARE_POSITIONS
        for name, table in self._tables.items():
            self.backbone.get_submodule(name).weight.data = table.repeat(-(-rows // len(table)), 1)
        for module in self.backbone.modules():
            for name in BUFFERS:
                held = getattr(module, name, None)
                if isinstance(held, torch.Tensor):
                    row = torch.arange(rows) if name == "position_ids" else torch.zeros(rows, dtype=torch.int64)
                    setattr(module, name, row[None].to(held.device))

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone.base_model(input_ids=tokens).last_hidden_state
        last = hidden[:, :1] if self.encoder else self.backbone.get_output_embeddings()(hidden[:, -1:])
        wait(last)
        return last  # type: ignore[no-any-return]


def full_attention(
    prepared: Prepared, spec: StepSpec, plan: Plan, meters: Meters, results: Results, say: Callable[[str], None]
) -> None:
    """Passes over 4,096, 8,192, ... tokens, until memory ends or the next would take longer than the plan allows."""
    dtype = "fp16" if plan.dtype == "fp32" else plan.dtype  # FlashAttention has no fp32
    with results.attempt("full", FULL), _flash():
        model = FullAttention(prepared, dtype, plan.place)
        seconds: dict[int, float] = {}
        length = FIRST_LENGTH
        while length <= LAST_LENGTH and _expected(seconds, length) <= plan.full_seconds:
            say(f"{FULL}, {length:,} tokens")
            try:
                row = _pass(model, spec, length, meters)
            except torch.cuda.OutOfMemoryError:
                results.add(Row("full", FULL, 1, length, failed="out of device memory"))
                break
            results.add(row)
            seconds[length] = row.timing.median if row.timing else float("inf")
            length *= 2
            meters.release()
    meters.release()


def _pass(model: FullAttention, spec: StepSpec, length: int, meters: Meters) -> Row:
    model.lengthen(length)
    tokens = torch.from_numpy(documents(spec, 1, length)).to(next(model.backbone.parameters()).device)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    timing = measure(lambda: model(tokens), Effort(5, 1.0, at_least=1), warm=lambda: model(tokens[:, :WARM_LENGTH]))
    values = {"device_bytes": torch.cuda.max_memory_allocated(), "weights_and_tokens_bytes": held}
    return Row("full", FULL, 1, length, 0, timing, values)


def _expected(seconds: dict[int, float], length: int) -> float:
    """Seconds that the next pass will take, judged by those before it."""
    if not seconds:
        return 0.0
    curve = fit(list(seconds), list(seconds.values()))
    return curve(length) if curve is not None else 4 * max(seconds.values())


def _flash() -> Any:
    """FlashAttention alone, with no fall-back: where it cannot run, the measurement fails and says so."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if torch.cuda.is_available() else contextlib.nullcontext()
