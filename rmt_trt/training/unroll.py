"""The step unrolled over the segments of a document, as one module: what is trained, on one GPU or several."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rmt_trt.model.step import DecoderStep, RMTModel


class Unrolled(nn.Module):
    """forward(segments (n, b, s) int64, -1 where one is short) -> logits of the answer, (b, classes) or (b, vocabulary).

    One call is one forward pass for those who wrap it, such as DistributedDataParallel.

    model          the segment step
    bptt           segments at the end that gradients flow through, all if it is 0 (arXiv 2304.11062, section 3)
    memory_noise   random noise on the memory between segments, as a share of its root mean square; in training only
    recompute      computes each segment again for its gradient: memory for one segment instead of all
    """

    def __init__(self, model: RMTModel, bptt: int = 0, memory_noise: float = 0.0, recompute: bool = False) -> None:
        super().__init__()
        self.model = model
        self.bptt, self.memory_noise, self.recompute = bptt, memory_noise, recompute

    def forward(self, segments: torch.Tensor) -> torch.Tensor:
        memory = self.model.memory[None].expand(segments.shape[1], -1, -1)
        free = max(0, len(segments) - self.bptt) if self.bptt else 0
        logits = memory
        for index, segment in enumerate(segments):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= free):
                if self.training and self.memory_noise and index:
                    scale = self.memory_noise * memory.detach().square().mean().sqrt()
                    memory = memory + scale * torch.randn_like(memory)
                if self.recompute and torch.is_grad_enabled():
                    memory, logits = checkpoint(self.model, memory, segment, use_reentrant=False)
                else:
                    memory, logits = self.model(memory, segment)
        if isinstance(self.model, DecoderStep):
            last = (segments[-1] >= 0).sum(dim=1) - 1
            return logits[torch.arange(len(last), device=last.device), last]
        return logits
