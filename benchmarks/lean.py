"""The lean step of the PyTorch peers: a full segment and nothing else, laid out as `rmt_trt.model.step` does.

No mask, no padding, no head, no pooler, special tokens embedded beforehand, weights and memory in one dtype: what a
careful user would write by hand for full segments. Its memory is compared with the fp32 step's before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from rmt_trt.model.step import RMTModel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _attention(causal: bool) -> Callable[..., tuple[torch.Tensor, None]]:
    """Hugging Face's own "sdpa", without the masks that it would build: (b, h, n, d) -> (b, n, h, d)."""

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        scaling: float | None = None, dropout: float = 0.0, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        grouped = key.shape[1] != query.shape[1]
        if grouped and torch.compiler.is_exporting():  # the exporter knows no grouped attention
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            grouped = False
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous(), None

    return attend


ATTENTION = {"encoder": "rmt_bench_both_ways", "decoder": "rmt_bench_causal"}
AttentionInterface.register(ATTENTION["encoder"], _attention(causal=False))
AttentionInterface.register(ATTENTION["decoder"], _attention(causal=True))


def backbone_in(model: RMTModel, dtype: str, device: torch.device | str, attention: str) -> Any:
    """A copy of the backbone with its head: parameters in `dtype`, tables of rotary positions as they are."""
    backbone: Any = copy.deepcopy(model.backbone).eval()
    backbone.set_attn_implementation(attention)
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
        parameter.requires_grad_(False)
    return backbone.to(device)


def lean_backbone(model: RMTModel, dtype: str, device: torch.device | str) -> Any:
    """The same without masks and pooler."""
    backbone = backbone_in(model, dtype, device, ATTENTION[model.config.form])
    if getattr(backbone.base_model, "pooler", None) is not None:
        backbone.base_model.pooler = None
    return backbone


class LeanStep(nn.Module):
    """forward(memory (b, M, d), segment (b, S) int64, full) -> new memory (b, M, d), in the weights' dtype."""

    prefix: torch.Tensor
    middle: torch.Tensor
    suffix: torch.Tensor

    def __init__(self, model: RMTModel, dtype: str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        config = model.config
        self.encoder, self.num_memory, self.first = config.form == "encoder", config.num_memory, len(config.prefix_ids)
        self.base = lean_backbone(model, dtype, device).base_model
        self.embed: Any = self.base.get_input_embeddings()
        for name in ("prefix", "middle", "suffix"):
            ids = torch.tensor(getattr(config, f"{name}_ids"), dtype=torch.int64, device=device)
            self.register_buffer(name, self.embed(ids)[None].detach(), persistent=False)

    def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        text, m = self.embed(segment), self.num_memory
        if not self.encoder:
            hidden = self.base(inputs_embeds=torch.cat([memory, text, memory], dim=1)).last_hidden_state
            return hidden[:, -m:]  # type: ignore[no-any-return]
        prefix, middle, suffix = (
            part.expand(segment.shape[0], -1, -1) for part in (self.prefix, self.middle, self.suffix)
        )
        row = torch.cat([prefix, memory, middle, text, suffix], dim=1)
        hidden = self.base(inputs_embeds=row).last_hidden_state
        return hidden[:, self.first : self.first + m]  # type: ignore[no-any-return]


@torch.inference_mode()
def exact_memory(model: RMTModel, segments: np.ndarray, device: str) -> np.ndarray:
    """Memory (b, M, d) float32 after the segments (n, b, S), by the model's own step in fp32."""
    step = copy.deepcopy(model).to(device)
    step.requires_grad_(False)
    memory = step.memory.detach()[None].expand(segments.shape[1], -1, -1).contiguous()
    for segment in segments:
        memory, _ = step(memory, torch.from_numpy(segment).to(device))
    return memory.cpu().numpy()
