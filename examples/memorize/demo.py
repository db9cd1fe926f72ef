"""The whole way on the example: export model.pt, verify it, and answer questions over 100,000 and 1,000,000 tokens.

    make demo          or          python examples/memorize/demo.py [FOLDER]

Every document is generated as text, tokenised and read piece by piece: neither it nor its tokens are ever held whole.
Exit status 1, if a single answer is wrong.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rmt_trt import RMTRuntime
from rmt_trt.commands.run import peak_memory_mb
from rmt_trt.training.questions import Question, load_questions

HERE = Path(__file__).parent
GROUPS = {100_000: 8, 1_000_000: 2}  # questions of each length that are asked together


def export(folder: Path) -> Path:
    """Runs rmt-export, in a process of its own: the runtime's memory below is then the runtime's alone."""
    bundle = folder / "memorize.rmt"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        str(Path(sys.executable).with_name("rmt-export")),
        str(HERE / "model.pt"),
        "-o",
        str(bundle),
        "--overwrite",
    ]
    subprocess.run(command, check=True)
    return bundle


def ask(runtime: RMTRuntime, questions: list[Question], console: Console) -> int:
    """Streams the documents through the runtime together; prints each answer and returns how many are right."""
    length = questions[0].length
    documents = [(runtime.encode(text) for text in question.text()) for question in questions]
    stream = runtime.stream(documents, length=[question.length for question in questions], logits="last")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    started, tokens = time.perf_counter(), 0
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(f"{len(questions)} x {length:,} tokens", total=length * len(questions), rate="")
        for piece in stream:
            tokens += piece.stop - piece.start
            rate = f"{tokens / (time.perf_counter() - started):,.0f} tokens/s, {peak_memory_mb():,.0f} MB"
            bars.update(task, completed=tokens, rate=rate)
    seconds = time.perf_counter() - started
    right = 0
    for question, label in zip(questions, [result.label for result in stream.results], strict=True):
        right += label == question.answer
        mark = "right" if label == question.answer else f"WRONG, it is {question.answer}"
        console.print(f"  token {question.position:>7,} of {question.length:,}: {question.fact:38} {question.question:20} "
                      f"{label:9} {mark}")  # fmt: skip
    console.print(f"  {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s, "
                  f"peak memory of this process {peak_memory_mb():,.0f} MB")  # fmt: skip
    return right


def main() -> None:
    console = Console(highlight=False, soft_wrap=True)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent.parent / "demo"
    bundle = export(folder)
    questions = load_questions(HERE / "questions.jsonl")
    asked = right = 0
    with RMTRuntime(bundle) as runtime:
        console.print(f"{bundle.name} on engine '{runtime.engine}' ({runtime.dtype})")
        for length, count in GROUPS.items():
            group = [question for question in questions if question.length == length][:count]
            if len(group) < count:
                raise SystemExit(f"questions.jsonl has {len(group)} questions of {length} tokens; {count} are asked")
            right += ask(runtime, group, console)
            asked += count
    console.print(f"{right} of {asked} right")
    if right < asked:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
