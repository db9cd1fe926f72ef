"""The training loop: the step unrolled over segments, a curriculum, and states to resume from exactly.

The loss is the cross-entropy of the answer that the last segment's logits give (arXiv 2304.11062, section 3). Hugging
Face Accelerate carries it to several GPUs and to bfloat16; `accelerate launch -m rmt_trt.commands.train ...` starts it there.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rmt_trt.errors import ContractError, EngineError, require
from rmt_trt.model.pretrained import Base
from rmt_trt.model.step import RMTModel
from rmt_trt.training.ahead import Ahead
from rmt_trt.training.options import Curriculum, TrainOptions
from rmt_trt.training.start import open_options, start_model
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.task import Batch, Task
from rmt_trt.training.unroll import Unrolled

# Streams of random numbers are told apart by (seed, use, number); evaluation documents are never trained on.
TRAINING, EVALUATION, LENGTHS, NOISE = 0, 1, 2, 3


@dataclass
class Run:
    """A training run between two steps: everything that the next step depends on.

    `unrolled` is the model as Accelerate prepared it; `model` is the same weights. `sources` says what task, tokenizer
    and pretrained weights really were, with their SHA-256.
    """

    options: TrainOptions
    task: Task
    model: RMTModel
    unrolled: nn.Module
    optimizer: torch.optim.AdamW
    accelerator: Any
    base: Base | None = None
    sources: dict[str, Any] = field(default_factory=dict)
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


def start(options: TrainOptions, device: torch.device) -> Run:
    """A run at step 0, its weights drawn from the seed. Errors: ContractError, FormatError, EngineError without accelerate,
    or where this process began to train with another dtype or device."""
    task, base = open_options(options)
    model = start_model(options, task, base)
    accelerator = _accelerator(options, device)
    parts = accelerator.num_processes * options.accumulate
    if options.batch % parts or options.eval_rows % accelerator.num_processes:
        raise ContractError(
            f"a batch of {options.batch} documents, and {options.eval_rows} for evaluation, cannot be shared by "
            f"{accelerator.num_processes} processes in {options.accumulate} parts each; choose multiples"
        )
    model = model.to(accelerator.device)
    optimizer = make_optimizer(model, options)
    tokenizer = hashlib.sha256(task.tokenizer.encode()).hexdigest()
    sources = {"task": task.describe(), "backbone": base.digest if base else "", "tokenizer": tokenizer}
    unrolled = Unrolled(model, options.bptt, options.memory_noise, options.checkpointing)
    return Run(options, task, model, accelerator.prepare(unrolled), optimizer, accelerator, base, sources)


def _accelerator(options: TrainOptions, device: torch.device) -> Any:
    accelerate = require("accelerate", "train", "training")
    # Where gradients end before a document's first segment, none reaches the first memory.
    ends = 0 < options.bptt < options.stages[-1]
    unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=ends)
    try:
        return accelerate.Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if options.dtype == "bf16" else "no",
            kwargs_handlers=[unused],
        )
    except ValueError as err:  # its state belongs to the process
        raise EngineError(f"Accelerate cannot train here with {options.dtype} on {device.type}: {err}") from err


def make_optimizer(model: RMTModel, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over what is trained; vectors (biases, norms) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate)


def train(run: Run) -> Iterator[Report | None]:
    """Trains to the run's last step. Yields after each step: None, or a Report where an evaluation was due.

    The run may be saved whenever a Report was yielded. Errors: EngineError, when the loss or a gradient is no longer
    finite; the run is then not fit to be saved.
    """
    options, began = run.options, time.perf_counter()
    total, since = torch.zeros((), device=run.accelerator.device), 0
    with Ahead(lambda step, most: _training_batch(run, step, most)) as batches:
        while run.step < options.steps:
            total += train_step(run, batches.get(run.step, run.curriculum.segments(options)))
            since += 1
            if run.step % options.eval_every and run.step < options.steps:
                yield None
                continue
            loss = float(run.accelerator.reduce(total, "mean")) / since
            if not abs(loss) < float("inf"):
                raise EngineError(
                    f"training diverged: the loss is {loss} in the steps up to {run.step}. Start a new run with a lower "
                    f"--learning-rate (it was {options.learning_rate:g}) or --clip ({options.clip:g})"
                )
            total, since = torch.zeros_like(total), 0
            segments, stage = run.curriculum.segments(options), run.curriculum.stage
            accuracy = evaluate(run, segments)
            run.curriculum = run.curriculum.after(accuracy, options)
            run.model.config = replace(run.model.config, max_segments=segments)
            rate = options.learning_rate_at(run.step - 1)
            yield Report(run.step, stage, segments, loss, accuracy, rate, time.perf_counter() - began)


def _training_batch(run: Run, step: int, most: int) -> Batch:
    """The documents of a step: of mixed lengths, every other batch has the stage's own, the rest any up to it."""
    options = run.options
    whole, any_number = (int(n) for n in Draws(options.seed, LENGTHS, step).below(np.array([2, most]), 2))
    segments = most if whole or not options.mixed else 1 + any_number
    length = run.model.config.segment_length
    return run.task.batch(options.batch, segments, length, options.seed, TRAINING, step, lean=options.lean_at(step))


def train_step(run: Run, batch: Batch) -> torch.Tensor:
    """One optimizer step over a batch; returns its loss, still on the device; not a number where a gradient is none."""
    options = run.options
    torch.manual_seed(int(Draws(options.seed, NOISE, run.step, run.accelerator.process_index).below(1 << 31, 1)[0]))
    run.unrolled.train()
    run.optimizer.zero_grad()
    inputs, answers = to_device(_share(run, batch), run.accelerator.device)
    parts = list(zip(inputs.chunk(options.accumulate, dim=1), answers.chunk(options.accumulate), strict=True))
    total = torch.zeros((), device=inputs.device)
    for number, (segments, wanted) in enumerate(parts, 1):
        # Processes add up their gradients once, with the last part.
        waits = number < len(parts)
        with run.accelerator.no_sync(run.unrolled) if waits else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(run.unrolled(segments), _targets(run, wanted)) / len(parts)
            run.accelerator.backward(loss)
        total += loss.detach()
    norm: torch.Tensor = run.accelerator.clip_grad_norm_(run.model.parameters(), options.clip)
    for group in run.optimizer.param_groups:
        group["lr"] = options.learning_rate_at(run.step)
    run.optimizer.step()
    run.step += 1
    return total + 0 * norm


@torch.no_grad()
def evaluate(run: Run, segments: int) -> float:
    """Share of right answers over documents of so many segments that no batch of the training holds."""
    options = run.options
    run.unrolled.eval()
    right = torch.zeros((), device=run.accelerator.device)
    for start_row in range(0, options.eval_rows, options.batch):
        rows = min(options.batch, options.eval_rows - start_row)
        length = run.model.config.segment_length
        seed = (options.seed, EVALUATION, segments, start_row)
        batch = run.task.batch(rows, segments, length, *seed, lean=options.lean_at(run.step))
        inputs, answers = to_device(_share(run, batch), run.accelerator.device)
        logits = run.unrolled(inputs)
        if run.options.form == "decoder":
            logits = logits[:, torch.tensor(run.task.answer_ids, device=logits.device)]
        right += (logits.argmax(dim=1) == answers).sum()
    return float(run.accelerator.reduce(right, "sum")) / options.eval_rows


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's segments (n, b, s) and answers (b,), int64, on the device."""
    return torch.tensor(batch.segments, device=device), torch.tensor(batch.answers, device=device)


def _targets(run: Run, answers: torch.Tensor) -> torch.Tensor:
    """What the logits are to say: the class, or the first token of the answer."""
    if run.options.form == "encoder":
        return answers
    return torch.tensor(run.task.answer_ids, device=answers.device)[answers]


def _share(run: Run, batch: Batch) -> Batch:
    """The rows of a batch that this process computes."""
    each = len(batch.answers) // run.accelerator.num_processes
    rows = slice(run.accelerator.process_index * each, (run.accelerator.process_index + 1) * each)
    return Batch(batch.segments[:, rows], batch.answers[rows])
