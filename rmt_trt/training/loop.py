"""The training loop: the step unrolled over segments, a curriculum, and states to resume from exactly.

Backpropagation goes through time, all segments or the last few (arXiv 2304.11062, section 3): the loss is the
cross-entropy of the last segment's logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from rmt_trt.errors import EngineError
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.step import RMTModel, build_model
from rmt_trt.training.options import Curriculum, TrainOptions
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.synthetic_batches import make_batch
from rmt_trt.training.tasks.task import Batch
from rmt_trt.training.tasks.words import CLS_ID, PAD_ID, PLACES, SEP_ID, VOCAB_SIZE

# Batches are told apart by (seed, use, number); evaluation documents are never trained on.
TRAINING, EVALUATION, LENGTHS = 0, 1, 2


@dataclass
class Run:
    """A training run between two steps: everything that the next step depends on, but for torch's own RNGs."""

    options: TrainOptions
    model: RMTModel
    optimizer: torch.optim.AdamW
    curriculum: Curriculum = field(default_factory=Curriculum)
    step: int = 0


@dataclass(frozen=True)
class Report:
    """An evaluation: mean loss since the last one, share of right answers at `segments` segments, seconds of this call."""

    step: int
    stage: int
    segments: int
    loss: float
    accuracy: float
    learning_rate: float
    seconds: float


def model_config(options: TrainOptions) -> ModelConfig:
    """Form E over a fresh BERT for the synthetic tasks: [CLS] memory [SEP] text [SEP], six classes."""
    config = ModelConfig(
        form="encoder",
        backbone={},
        num_memory=options.num_memory,
        segment_length=options.segment_length,
        vocab_size=VOCAB_SIZE,
        width=options.width,
        num_logits=len(PLACES),
        alignment="right",
        prefix_ids=(CLS_ID,),
        middle_ids=(SEP_ID,),
        suffix_ids=(SEP_ID,),
        pad_id=PAD_ID,
        dropped_ids=(PAD_ID, CLS_ID, SEP_ID),
        id2label=PLACES,
        max_segments=options.stages[0],
    )
    backbone = {
        "model_type": "bert",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": 4 * options.width,
        "max_position_embeddings": config.positions,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # BERT's 0.02 belongs to a width of 768; at 128 attention starts so flat that learning takes several times longer.
        "initializer_range": round(0.7 / math.sqrt(options.width), 4),
        "pad_token_id": PAD_ID,
        "num_labels": len(PLACES),
    }
    return replace(config, backbone=backbone)


def start(options: TrainOptions, device: torch.device) -> Run:
    """A run at step 0, its weights drawn from the seed."""
    torch.manual_seed(options.seed)
    model = build_model(model_config(options)).to(device)
    return Run(options, model, make_optimizer(model, options))


def make_optimizer(model: RMTModel, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW; vectors (biases, norms) are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate)


def unroll(model: RMTModel, segments: torch.Tensor, bptt: int = 0, memory_noise: float = 0.0) -> torch.Tensor:
    """Logits (b, c) of the last segment; segments (n, b, s) int64, -1 where one is short.

    Gradients flow through the last `bptt` segments, through all if it is 0.
    """
    memory = model.memory[None].expand(segments.shape[1], -1, -1)
    free = max(0, len(segments) - bptt) if bptt else 0
    logits = memory
    for index, segment in enumerate(segments):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= free):
            if memory_noise and index:
                scale = memory_noise * memory.detach().square().mean().sqrt()
                memory = memory + scale * torch.randn_like(memory)
            memory, logits = model(memory, segment)
    return logits


def train(run: Run) -> Iterator[Report | None]:
    """Trains to the run's last step. Yields after each step: None, or a Report where an evaluation was due.

    The run may be saved whenever a Report was yielded. Errors: EngineError, when the loss is no longer finite.
    """
    options, began = run.options, time.perf_counter()
    device = run.model.memory.device
    total, since = torch.zeros((), device=device), 0
    while run.step < options.steps:
        total += train_step(run)
        since += 1
        if run.step % options.eval_every and run.step < options.steps:
            yield None
            continue
        loss = float(total) / since
        if not loss < float("inf"):
            raise EngineError(
                f"training diverged: the loss is {loss} at step {run.step}. Lower --learning-rate "
                f"({options.learning_rate:g}) or --clip ({options.clip:g})"
            )
        total, since = torch.zeros((), device=device), 0
        segments, stage = run.curriculum.segments(options), run.curriculum.stage
        accuracy = evaluate(run.model, options, segments)
        run.curriculum = run.curriculum.after(accuracy, options)
        run.model.config = replace(run.model.config, max_segments=segments)
        rate = options.learning_rate_at(run.step - 1)
        yield Report(run.step, stage, segments, loss, accuracy, rate, time.perf_counter() - began)


def train_step(run: Run) -> torch.Tensor:
    """One optimizer step; returns its loss, still on the device."""
    options, most = run.options, run.curriculum.segments(run.options)
    draws = Draws(options.seed, LENGTHS, run.step)
    # Lengths are mixed: every other batch has the stage's own number of segments, the rest any up to it.
    whole, any_number = (int(n) for n in draws.below(np.array([2, most]), 2))
    segments = most if whole else 1 + any_number
    batch = make_batch(options.batch, segments, options.segment_length, options.seed, TRAINING, run.step)
    inputs, answers = to_device(batch, run.model.memory.device)
    run.model.train()
    logits = unroll(run.model, inputs, options.bptt, options.memory_noise)
    loss = nn.functional.cross_entropy(logits, answers)
    run.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(run.model.parameters(), options.clip)
    for group in run.optimizer.param_groups:
        group["lr"] = options.learning_rate_at(run.step)
    run.optimizer.step()
    run.step += 1
    return loss.detach()


@torch.no_grad()
def evaluate(model: RMTModel, options: TrainOptions, segments: int) -> float:
    """Share of right answers over documents of so many segments that no batch of the training holds."""
    model.eval()
    right = 0
    for start_row in range(0, options.eval_rows, options.batch):
        rows = min(options.batch, options.eval_rows - start_row)
        batch = make_batch(rows, segments, options.segment_length, options.seed, EVALUATION, segments, start_row)
        inputs, answers = to_device(batch, model.memory.device)
        right += int((unroll(model, inputs).argmax(dim=1) == answers).sum())
    return right / options.eval_rows


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's segments (n, b, s) and answers (b,), int64, on the device."""
    return torch.tensor(batch.segments, device=device), torch.tensor(batch.answers, device=device)
