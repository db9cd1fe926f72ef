"""Writes questions.jsonl: held-out questions at 1 to 4096 segments, and over 100,000 and 1,000,000 tokens.

    python examples/memorize/make_questions.py examples/memorize/questions.jsonl

Documents draw from random streams that training never uses, whatever the seeds; these have seeds of their own too.
"""

from __future__ import annotations

import sys
from itertools import cycle

from rmt_trt.training.questions import Question, save_questions
from rmt_trt.training.tasks.synthetic import TASKS, make_document

SEGMENT = 128
# Tokens that a document lacks to fill its segments: half of the documents fill them, half begin with a short one.
MISSING = (0, 0, 1, 127, 0, 0, 64, 101)


def main(path: str) -> None:
    """Writes the file."""
    plan = [(segments * SEGMENT, 128) for segments in (1, 16, 256, 1024, 4096)] + [(100_000, 16), (1_000_000, 4)]
    questions = []
    seed = 1_000_000
    for length, count in plan:
        missing = cycle((0,) if length % SEGMENT else MISSING)
        for index in range(count):
            tokens = length - next(missing) if length > SEGMENT else length - index % 100
            questions.append(Question(make_document(TASKS[index % 2], tokens, seed)))
            seed += 1
    save_questions(path, questions)


if __name__ == "__main__":
    main(sys.argv[1])
