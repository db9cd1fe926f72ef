"""The attention maps of a model's operations on a task's documents: measured, drawn, described."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmt_trt.analysis.attention import examples, find_operations
from rmt_trt.analysis.pictures import draw_attention
from rmt_trt.analysis.report import operation_facts, picture_of
from rmt_trt.errors import require
from rmt_trt.model.step import RMTModel
from rmt_trt.training.tasks.task import Task


def draw_operations(
    folder: Path, model: RMTModel, task: Task, segments: int, documents: int, seed: int, place: float | None,
    on_document: Callable[[int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes a picture for each operation and returns the report's part.

    Errors: ContractError, when no document of so many segments shows the operations; FormatError, when a picture cannot
    be written.
    """
    config = model.config
    found = examples(task, segments, config.segment_length, documents, seed, place)
    facts = []
    for finding in find_operations(model, found, on_document):
        words = words_of(task, finding.drawn.ids)
        path = folder / picture_of(finding.operation.name)
        draw_attention(path, finding, config.form, words, (segments, documents))
        facts.append(operation_facts(finding, config.form, words, task.labels))
    return {"segments": segments, "documents": documents, "seeds": [one.seed for one in found], "operations": facts}


def words_of(task: Task, ids: tuple[int, ...]) -> list[str]:
    """Each token as text, by the task's tokenizer. Errors: EngineError without the library `tokenizers`."""
    tokenizer = require("tokenizers", "analyze", "the words of attention maps").Tokenizer.from_str(task.tokenizer)
    return [tokenizer.decode([number], skip_special_tokens=False).strip() or str(number) for number in ids]
