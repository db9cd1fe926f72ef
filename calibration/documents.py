"""Documents to calibrate with, each read twice at constant memory: once to be counted, once to be stepped through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError, TokenError
from rmt_trt.runtime.segments import Cut, cut
from rmt_trt.runtime.tokens import PIECE, Document
from rmt_trt.training.tasks.draws import Draws

PARTS = ("early", "middle", "late")
CALIBRATION = 3  # the stream out of which a task's seeds are drawn: see training/tasks/task.py
_FIRST_SEEDS, _EACH = (
    1 << 43,
    600_000,
)  # below 2**63, which a document's seed may have; a multiple of any number of kinds


@dataclass(frozen=True)
class Source:
    """A document by its name. open: gives its ids anew at each call, an array, a memmap or an iterator of pieces."""

    name: str
    open: Callable[[], Any]


@dataclass(frozen=True)
class Counted:
    """What a document was found to be. tokens: without dropped ids. sha256: of these, as little-endian int64.

    drawn: the segments, from 0, that are looked at, in order
    """

    name: str
    tokens: int
    segments: int
    sha256: str
    drawn: tuple[int, ...]

    def part(self, segment: int) -> int:
        """The third of the document that a segment lies in: 0 early, 1 middle, 2 late."""
        return len(PARTS) * segment // self.segments


def counted(source: Source, spec: StepSpec, number: int, draws: int, seed: int) -> Counted:
    """Reads a document through, checks it, and draws its segments.

    Errors: TokenError, for ids that the model cannot read, and for a document that has no early, middle and late.
    """
    reader, digest, tokens = Document(source.open(), spec, source.name), hashlib.sha256(), 0
    while len(ids := reader.read(PIECE)):
        digest.update(ids.astype("<i8").tobytes())
        tokens += len(ids)
    if not tokens:
        raise TokenError(f"{source.name} holds no tokens that the model reads; expected a document to calibrate with")
    segments = cut(tokens, spec.segment_length, spec.alignment).count(tokens)
    if segments < len(PARTS):
        raise TokenError(
            f"{source.name} is too short: {tokens} tokens make {segments} segment{'s' if segments > 1 else ''} of "
            f"{spec.segment_length}, and ranges are taken early, middle and late in a document. Give one of more than "
            f"{(len(PARTS) - 1) * spec.segment_length} tokens, the longer the better"
        )
    return Counted(source.name, tokens, segments, digest.hexdigest(), drawn(segments, draws, seed, number))


def drawn(segments: int, draws: int, seed: int, number: int) -> tuple[int, ...]:
    """Segments of document `number`: the first, the last, those after 1, 2, 4, 8, ... others, and `draws` of each third, of which some
    may be the same.

    The powers of two show the memory while it still changes fast; the same arguments give the same segments.
    """
    chosen = {0, segments - 1, *(1 << power for power in range((segments - 1).bit_length()))}
    for part in range(len(PARTS)):
        # Segment k lies in part 3 * k // segments, as in `Counted.part`.
        start, stop = (-(-place * segments // len(PARTS)) for place in (part, part + 1))
        few = stop - start <= draws
        offsets = range(stop - start) if few else Draws(CALIBRATION, seed, number, part).below(stop - start, draws)
        chosen |= {start + int(offset) for offset in offsets}
    return tuple(sorted(chosen))


def task_seed(seed: int) -> int:
    """The seed of the first of a task's documents; the others follow one another."""
    return Draws(CALIBRATION, seed).below_any(_FIRST_SEEDS) * _EACH


def all_counted(sources: Sequence[Source], spec: StepSpec, draws: int, seed: int) -> list[Counted]:
    """Errors: ContractError without documents; TokenError, as `counted`."""
    if not sources:
        raise ContractError("no documents to calibrate with; expected at least one")
    return [counted(source, spec, number, draws, seed) for number, source in enumerate(sources)]


def opened(source: Source, about: Counted, spec: StepSpec) -> tuple[Document, Cut]:
    """A document from its start, and how it is cut."""
    return Document(source.open(), spec, source.name), cut(about.tokens, spec.segment_length, spec.alignment)
