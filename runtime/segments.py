"""Where a document is cut: the three alignments of the published implementations (docs/bundle.md, "Running the graph")."""

from __future__ import annotations

from dataclasses import dataclass

from rmt_trt.contract import Alignment
from rmt_trt.errors import ContractError, TokenError


@dataclass(frozen=True)
class Cut:
    """Sizes of a document's segments in tokens: one of `first`, then `rest` each; the last may be shorter."""

    first: int
    rest: int

    def size(self, index: int) -> int:
        """Tokens that segment `index` takes while there are enough."""
        return self.first if index == 0 else self.rest

    def count(self, length: int) -> int:
        """Number of segments of a document of `length` >= 1 tokens."""
        return 1 + ceil_div(max(0, length - self.first), self.rest)


def cut(length: int | None, segment_length: int, alignment: Alignment) -> Cut:
    """How a document is cut. length: tokens, dropped ids not counted; None if unknown, which only "left" allows.

    "left": the last segment may be short. "right": the first. "center": equal chunks of ceil(length / segments).
    Errors: TokenError, when the length is needed and unknown; ContractError for a length below 1.
    """
    if alignment == "left":
        return Cut(segment_length, segment_length)
    if length is None:
        raise TokenError(
            f"alignment '{alignment}' needs the number of tokens beforehand, and an iterator does not tell it. "
            f"Pass length=, pass an array, or use alignment='left'"
        )
    if length < 1:
        raise ContractError(f"a document of {length} tokens cannot be cut; expected at least 1")
    if alignment == "right":
        return Cut((length - 1) % segment_length + 1, segment_length)
    size = ceil_div(length, ceil_div(length, segment_length))
    return Cut(size, size)


def ceil_div(length: int, size: int) -> int:
    """length / size, rounded up; exact for lengths of any size."""
    return -(-length // size)


@dataclass(frozen=True)
class Limit:
    """A limit on segments that a caller sets, and what happens to a longer document.

    overflow: "error" refuses it, "head" keeps its first tokens, "tail" its last ones.
    """

    max_segments: int
    overflow: str = "error"

    def __post_init__(self) -> None:
        if isinstance(self.max_segments, bool) or not isinstance(self.max_segments, int) or self.max_segments < 1:
            raise ContractError(f"max_segments is {self.max_segments!r}; expected a whole number of at least 1")
        if self.overflow not in ("error", "head", "tail"):
            raise ContractError(f"overflow is {self.overflow!r}; expected 'error', 'head' or 'tail'")

    def tokens(self, segment_length: int, pending: int = 0) -> int:
        """How many tokens may come, where `pending` ones of an earlier part fill the first segment already."""
        return self.max_segments * segment_length - pending

    def window(self, length: int, segment_length: int, where: str, pending: int = 0) -> tuple[int, int]:
        """(start, stop) of the tokens that are kept. Errors: TokenError, when there are too many."""
        most = self.tokens(segment_length, pending)
        if length <= most:
            return 0, length
        if self.overflow == "error":
            segments = ceil_div(pending + length, segment_length)
            raise TokenError(
                f"{where}: {length} tokens make {segments} segments of {segment_length}; max_segments={self.max_segments} "
                f"allows {most} tokens. Raise it, or pass overflow='head' or 'tail'"
            )
        return (0, most) if self.overflow == "head" else (length - most, length)
