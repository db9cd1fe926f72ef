"""What an evaluation finds: rows, kept in `results.json` after each, so that one that is broken off has what it had."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rmt_trt.errors import FormatError
from rmt_trt.evaluation.cases import Case
from rmt_trt.evaluation.interval import wilson
from rmt_trt.evaluation.plain import check_head, check_row
from rmt_trt.files import cannot_write, check_folder, read_json, write_file

RESULTS = "results.json"
MAX_BYTES = 256 << 20
# What must be the same for rows of two runs to stand in one table; and of their tasks those that both have.
SAME = ("model", "labels", "seed")
FORMAT = "rmt-eval 1"


@dataclass(frozen=True)
class Row:
    """One case, measured.

    position  percent of the room before the question, or None for random places
    tokens    of all documents together; `longest`: of the longest one
    wrong     the samples that were answered wrong, by their numbers: `cases.documents` makes them again
    steps     engine steps, of up to `slots` documents each; `idle_share`: slots in them that carried no document
    memory    bytes "host" and "device" at "start", "tenth" and "end" of the row: see `meters.Marks`
    text      what the task tells of this length: how often its background repeats
    left_out  why nothing was measured
    """

    task: str
    segments: int
    position: int | None = None
    count: int = 0
    right: int = 0
    tokens: int = 0
    longest: int = 0
    seconds: float = 0.0
    slots: int = 0
    steps: int = 0
    idle_share: float = 0.0
    wrong: tuple[int, ...] = ()
    memory: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the accuracy at 95 % confidence."""
        return wilson(self.right, self.count)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all documents by the clock on the wall."""
        return self.tokens / self.seconds

    def answers(self, case: Case) -> bool:
        """Whether this is the measured row of a case."""
        this = (self.task, self.segments, self.position, self.count)
        return not self.left_out and this == (case.task, case.segments, case.position, case.samples)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with those that follow from the others."""
        value = asdict(self)
        if self.left_out:
            return {name: value[name] for name in ("task", "segments", "position", "left_out")}
        low, high = self.interval
        more = {"accuracy": self.accuracy, "low": low, "high": high, "tokens_per_second": self.tokens_per_second}
        del value["left_out"]
        return value | more

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """Reads what `to_json` wrote. Errors: ValueError, KeyError, TypeError, ArithmeticError, for anything else."""
        check_row(value)
        given = {name: item for name, item in value.items() if name in cls.__dataclass_fields__}
        row = cls(**{**given, "wrong": tuple(given.get("wrong", ()))})
        if not row.left_out:
            _ = row.interval, row.tokens_per_second
        return row


class Results:
    """Rows in `folder/results.json`, which is written anew with each that is added.

    head  what they were measured with: command, machine, model, tasks
    """

    def __init__(self, folder: Path, head: dict[str, Any], rows: list[Row] | None = None) -> None:
        self.folder, self.head, self.rows = folder, head, rows or []

    def add(self, row: Row) -> None:
        """Adds a row in place of one of the same case that was left out, and writes the file. Errors: FormatError."""
        case = (row.task, row.segments, row.position)
        self.rows = [old for old in self.rows if not old.left_out or (old.task, old.segments, old.position) != case]
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Writes the file whole. Errors: FormatError."""
        value = self.head | {"rows": [row.to_json() for row in self.rows]}
        write_file(self.folder / RESULTS, (json.dumps(value, indent=1) + "\n").encode())


def prepare_folder(folder: Path, resume: bool) -> None:
    """Makes a folder for results, and says before the work what would stop them from being written there.

    Errors: FormatError, also when it holds results and they are not to be gone on with.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(folder, err) from err
    check_folder(folder, "the results go")
    if (folder / RESULTS).exists() and not resume:
        raise FormatError(
            f"{folder} holds results already. Go on with them (--resume), or choose another folder with -o"
        )


def open_results(folder: Path, head: dict[str, Any]) -> Results:
    """Results to be added to: those that the folder holds, if they were measured alike, or new ones. The head is the new
    one, with the tasks of both.

    Errors: FormatError, naming what differs.
    """
    if not (folder / RESULTS).exists():
        return Results(folder, head)
    old = read_results(folder / RESULTS)
    plain = json.loads(json.dumps(head))
    pairs = [(name, old.head.get(name), plain[name]) for name in SAME]
    tasks = old.head.get("tasks", {})
    pairs += [(f"task {name}", tasks[name], about) for name, about in plain["tasks"].items() if name in tasks]
    for name, was, now in pairs:
        if was != now:
            raise FormatError(
                f"{folder / RESULTS} was measured with another {name}: {_difference(was, now)}. Choose another folder with -o"
            )
    return Results(folder, head | {"tasks": tasks | plain["tasks"]}, old.rows)


def read_results(path: Path) -> Results:
    """Results out of a file, or a folder that holds one. Errors: FormatError."""
    path = path / RESULTS if path.is_dir() else path
    value = read_json(path, MAX_BYTES, "results of rmt-eval")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FormatError(f"{path} is no results file of rmt-eval; expected the {RESULTS} that it writes")
    try:
        rows = [Row.from_json(row) for row in value.pop("rows")]
        check_head(value)
        return Results(path.parent, value, rows)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as err:
        raise FormatError(f"{path} is damaged ({type(err).__name__}: {err}); measure again") from err


def _difference(was: Any, now: Any) -> str:
    """What differs between two values, or between two tables of them."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        return ", ".join(f"{key} was {was.get(key)!r} and is {now.get(key)!r}" for key in keys)
    return f"it was {was!r} and is {now!r}"
