"""fp32 parity: what a bundle gives, memory and logits after every segment, is what the plain recurrence gives.

`python tests/test_parity.py` prints the table of docs/results/parity.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest
from models import BACKBONES, LENGTHS, MEMORY_EFFECT, Made, S, check_parity, made, reference, steps_of

from rmt_trt import RMTRuntime
from rmt_trt.contract import ALIGNMENTS
from rmt_trt.export.verify import memory_effect

DOCUMENT = 3 * S + 7
Steps = Iterator[tuple[np.ndarray, np.ndarray]]


def effect_of(runtime: RMTRuntime, document: np.ndarray, alignment: str | None = None) -> float:
    """By how much the last segment's logits change when its memory is reset."""
    return memory_effect(runtime, document, list(runtime.stream(document, alignment=alignment))[-1])


def error_alone(this: Made, runtime: RMTRuntime, length: int, alignment: str) -> float:
    """The largest error over the segments of one document by itself."""
    found = steps_of(runtime, this.document(length), alignment=alignment)
    return check_parity(found, reference(this.name, length, alignment), f"{this.name}, {length} tokens, {alignment}")


def error_in_batch(this: Made, runtime: RMTRuntime, alignment: str) -> float:
    """The largest error over the segments of documents of all lengths, run as one batch."""
    documents = [this.document(length) for length in LENGTHS]
    pieces = sorted(runtime.stream(documents, memory=True, alignment=alignment), key=lambda piece: piece.row)
    rows = {row: [(p.memory, p.logits) for p in group] for row, group in groupby(pieces, key=lambda piece: piece.row)}
    return max(
        check_parity(rows[row], reference(this.name, length, alignment), f"{this.name}, row {row}, {alignment}")
        for row, length in enumerate(LENGTHS)
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_resetting_the_memory_changes_the_logits_by_more_than_one_percent(name: str) -> None:
    this = made(name)
    assert this.report.memory_effect > MEMORY_EFFECT
    with this.open() as runtime:
        for alignment in ALIGNMENTS:
            for length in (length for length in LENGTHS if length > S):  # a shorter one has no memory to reset
                assert effect_of(runtime, this.document(length), alignment) > MEMORY_EFFECT, (length, alignment)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", BACKBONES)
def test_memory_and_logits_after_every_segment_are_those_of_the_recurrence(name: str, alignment: str) -> None:
    this = made(name)
    with this.open() as runtime:
        for length in LENGTHS:
            error_alone(this, runtime, length, alignment)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_batch_of_all_lengths_is_that_of_the_recurrence_document_by_document(name: str, alignment: str) -> None:
    this = made(name)
    with this.open() as runtime:
        error_in_batch(this, runtime, alignment)


def memory_reset(runtime: RMTRuntime, tokens: np.ndarray) -> Steps:
    """Planted fault: every segment starts from the initial memory."""
    for start in range(0, len(tokens), S):
        yield from steps_of(runtime, tokens[start : start + S], alignment="left")


def last_segment_dropped(runtime: RMTRuntime, tokens: np.ndarray) -> Steps:
    """Planted fault: the short segment at the end is lost."""
    return steps_of(runtime, tokens[: len(tokens) // S * S], alignment="left")


def last_segment_repeats_the_one_before(runtime: RMTRuntime, tokens: np.ndarray) -> Steps:
    """Planted fault: the last segment does not reach the memory, though there are as many answers as segments."""
    steps = list(last_segment_dropped(runtime, tokens))
    return iter([*steps, steps[-1]])


def wrong_alignment(runtime: RMTRuntime, tokens: np.ndarray) -> Steps:
    """Planted fault: the short segment comes first."""
    return steps_of(runtime, tokens, alignment="right")


FAULTS = {
    memory_reset: "drift by .* after segment 2",
    last_segment_dropped: "3 segments; the recurrence has 4",
    last_segment_repeats_the_one_before: "after segment 4",
    wrong_alignment: "after segment 1",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_planted_fault_fails_the_check(name: str, fault: object) -> None:
    this = made(name)
    with this.open() as runtime:
        check_parity(steps_of(runtime, this.document(DOCUMENT), alignment="left"), reference(name, DOCUMENT, "left"))
        with pytest.raises(AssertionError, match=FAULTS[fault]):
            check_parity(fault(runtime, this.document(DOCUMENT)), reference(name, DOCUMENT, "left"))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_alignment_taken_for_another_fails_the_check(name: str) -> None:
    this = made(name)
    with this.open() as runtime:
        for asked in ALIGNMENTS:
            for given in set(ALIGNMENTS) - {asked}:
                with pytest.raises(AssertionError, match=r"shapes|drift"):
                    check_parity(
                        steps_of(runtime, this.document(DOCUMENT), alignment=given), reference(name, DOCUMENT, asked)
                    )


def table() -> Iterator[str]:
    """The lines of the table in docs/results/parity.md."""
    yield "| backbone | form | alone | in one batch | memory reset |"
    yield "|---|---|---|---|---|"
    worst = 0.0
    for name in BACKBONES:
        this = made(name)
        with this.open() as runtime:
            alone = max(error_alone(this, runtime, length, a) for a in ALIGNMENTS for length in LENGTHS)
            batch = max(error_in_batch(this, runtime, a) for a in ALIGNMENTS)
            effect = effect_of(runtime, this.document(LENGTHS[-1]))
        worst = max(worst, alone, batch)
        yield f"| {name} | {this.spec.form} | {alone:.1e} | {batch:.1e} | {effect:.0%} |"
    yield f"\nThe largest of all: {worst:.1e}"


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
