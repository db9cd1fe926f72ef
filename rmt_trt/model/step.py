"""The segment step of both published forms, as modules that train, run and export.

    forward(memory (b, M, d), segment (b, s) int64) -> (new_memory (b, M, d), logits)

Both derive what is valid from the ids alone: ids below 0 are padding at the end of a row, and a row that is
padding from its start keeps its memory. Layouts: arXiv 2304.11062 and its published code.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.model.backbone import build_backbone, position_capacity
from rmt_trt.model.config import ModelConfig


class EncoderStep(nn.Module):
    """Form E: `[prefix] memory [middle] text [suffix] padding`, memory read and written in the same place.

    logits (b, c): the classification head's answer after this segment.
    """

    def __init__(self, config: ModelConfig, backbone: nn.Module, memory: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.memory = nn.Parameter(memory)
        for name in ("prefix_ids", "middle_ids"):
            ids = torch.tensor(getattr(config, name), dtype=torch.int64)
            self.register_buffer(name, ids, persistent=False)

    def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, config = segment.shape[0], self.config
        embed = self.backbone.get_input_embeddings()  # type: ignore[operator]
        dtype = embed.weight.dtype
        count = (segment >= 0).sum(dim=1, keepdim=True)

        suffix = len(config.suffix_ids)
        room = segment.new_full((batch, suffix), config.pad_id)
        ids = torch.cat([segment, room], dim=1)
        position = torch.arange(ids.shape[1], device=ids.device)[None, :]
        ids = torch.where(position < count, ids, config.pad_id)
        for offset, token in enumerate(config.suffix_ids):  # right behind the row's own text
            ids = torch.where(position == count + offset, token, ids)

        first = len(config.prefix_ids)
        start = first + config.num_memory + len(config.middle_ids)
        parts = [
            embed(self.prefix_ids)[None].expand(batch, -1, -1),
            memory.to(dtype),
            embed(self.middle_ids)[None].expand(batch, -1, -1),
            embed(ids),
        ]
        # Added to the scores, and finite: a mask of truth values would be turned into this again in every layer, and
        # its rows checked for having no position left, which memory and special tokens rule out.
        hidden = torch.where(position < count + suffix, 0.0, torch.finfo(dtype).min).to(dtype)
        bias = torch.cat([hidden.new_zeros((batch, start)), hidden], dim=1)
        out = self.backbone(
            inputs_embeds=torch.cat(parts, dim=1), attention_mask=bias[:, None, None, :], output_hidden_states=True
        )
        written = out.hidden_states[-1][:, first : first + config.num_memory].to(memory.dtype)
        alive = (count > 0)[:, :, None]
        return torch.where(alive, written, memory), out.logits.float()


class DecoderStep(nn.Module):
    """Form D: `[memory | text | memory]`, causal; the second copy is where the new memory is read.

    A short row is laid out as `[memory | its n tokens | memory | padding]` by one gather: positions are then those
    of the short segment by itself, and causality hides what follows, so neither mask nor position ids are needed.
    logits (b, s, v): one row per text token; rows at padding mean nothing.
    """

    def __init__(self, config: ModelConfig, backbone: nn.Module, memory: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.memory = nn.Parameter(memory)

    def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length = segment.shape
        m = self.config.num_memory
        embed = self.backbone.get_input_embeddings()  # type: ignore[operator]
        count = (segment >= 0).sum(dim=1, keepdim=True)
        carried = memory.to(embed.weight.dtype)

        full = torch.cat([carried, embed(segment.clamp(min=0)), carried], dim=1)
        position = torch.arange(length + 2 * m, device=segment.device)[None, :].expand(batch, -1)
        end = count + m
        write = position - count + length  # where the second memory stands in `full`
        source = torch.where(position < end, position, torch.where(position < end + m, write, position - m))
        row = torch.arange(batch, device=segment.device)[:, None]

        # Positions go in expanded to the batch: the exporter's RotaryEmbedding takes no cache of batch 1.
        out = self.backbone(
            inputs_embeds=full[row, source],
            position_ids=position,
            output_hidden_states=True,
            logits_to_keep=torch.arange(m, m + length, device=segment.device),
        )
        slots = end + torch.arange(m, device=segment.device)[None, :]
        written = out.hidden_states[-1][row, slots].to(memory.dtype)
        alive = (count > 0)[:, :, None]
        return torch.where(alive, written, memory), out.logits.float()


RMTModel = EncoderStep | DecoderStep


def build_model(config: ModelConfig, weights: dict[str, torch.Tensor] | None = None) -> RMTModel:
    """A model in evaluation mode, from its weights (`memory`, `backbone.*`) or, without any, with fresh ones.

    Errors: ContractError when the segment does not fit the backbone's positions or memory does not fit the config,
    FormatError when weights are missing, unknown or of another shape.
    """
    config.spec()
    capacity = position_capacity(config.backbone)
    if capacity is not None and config.positions > capacity:
        raise ContractError(
            f"a segment of {config.segment_length} tokens takes {config.positions} positions with its memory and special "
            f"tokens; the backbone's table holds {capacity}. Use segments of at most "
            f"{capacity - config.positions + config.segment_length} tokens"
        )
    inner = None
    if weights is not None:
        inner = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    backbone = build_backbone(config.form, config.backbone, inner)
    shape = (config.num_memory, config.width)
    embed = backbone.get_input_embeddings().weight  # type: ignore[operator]
    memory = weights["memory"] if weights is not None else torch.randn(shape) * embed.detach().float().std()
    if tuple(memory.shape) != shape or embed.shape[1] != config.width or embed.shape[0] < config.vocab_size:
        raise ContractError(
            f"memory is {tuple(memory.shape)} and the embedding {tuple(embed.shape)}; the config says {config.num_memory} "
            f"memory vectors of width {config.width} and {config.vocab_size} tokens"
        )
    module = EncoderStep if config.form == "encoder" else DecoderStep
    return module(config, backbone, memory.detach().float().clone()).eval()


def fingerprint(module: nn.Module, initial: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a step's weights and its initial state, in sorted order."""
    digest = hashlib.sha256()
    tensors = {
        **{f"weight.{k}": v for k, v in module.state_dict().items()},
        **{f"state.{k}": v for k, v in initial.items()},
    }
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def model_spec(model: RMTModel) -> StepSpec:
    """The spec of a model with its weights' fingerprint in it."""
    return model.config.spec(fingerprint(model, {"memory": model.memory.detach()}))
