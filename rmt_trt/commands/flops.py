"""rmt-flops: FLOPs of full attention against a Recurrent Memory Transformer, by length, from published sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rmt_trt.commands.app import Debug, Version, console, new_app, run_command
from rmt_trt.errors import ContractError, FormatError, require
from rmt_trt.files import atomic_file, cannot_write, check_folder, check_target, write_file
from rmt_trt.flops import COUNTINGS, FORMS, MAX_TOKENS, MODELS, OPT, Counting, Cut, Sizes, within

app = new_app()

PAPER_WIDTH = 150  # characters of a line that no terminal bounds
LENGTHS = "512,2048,8192,32768,131072,524288,2097152"
MOST_LENGTHS = 100
HEAD_WIDTH = 64
FILES = REPORT_JSON, REPORT_TEXT, REPORT_PLOT = "flops.json", "flops.md", "flops.png"


@app.command()
def flops(
    model: Annotated[
        str | None,
        typer.Option(help=f"Some of {', '.join(MODELS)}. [default: the OPT family, or the custom one alone]"),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="A custom model: its layers.")] = None,
    width: Annotated[int | None, typer.Option(help="Its width; the MLP is four times as wide.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Tokens in its vocabulary.")] = None,
    heads: Annotated[int | None, typer.Option(help=f"Its heads. [default: of {HEAD_WIDTH} each]")] = None,
    tokens: Annotated[str, typer.Option(help="Lengths of the text, with commas.")] = LENGTHS,
    segment: Annotated[int, typer.Option(help="Text tokens in a segment.")] = 512,
    memory: Annotated[int, typer.Option(help="Memory vectors beside them. A decoder has them twice.")] = 0,
    form: Annotated[str, typer.Option(help="decoder: [memory | text | memory]. encoder: one memory, no logits.")] = (
        "decoder"
    ),
    count: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {counting.says}" for name, counting in COUNTINGS.items()) + ".")
    ] = "paper",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for flops.json, flops.md and flops.png.")
    ] = None,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Computes, without running anything, what a text costs in one pass and in segments; tables on standard output."""
    from rmt_trt.benchmarks.command_line import shown
    from rmt_trt.benchmarks.flops_report import Study, draw, markdown, points, sections, to_json
    from rmt_trt.benchmarks.tables import screen_table

    cut = Cut(segment, memory, form)
    study = Study(
        _models(model, _custom(layers, width, vocab, heads)), _lengths(tokens, cut), cut, _counting(count, cut)
    )
    if out is not None:
        require("matplotlib", "bench", "the plot of rmt-flops -o")
        _make_folder(out)
    found = points(study)
    paper = Console(width=None if sys.stdout.isatty() else PAPER_WIDTH, highlight=False, markup=False, emoji=False)
    for section in sections(study, found):
        paper.print(screen_table(section))
    if out is None:
        return
    command = shown(sys.argv[1:], "rmt-flops")
    write_file(out / REPORT_JSON, (json.dumps(to_json(command, study, found), indent=1) + "\n").encode())
    write_file(out / REPORT_TEXT, markdown(command, study, found, REPORT_PLOT).encode())
    with atomic_file(out / REPORT_PLOT) as temporary:
        draw(temporary, study, found)
    console().print(", ".join(str(out / name) for name in FILES))


def _models(text: str | None, custom: Sizes | None) -> tuple[Sizes, ...]:
    if text is None:
        return (custom,) if custom is not None else tuple(OPT.values())
    chosen = [part.strip().lower() for part in text.split(",") if part.strip()]
    unknown = [name for name in chosen if name not in MODELS]
    if unknown or not chosen:
        raise ContractError(
            f"--model names {repr(unknown[0])[:60] if unknown else 'nothing'}; expected some of {', '.join(MODELS)}, with commas. "
            "For another model give --layers, --width and --vocab"
        )
    return tuple(MODELS[name] for name in dict.fromkeys(chosen)) + ((custom,) if custom is not None else ())


def _custom(layers: int | None, width: int | None, vocab: int | None, heads: int | None) -> Sizes | None:
    given = {"--layers": layers, "--width": width, "--vocab": vocab}
    if all(value is None for value in (*given.values(), heads)):
        return None
    if layers is None or width is None or vocab is None:
        missing = ", ".join(flag for flag, value in given.items() if value is None)
        raise ContractError(f"a custom model lacks {missing}; give --layers, --width and --vocab together")
    if heads is None and width % HEAD_WIDTH:
        raise ContractError(f"--width is {width}, no multiple of {HEAD_WIDTH}; say how many --heads that are")
    return Sizes("custom", layers, width, width // HEAD_WIDTH if heads is None else heads, vocab)


def _lengths(text: str, cut: Cut) -> tuple[int, ...]:
    try:
        lengths = sorted({int(part.replace("_", "")) for part in text.split(",") if part.strip()})
    except ValueError as err:
        raise ContractError(f"--tokens is {text!r:.60}; expected whole numbers with commas, such as {LENGTHS}") from err
    if not 1 <= len(lengths) <= MOST_LENGTHS:
        raise ContractError(f"--tokens names {len(lengths)} lengths; expected 1 to {MOST_LENGTHS}")
    for length in lengths:
        within(length, "--tokens", 1, MAX_TOKENS)
    if lengths[0] < cut.segment:
        raise ContractError(
            f"--tokens holds {lengths[0]}, less than a segment of {cut.segment} tokens, which a text fills at least once "
            "here. Give longer texts, or a smaller --segment"
        )
    return tuple(lengths)


def _counting(name: str, cut: Cut) -> Counting:
    if name not in COUNTINGS:
        raise ContractError(f"--count is {name!r:.60}; expected one of {', '.join(COUNTINGS)}")
    counting = COUNTINGS[name]
    if counting.causal and cut.form != FORMS[0]:
        raise ContractError(f"--count {name} is for decoders; an encoder computes all of its scores. Use --count paper")
    return counting


def _make_folder(path: Path) -> None:
    """Makes the folder, and says what cannot be written into it, before anything is computed. Errors: FormatError."""
    try:
        if path.exists() and not path.is_dir():
            raise FormatError(f"--out is {path}, a file; expected a folder, which is made where it is missing")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(path, err) from err
    check_folder(path, "the report goes")
    for name in FILES:
        check_target(path / name)


def main() -> None:
    """Console entry point."""
    run_command("rmt-flops", app)
