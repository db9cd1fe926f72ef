"""Segment steps of a user's own, for the tests of export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmt_trt import StateSpec, StepSpec

VOCAB, LENGTH = 50, 12
TWO_STATES = StepSpec(
    "custom",
    (
        StateSpec("hidden", "new_hidden", (16,), "float32", "hidden0"),
        StateSpec("table", "new_table", (3, 16), "float32", "table0"),
    ),
    LENGTH,
    VOCAB,
    "lm",
    VOCAB,
)
ONE_STATE = StepSpec("custom", (StateSpec(shape=(1, 8)),), LENGTH, VOCAB, "classifier", 3)


class GatedStep(nn.Module):
    """A user's own step: gates as in a GRU over the mean of the text, and a table written by attention to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, 16)
        self.gate, self.candidate, self.head = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(16, VOCAB)
        self.hidden0 = nn.Parameter(torch.randn(16))
        self.table0 = nn.Parameter(torch.randn(3, 16))

    def forward(
        self, hidden: torch.Tensor, table: torch.Tensor, segment: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        valid = (segment >= 0)[:, :, None]
        text = self.embed(segment.clamp(min=0)) * valid
        both = torch.cat([text.sum(1) / valid.sum(1).clamp(min=1), hidden], dim=1)
        gate = torch.sigmoid(self.gate(both))
        new = gate * hidden + (1 - gate) * torch.tanh(self.candidate(both))
        scores = (table @ text.transpose(1, 2)).masked_fill(~valid.transpose(1, 2), -1e9)
        written = 0.9 * table + torch.softmax(scores, dim=2) @ text
        alive = valid[:, :1]
        logits = self.head(text + hidden[:, None] + table.mean(1, keepdim=True))
        return torch.where(alive[:, 0], new, hidden), torch.where(alive, written, table), logits


class Plain(nn.Module):
    """The least step that keeps the contract; tests break it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed, self.head, self.memory = nn.Embedding(VOCAB, 8), nn.Linear(8, 3), nn.Parameter(torch.zeros(1, 8))

    def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> Any:
        valid = (segment >= 0)[:, :, None]
        new = torch.where(valid[:, :1], memory * 0.5 + (self.embed(segment.clamp(min=0)) * valid).sum(1, True), memory)
        return self.answer(new, self.head(new[:, 0]), segment)

    def answer(self, new: torch.Tensor, logits: torch.Tensor, segment: torch.Tensor) -> Any:
        return new, logits


def broken(answer: Callable[..., Any]) -> Plain:
    """A `Plain` whose outputs are changed by `answer(new, logits, segment)`."""
    step = Plain()
    step.answer = answer  # type: ignore[method-assign]
    return step


def left_in(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())
