"""Files of questions: one JSON object per line says which document to make, not the document itself.

    {"task": "detect", "seed": 7, "length": 100000, "position": 4711,
     "fact": "daniel went to the hallway .", "question": "where is daniel ?", "answer": "hallway"}

The fact, the question and the answer follow from the first four; they stand there to be read, and are compared
when the file is loaded. Numpy only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.files import read_bounded, write_file
from rmt_trt.training.tasks.synthetic import TASKS, Document, make_document, words_of

NUMBERS = ("seed", "length", "position")
FIELDS = {"task", *NUMBERS, "fact", "question", "answer"}
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Question:
    """A question with its document, which is made anew each time it is read."""

    document: Document

    @property
    def task(self) -> str:
        """ "memorize" or "detect"."""
        return self.document.task

    @property
    def length(self) -> int:
        """Tokens of the document, the question included."""
        return self.document.length

    @property
    def position(self) -> int:
        """The token at which the fact begins."""
        return self.document.position

    @property
    def fact(self) -> str:
        """The fact, as words: "daniel went to the hallway ."."""
        return words_of(self.document.fact.fact)

    @property
    def question(self) -> str:
        """The question, as words: "where is daniel ?"."""
        return words_of(self.document.fact.question)

    @property
    def answer(self) -> str:
        """The place: the name of the right class."""
        return self.document.answer

    def tokens(self) -> np.ndarray:
        """All ids (length,) int64."""
        return self.document.tokens()

    def pieces(self, size: int = 1 << 16) -> Iterator[np.ndarray]:
        """The ids int64 in pieces of `size`, in constant memory."""
        return self.document.pieces(size)

    def text(self) -> Iterator[str]:
        """The document as readable text, piece by piece."""
        return self.document.text()

    def to_json(self) -> dict[str, Any]:
        """One line of a questions file."""
        document = self.document
        return {
            "task": document.task,
            "seed": document.seed,
            "length": document.length,
            "position": document.position,
            "fact": self.fact,
            "question": self.question,
            "answer": self.answer,
        }


def load_questions(path: Path | str) -> list[Question]:
    """The questions of a file, in order. Errors: FormatError, naming file and line."""
    path = Path(path)
    try:
        lines = read_bounded(path, MAX_BYTES, "a questions file").decode("utf-8").splitlines()
    except UnicodeDecodeError as err:
        raise FormatError(f"{path} is not UTF-8 text ({err}); expected a questions file") from err
    questions = [_read_line(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise FormatError(f"{path} holds no questions; expected one JSON object per line")
    return questions


def save_questions(path: Path | str, questions: Iterable[Question]) -> None:
    """Writes a questions file. Errors: FormatError, when it cannot be written."""
    text = "".join(json.dumps(question.to_json()) + "\n" for question in questions)
    write_file(Path(path), text.encode("utf-8"))


def make_questions(length: int, count: int, first_seed: int) -> list[Question]:
    """`count` questions over documents of `length` tokens, the two tasks in turn, seeds from `first_seed` on."""
    return [Question(make_document(TASKS[i % 2], length, first_seed + i)) for i in range(count)]


def _read_line(where: str, line: str) -> Question:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as err:  # also for a number of thousands of digits
        raise FormatError(f"{where}: not JSON: {err}") from err
    if not isinstance(value, dict) or set(value) != FIELDS:
        raise FormatError(f"{where}: expected a JSON object with the fields {sorted(FIELDS)}")
    for name in NUMBERS:
        if isinstance(value[name], bool) or not isinstance(value[name], int):
            raise FormatError(f"{where}: {name} is {value[name]!r}; expected a whole number")
    try:
        question = Question(make_document(value["task"], value["length"], value["seed"], value["position"]))
    except ContractError as err:
        raise FormatError(f"{where}: {err}") from err
    if question.to_json() != value:
        raise FormatError(
            f"{where}: the document of this seed says {question.fact!r}, the file {value['fact']!r}, answer "
            f"{value['answer']!r}. The file was written by another version of the tasks: write it again"
        )
    return question
