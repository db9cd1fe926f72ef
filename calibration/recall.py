"""Questions of a task, held out, through a quantized graph as it is deployed: how many are answered right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.runtime import RMTRuntime
from rmt_trt.training.tasks.task import Task

SEEDS = 1 << 40  # of the questions: others than rmt-eval asks, which a mix chosen here is to be judged by
SLOTS = 16  # documents that are read together
MOST_SEGMENTS, MOST_QUESTIONS = 1 << 20, 100_000


@dataclass(frozen=True)
class Questions:
    """task, how many segments a document has, one number or several, and how many questions at each."""

    task: Task
    segments: tuple[int, ...] = (64,)
    count: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_questions(self.segments, self.count)


def check_questions(segments: Sequence[int], count: int) -> None:
    """Errors: ContractError, for numbers of segments or of questions that there are not."""
    if not segments or not 1 <= min(segments) <= max(segments) <= MOST_SEGMENTS:
        came = ",".join(map(str, segments)) or "empty"
        raise ContractError(f"--recall-segments is {came:.60}; expected numbers from 1 to {MOST_SEGMENTS:,}")
    if not 1 <= count <= MOST_QUESTIONS:
        raise ContractError(f"--recall-questions is {count}; expected a whole number from 1 to {MOST_QUESTIONS:,}")


def check_lengths(questions: Questions, spec: StepSpec) -> None:
    """Errors: ContractError, where documents of so few segments hold no question."""
    from rmt_trt.evaluation.cases import Case, documents

    for segments in questions.segments:
        # How a document fills its last segment goes round by four.
        documents(questions.task, Case(questions.task.name, segments, None, questions.count), spec, SEEDS, samples=4)


@dataclass(frozen=True)
class Answered:
    """How many of `count` questions over documents of so many segments were answered right."""

    segments: int
    right: int
    count: int

    @property
    def share(self) -> float:
        return self.right / self.count


def answered(
    path: Path,
    questions: Questions,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Answered, ...]:
    """Asks the graph, or the bundle's fp32 one, on the CPU engine; the same questions whatever the graph.

    progress is called with (segments done, segments in all), about. Errors: ContractError, where documents of so few segments
    hold no question.
    """
    from rmt_trt.evaluation.cases import Case, documents
    from rmt_trt.evaluation.fit import answer_of
    from rmt_trt.evaluation.measure import read_many

    found, total, before = [], questions.count * sum(questions.segments), 0
    with RMTRuntime(path, engine="cpu", threads=threads) as runtime:
        spec = runtime.spec
        for segments in questions.segments:
            case = Case(questions.task.name, segments, None, questions.count)
            asked = documents(questions.task, case, spec, SEEDS + questions.seed)

            def show(tokens: int, done: int = before) -> None:
                progress(min(total, done + tokens // spec.segment_length), total)

            many = read_many(runtime, asked, min(SLOTS, questions.count), show)
            right = sum(answer_of(spec, questions.task, out.logits) == asked[index].label for index, out in many)
            found.append(Answered(segments, right, questions.count))
            before += segments * questions.count
    return tuple(found)
