"""The plain PyTorch recurrence: the living definition that every graph, engine and dtype is compared with.

One document, one segment at a time, no padding, no batch, the backbone with its own eager attention, masks and
positions, laid out as the published code does. Slow and obvious on purpose; nothing of the exported step's layout
tricks is used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from rmt_trt.model.backbone import published_attention
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.step import RMTModel


def split(tokens: Sequence[int], config: ModelConfig, alignment: str | None = None) -> list[list[int]]:
    """Drops the special ids, then cuts a document into segments as the published trainers do."""
    alignment = alignment or config.alignment
    kept = [int(token) for token in tokens if int(token) not in config.dropped_ids]
    size = config.segment_length
    if alignment == "right":
        ends = list(range(len(kept), 0, -size))[::-1]
        starts = [0, *ends[:-1]]
        return [kept[a:b] for a, b in zip(starts, ends, strict=True)]
    if alignment == "center":
        size = math.ceil(len(kept) / math.ceil(len(kept) / size))
    return [kept[start : start + size] for start in range(0, len(kept), size)]


@torch.no_grad()
def recurrence(
    model: RMTModel, tokens: Sequence[int], alignment: str | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields, after every segment, memory (M, d) and logits: (c) of a classifier, (n, v) of a language model."""
    segment_forward = _encoder_segment if model.config.form == "encoder" else _decoder_segment
    memory = model.memory.detach()
    for text in split(tokens, model.config, alignment):
        with published_attention(model.backbone):
            memory, logits = segment_forward(model, memory, torch.tensor(text, device=memory.device))
        yield memory, logits


def _encoder_segment(model: RMTModel, memory: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config, embed = model.config, model.backbone.get_input_embeddings()  # type: ignore[operator]
    before = text.new_tensor(config.prefix_ids)
    after = torch.cat([text.new_tensor(config.middle_ids), text, text.new_tensor(config.suffix_ids)])
    embeddings = torch.cat([embed(before), memory.to(embed.weight.dtype), embed(after)])
    out = model.backbone(
        inputs_embeds=embeddings[None],
        attention_mask=torch.ones(1, len(embeddings), dtype=torch.int64, device=text.device),
        output_hidden_states=True,
    )
    first = len(before)
    return out.hidden_states[-1][0, first : first + config.num_memory].to(memory.dtype), out.logits[0].float()


def _decoder_segment(model: RMTModel, memory: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    embed, m = model.backbone.get_input_embeddings(), model.config.num_memory  # type: ignore[operator]
    carried = memory.to(embed.weight.dtype)
    out = model.backbone(
        inputs_embeds=torch.cat([carried, embed(text), carried])[None], output_hidden_states=True, use_cache=False
    )
    return out.hidden_states[-1][0, -m:].to(memory.dtype), out.logits[0, m:-m].float()
