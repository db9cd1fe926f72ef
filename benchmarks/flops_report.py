"""The FLOPs of `rmt_trt.flops` as tables, as JSON and as a plot. Matplotlib only when drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rmt_trt.benchmarks.tables import Section, markdown_table
from rmt_trt.errors import require
from rmt_trt.flops import (
    COUNTINGS,
    MODELS,
    OPT,
    Counting,
    Cut,
    Sizes,
    Terms,
    full_attention,
    recurrent,
    times_fewer,
)

DOTS = 100  # per inch
DARKEN = 0.85
PAPER_RATIOS = {"opt-125m": 295, "opt-175b": 29}
PAPER_CUT = Cut(segment=512)
PAPER_TOKENS = 4096 * PAPER_CUT.segment
OUR_ENCODER = Cut(segment=499, memory=10, form="encoder")
OUR_TOKENS = 4096 * OUR_ENCODER.segment
PAPER_NOTE = (
    "arXiv 2304.11062 names 295 and 29 times, for segments of 512 and a text of '2,048,000' tokens, counted from vocabulary, "
    "layers, widths and heads. The first line below theirs gives both. Heads enter a count by the softmax alone, the vocabulary "
    "by the logits: this is the count of Hoffmann et al., with the embedding as the look-up that it is and without positions "
    "for the memory. The length is 4,096 segments of 512, which is 2,048 times 1,024; 2,048,000 in decimal give the second "
    "line. Of the other combinations of terms, lengths and memory that `tests/test_flops.py` goes through none "
    "gives both figures. Kernels that leave out the masked half of the scores spare full attention nearly half of its work, "
    "and the RMT little: 'causal' is the fairer figure for a decoder. The paper's own text was not at hand: its length and what "
    "it counts from are taken from a summary of it, and that it counts as Hoffmann et al. do is concluded from the fit alone."
)


@dataclass(frozen=True)
class Study:
    """What is compared: models at lengths, one way to cut and one to count."""

    models: tuple[Sizes, ...]
    tokens: tuple[int, ...]
    cut: Cut
    counting: Counting


@dataclass(frozen=True)
class Point:
    """One model at one length."""

    model: str
    tokens: int
    segments: int
    full: Terms
    rmt: Terms

    @property
    def times_fewer(self) -> float:
        """FLOPs of full attention by those of the RMT."""
        return self.full.total / self.rmt.total


def points(study: Study) -> list[Point]:
    """Every model at every length."""
    cut, counting = study.cut, study.counting
    return [
        Point(
            sizes.name, tokens, cut.segments(tokens), full_attention(sizes, tokens, counting, cut.form),
            recurrent(sizes, tokens, cut, counting),
        )
        for sizes in study.models
        for tokens in study.tokens
    ]  # fmt: skip


def sections(study: Study, found: Sequence[Point]) -> list[Section]:
    """The tables: ratios first, then the FLOPs themselves, then where they go at the longest text."""
    names = [sizes.name for sizes in study.models]
    at = {(point.model, point.tokens): point for point in found}

    def by_length(title: str, cell: Any) -> Section:
        rows = [(f"{n:,}", *(cell(at[name, n]) for name in names)) for n in study.tokens]
        return Section(title, ("tokens", *names), rows)

    made = [
        by_length("Times fewer FLOPs than full attention", lambda point: f"{point.times_fewer:,.1f}"),
        by_length("RMT, TFLOP for the whole text", lambda point: in_tflop(point.rmt.total)),
        by_length("Full attention, TFLOP for the whole text", lambda point: in_tflop(point.full.total)),
    ]
    if set(PAPER_RATIOS) <= set(names):
        made.append(beside_paper())
    longest = study.tokens[-1]
    shown = [name for name in PAPER_RATIOS if name in names] or names[:2]
    return [*made, by_term([at[name, longest] for name in shown])]


def by_term(found: Sequence[Point]) -> Section:
    """FLOPs per text token of each term of some points of one length."""
    columns = [f"{point.model}, {what}" for point in found for what in ("full", "RMT")]
    pairs = [(point, terms) for point in found for terms in (point.full, point.rmt)]
    rows = [
        (part.name, *(f"{getattr(terms, part.name) / point.tokens:,.0f}" for point, terms in pairs))
        for part in fields(Terms)
    ]
    rows.append(("all", *(f"{terms.total / point.tokens:,.0f}" for point, terms in pairs)))
    return Section(f"FLOPs per token by term, at {found[0].tokens:,} tokens", ("", *columns), rows)


def beside_paper() -> Section:
    """The paper's two figures under several counts, to one digit behind the point."""
    paper = COUNTINGS["paper"]
    settings = [
        ("counted as 'paper', 4,096 segments or 2,097,152 tokens", PAPER_TOKENS, PAPER_CUT, paper),
        ("the same, 2,048,000 tokens", 2_048_000, PAPER_CUT, paper),
        *(
            (f"counted as '{name}', 2,097,152 tokens", PAPER_TOKENS, PAPER_CUT, one)
            for name, one in COUNTINGS.items()
            if one != paper
        ),
        ("'paper', 10 memory vectors read and written beside 512 tokens", PAPER_TOKENS, Cut(512, memory=10), paper),
        ("'paper', these within 512 positions: 492 tokens", PAPER_TOKENS, Cut(492, memory=10), paper),
    ]
    rows = [
        (text, *(f"{times_fewer(OPT[name], tokens, cut, counting):.1f}" for name in PAPER_RATIOS))
        for text, tokens, cut, counting in settings
    ]
    encoder = times_fewer(MODELS["bert-base"], OUR_TOKENS, OUR_ENCODER, paper)
    note = (
        f"{PAPER_NOTE}\n\nBERT-base as we deploy it, 10 memory vectors and 499 text tokens in 512 positions, needs "
        f"{encoder:.1f} times fewer than full attention at 4,096 segments ({OUR_TOKENS:,} tokens); an encoder classifier "
        "has no product with a vocabulary."
    )
    said = ("the paper says", *(str(ratio) for ratio in PAPER_RATIOS.values()))
    return Section(
        "The paper's figures", ("segments of 512 tokens but for the last line", *PAPER_RATIOS), [said, *rows], note
    )


def markdown(command: str, study: Study, found: Sequence[Point], plot: str) -> str:
    """The whole report, with the plot of that name."""
    cut, counting = study.cut, study.counting
    lines = [
        "# FLOPs by length: full attention and a Recurrent Memory Transformer", "", f"    {command}", "",
        f"Of one forward pass, computed from the models' published sizes. Segments of {cut.segment} text tokens, "
        f"{cut.memory} memory vectors, form {cut.form}: {cut.segment + cut.beside_text} positions each. Counted as "
        f"'{counting.name}': {counting.says}. Every formula, with its source, stands in `rmt_trt/flops.py`.", "",
        f"![FLOPs and their ratio by length]({plot})", "",
    ]  # fmt: skip
    for section in sections(study, found):
        lines += markdown_table(section)
    return "\n".join(lines).rstrip() + "\n"


def to_json(command: str, study: Study, found: Sequence[Point]) -> dict[str, Any]:
    """All figures as exact whole numbers, FLOPs for the whole text."""
    return {
        "command": command,
        "counting": asdict(study.counting),
        "cut": {**asdict(study.cut), "positions": study.cut.segment + study.cut.beside_text},
        "models": [asdict(sizes) for sizes in study.models],
        "rows": [
            {
                "model": point.model,
                "tokens": point.tokens,
                "segments": point.segments,
                "full": {**asdict(point.full), "total": point.full.total},
                "rmt": {**asdict(point.rmt), "total": point.rmt.total},
                "times_fewer": point.times_fewer,
            }
            for point in found
        ],
    }


def in_tflop(count: int) -> str:
    """10^12 FLOPs, four digits or more."""
    value = count / 1e12
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def draw(path: Path, study: Study, found: Sequence[Point]) -> None:
    """Writes the plot as PNG: FLOPs, and how many times fewer, by length. Errors: EngineError without matplotlib."""
    matplotlib: Any = require("matplotlib", "bench", "the plot")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    colours = plt.get_cmap("turbo")
    for number, sizes in enumerate(study.models):
        own = [point for point in found if point.model == sizes.name]
        lengths = [point.tokens for point in own]
        shade = colours(0.06 + 0.88 * number / max(1, len(study.models) - 1))
        # Dark enough on white in the middle of the map too; in turn wide and thin, as equal ratios hide each other.
        look = {
            "color": [DARKEN * part for part in shade[:3]],
            "linewidth": 1.2 + 1.2 * (number % 2 == 0),
            "markersize": 3,
        }
        left.loglog(lengths, [point.full.total for point in own], "o--", **look)
        left.loglog(lengths, [point.rmt.total for point in own], "o-", **look)
        right.loglog(lengths, [point.times_fewer for point in own], "o-", label=sizes.name, **look)
        if sizes.name in PAPER_RATIOS and study.cut == PAPER_CUT:
            said = PAPER_RATIOS[sizes.name]
            right.plot(PAPER_TOKENS, said, "*", markersize=12, color="black", zorder=5)
            right.annotate(f"{said}", (PAPER_TOKENS, said), (3, -17), textcoords="offset points")
    _finish(left, right, study)
    figure.savefig(path, dpi=DOTS, format="png", pil_kwargs={"optimize": True})
    plt.close(figure)


def _finish(left: Any, right: Any, study: Study) -> None:
    left.plot([], [], "--", color="grey", label="full attention")
    left.plot([], [], "-", color="grey", label=f"RMT, {study.cut.segment} tokens a segment")
    left.set(xlabel="length of the text, tokens", ylabel="FLOPs of one forward pass", title="FLOPs")
    right.set(xlabel="length of the text, tokens", ylabel="full attention / RMT", title="Times fewer FLOPs with RMT")
    if study.cut == PAPER_CUT and set(PAPER_RATIOS) & {sizes.name for sizes in study.models}:
        right.plot([], [], "*", markersize=11, color="black", linestyle="none", label="as the paper says")
    right.margins(x=0.1)
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize=8)
