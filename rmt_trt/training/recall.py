"""Recall in PyTorch: how many questions a model answers at each length, many documents at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rmt_trt.contract import PAD
from rmt_trt.model.step import RMTModel
from rmt_trt.training.questions import Question
from rmt_trt.training.tasks.words import PLACES

CHUNK = 64  # segments handed to the device at a time: 64 KB a document


@dataclass(frozen=True)
class Recall:
    """How many of `questions` questions, all of `segments` segments, were answered right."""

    segments: int
    questions: int
    right: int


def recall(model: RMTModel, questions: Sequence[Question]) -> Iterator[Recall]:
    """Answers questions about documents of any length, shortest first, all of a length in one batch.

    The short segment comes first, as in training. Memory does not grow with the length.
    """
    size = model.config.segment_length
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(math.ceil(question.length / size), []).append(question)
    for segments in sorted(groups):
        group = groups[segments]
        answers = np.array([PLACES.index(question.answer) for question in group])
        right = int((answer(model, group).argmax(axis=1) == answers).sum())
        yield Recall(segments, len(group), right)


@torch.no_grad()
def answer(model: RMTModel, questions: Sequence[Question]) -> np.ndarray:
    """The last segments' logits (b, c) float32; the documents have equally many segments."""
    device, size = model.memory.device, model.config.segment_length
    memory = model.memory[None].expand(len(questions), -1, -1)
    logits = memory
    model.eval()
    for block in _blocks(questions, size):
        for segment in torch.split(torch.from_numpy(block).to(device), size, dim=1):
            memory, logits = model(memory, segment)
    return logits.cpu().numpy()


def _blocks(questions: Sequence[Question], size: int) -> Iterator[np.ndarray]:
    """Pieces (b, k * size) int64 of all documents side by side; the first has one segment, filled up with -1."""
    readers = [q.document.pieces(CHUNK * size, first=(q.length - 1) % size + 1) for q in questions]
    first = np.full((len(questions), size), PAD, dtype=np.int64)
    for row, reader in zip(first, readers, strict=True):
        piece = next(reader)
        row[: len(piece)] = piece
    yield first
    for pieces in zip(*readers, strict=True):
        yield np.stack(pieces)
