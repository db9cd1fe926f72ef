"""Recall of the deployed model: questions answered right through the runtime, by number of segments.

    python -m rmt_trt.benchmarks.recall BUNDLE QUESTIONS [--segments 1,16,256] [--count 128] [--engine cpu]

Documents of one length are streamed together, piece by piece, at constant memory.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Annotated

import typer

from rmt_trt.commands.app import new_app, run_command
from rmt_trt.errors import ContractError
from rmt_trt.runtime import RMTRuntime
from rmt_trt.runtime.segments import cut
from rmt_trt.training.questions import Question, load_questions

app = new_app()


def by_segments(runtime: RMTRuntime, questions: list[Question]) -> dict[int, list[Question]]:
    """Questions by the number of segments that their documents have."""
    spec, groups = runtime.spec, dict[int, list[Question]]()
    for question in questions:
        count = cut(question.length, spec.segment_length, spec.alignment).count(question.length)
        groups.setdefault(count, []).append(question)
    return dict(sorted(groups.items()))


def recall(runtime: RMTRuntime, questions: list[Question]) -> int:
    """How many of the questions the runtime answers right."""
    documents = [question.pieces() for question in questions]
    answers = runtime.run(documents, length=[question.length for question in questions])
    return sum(label == question.answer for label, question in zip(answers.labels, questions, strict=True))


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    source: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="questions.jsonl")],
    segments: Annotated[str, typer.Option(help="Numbers of segments, with commas.")] = "1,16,256",
    count: Annotated[int, typer.Option(min=1, help="Questions at each.")] = 128,
    engine: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "auto",
) -> None:
    """Prints a row per number of segments."""
    with RMTRuntime(bundle, engine=engine, max_batch=count) as runtime:
        groups = by_segments(runtime, load_questions(source))
        print(f"{bundle.name} on engine '{runtime.engine}' ({runtime.dtype}), {platform.machine()}")
        for number in map(int, segments.split(",")):
            if len(groups.get(number, ())) < count:
                raise ContractError(
                    f"{source} has {len(groups.get(number, ()))} questions of {number} segments, not {count}"
                )
            started = time.perf_counter()
            right = recall(runtime, groups[number][:count])
            print(f"{number:>6} segments: {right} of {count} right, {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    run_command("recall", app)
