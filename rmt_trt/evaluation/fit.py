"""Whether a model and a task speak of the same ids and answers, and which answer a model's logits give."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.training.tasks.task import Task


def check_fit(spec: StepSpec, tokenizer: str | None, task: Task) -> None:
    """Errors: ContractError, when the model cannot read the task's documents or give its answers.

    tokenizer  the model's own tokenizer.json, or None
    """
    if task.vocab_size > spec.vocab_size:
        raise ContractError(
            f"the task's ids go up to {task.vocab_size - 1}; the model's vocabulary has ids 0 to {spec.vocab_size - 1}. "
            f"{_another_tokenizer(task)}"
        )
    if tokenizer is not None and (differs := _first_difference(_vocabulary(task.tokenizer), _vocabulary(tokenizer))):
        raise ContractError(f"{differs} by the task's tokenizer and not by the model's. {_another_tokenizer(task)}")
    if spec.logits == "lm":
        if max(task.answer_ids) >= spec.num_logits:
            raise ContractError(
                f"the answers' ids go up to {max(task.answer_ids)}; the model has {spec.num_logits} logits a token"
            )
    elif (spec.id2label and spec.id2label != task.labels) or spec.num_logits != len(task.labels):
        classes = ", ".join(spec.id2label) or f"{spec.num_logits} classes without names"
        raise ContractError(
            f"the model's classes are {classes}; those of {task.name} are {', '.join(task.labels)}, in this order. Was the "
            f"model trained on this task?"
        )


def answer_of(spec: StepSpec, task: Task, logits: np.ndarray) -> int:
    """The class that a model answers. logits (c,), or of a language model (v,): the largest of the answers' first tokens."""
    return int(np.argmax(logits[list(task.answer_ids)] if spec.logits == "lm" else logits))


def _another_tokenizer(task: Task) -> str:
    return (
        f"{task.name} was made with another tokenizer: give the model that was trained on it, or a text of its own language "
        f"with --text"
    )


def _vocabulary(tokenizer: str) -> dict[str, Any]:
    """Words and their ids, where a tokenizer.json lists them so."""
    value = json.loads(tokenizer)
    words = value.get("model", {}).get("vocab", {}) if isinstance(value, dict) else {}
    return words if isinstance(words, dict) else {}


def _first_difference(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """Says of the first word that has another id, or none, among those found."""
    if not found:
        return ""
    return next((f"{word!r} has the id {number}" for word, number in wanted.items() if found.get(word) != number), "")
