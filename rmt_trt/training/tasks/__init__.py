"""The tasks of arXiv 2304.11062, section 4: a fact or two, hidden in a long text, and a question at its end."""

from __future__ import annotations

from pathlib import Path

from rmt_trt.errors import ContractError
from rmt_trt.training.tasks.task import NAMES, Task


def open_task(
    names: str, text: Path | None = None, tokenizer: str | None = None, part: tuple[float, float] = (0.0, 1.0)
) -> Task:
    """The task, or several mixed, named with commas: "memorize", "detect", "reasoning".

    With `text`, the part of a UTF-8 file from one share of it to another hides the facts, and `tokenizer`, the text of
    a tokenizer.json, makes ids of both. Without it words and noise are synthetic, with a tokenizer of their own.
    Errors: ContractError, FormatError.
    """
    kinds = tuple(name.strip() for name in names.split(","))
    wrong = [kind for kind in kinds if kind not in NAMES]
    if wrong or len(set(kinds)) < len(kinds):
        raise ContractError(
            f"task is {names!r}; expected one or several of {', '.join(NAMES)}, with commas, each at most once"
        )
    if text is None:
        if tuple(part) != (0.0, 1.0):
            raise ContractError(
                f"a part, {part[0]}:{part[1]}, was given without a text that it is of; give both or none"
            )
        from rmt_trt.training.tasks.synthetic_task import SyntheticTask

        return SyntheticTask(kinds)
    if tokenizer is None:
        raise ContractError(f"the text {text} was given without a tokenizer.json; the model's own is needed")
    from rmt_trt.training.tasks.background import Background
    from rmt_trt.training.tasks.text import TextTask

    return TextTask(kinds, Background.open(text, tokenizer, *part))
