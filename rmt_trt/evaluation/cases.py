"""What is asked: cases of one task, length and place each, and the documents of a case.

A document follows from (seed, task, segments, position, sample) alone: every engine and dtype gets the same ones,
whatever else is measured in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.runtime.segments import cut
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.task import NAMES, Document, Task

MAX_SAMPLES = 600_000  # seeds of a case; a multiple of any number of kinds that take turns by seed
EVALUATION = 2  # the stream out of which the seeds are drawn: see training/tasks/task.py
_CASES = 1 << 43  # times MAX_SAMPLES: below 2**63, which a document's seed may have


@dataclass(frozen=True)
class Case:
    """One row to be measured: `samples` documents of `segments` segments.

    position  percent of the room before the question, where the facts stand; None for random places
    """

    task: str
    segments: int
    position: int | None
    samples: int

    @property
    def name(self) -> str:
        """For people: "detect, 64 segments, fact at 50 %"."""
        place = "" if self.position is None else f", fact at {self.position} %"
        return f"{self.task}, {in_segments(self.segments)}{place}"


def in_segments(count: int) -> str:
    """A number of segments, for people."""
    return f"{count:,} segment{'s' if count > 1 else ''}"


def all_cases(
    tasks: Sequence[str], segments: Sequence[int], positions: Sequence[int] | None, samples: Sequence[int]
) -> list[Case]:
    """Each task at each length and position, shortest first. samples: one for all lengths, or one for each.

    Errors: ContractError, for names and numbers that say nothing sensible.
    """
    unknown = [name for name in tasks if name not in NAMES]
    if unknown or not tasks:
        came = repr(unknown[0]) if unknown else "empty"
        raise ContractError(f"--task is {came}; expected {', '.join(NAMES)}, or several of them with commas")
    if not segments or min(segments) < 1 or len(set(segments)) < len(segments):
        raise ContractError(f"--segments is {_listed(segments)}; expected numbers of at least 1, each once")
    if not samples or not 1 <= min(samples) <= max(samples) <= MAX_SAMPLES:
        raise ContractError(f"--samples is {_listed(samples)}; expected numbers from 1 to {MAX_SAMPLES}")
    if len(samples) not in (1, len(segments)):
        raise ContractError(
            f"--samples has {len(samples)} numbers and --segments {len(segments)}; give one for all lengths, or one for each"
        )
    if positions is not None:
        if not positions or not 0 <= min(positions) <= max(positions) <= 100 or len(set(positions)) < len(positions):
            raise ContractError(f"--positions is {_listed(positions)}; expected percents from 0 to 100, each once")
        if "memorize" in tasks and set(positions) != {0}:
            raise ContractError(
                f"--positions is {_listed(positions)}, and memorize has its fact at the very start. Leave --positions out, "
                f"or ask for detect or reasoning"
            )
    each = list(samples) * len(segments) if len(samples) == 1 else samples
    lengths = sorted(zip(segments, each, strict=True))
    places = [None] if positions is None else list(positions)
    return [Case(task, number, place, count) for number, count in lengths for task in tasks for place in places]


def length_of(sample: int, segments: int, segment_length: int, least: int) -> int:
    """Tokens of a sample's document: half of them fill their segments, the others lack some tokens of one.

    least  tokens that any document has. Errors: ContractError, when so many segments do not hold them.
    """
    capacity = segments * segment_length
    room = capacity - max(least, capacity - segment_length + 1)
    if room < 0:
        raise ContractError(
            f"a document of {segments} segments of {segment_length} tokens holds {capacity} tokens; facts and question take "
            f"{least}. Ask for more segments"
        )
    return capacity - (0 if sample % 4 < 2 else (1 + 37 * sample) % (room + 1))


def seed_of(case: Case, seed: int, sample: int) -> int:
    """The seed of a sample's document; those of a case follow one another."""
    place = 0 if case.position is None else case.position + 1
    letters = [len(case.task), *case.task.encode()]
    return Draws(EVALUATION, seed, case.segments, place, *letters).below_any(_CASES) * MAX_SAMPLES + sample


def documents(task: Task, case: Case, spec: StepSpec, seed: int, samples: int | None = None) -> list[Document]:
    """The documents of a case, the first `samples` of them, decided on but not written.

    Errors: ContractError, when the task has none of this length and place.
    """
    first = seed_of(case, seed, 0)
    place = None if case.position is None else case.position / 100
    found = []
    for sample in range(case.samples if samples is None else samples):
        length = length_of(sample, case.segments, spec.segment_length, task.min_length)
        if cut(length, spec.segment_length, spec.alignment).count(length) != case.segments:
            raise ContractError(f"{length} tokens are not {case.segments} segments of {spec.segment_length}")
        found.append(task.document(length, first + sample, place))
    return found


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)) or "empty"
