"""What the console commands share: how they start, how they fail, and how they show progress."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

import rmt_trt
from rmt_trt.errors import RMTError

# A stranger's file may hold a value of megabytes, and messages tell what came.
MESSAGE_LIMIT = 4000


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"rmt-trt {rmt_trt.__version__}")
        raise typer.Exit


# Both are options of every command. `run_command` itself looks for --debug, before anything is parsed.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and log more.")]
Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
]


def new_app() -> typer.Typer:
    """A typer application of the one form that every command has."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def run_command(name: str, app: typer.Typer) -> None:
    """Runs a command: exit 0; 1 after one line on standard error; 2 for usage; 130 when it was interrupted."""
    debug = "--debug" in sys.argv
    # Set before transformers is imported: it comments on configs it did not write, and must not look for a network.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if debug else "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s")
    try:
        app(prog_name=name)
    except RMTError as err:
        if debug:
            raise
        _fail(name, str(err))
    except BrokenPipeError:  # the reader of our output went away: `rmt-info x | head`
        sys.stderr.close()
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # a second one, while the first was being told
        raise SystemExit(130) from None
    except Exception as err:
        if debug:
            raise
        what = err.strerror if isinstance(err, OSError) and err.strerror else err
        where = f" ({err.filename})" if isinstance(err, OSError) and err.filename else ""
        _fail(name, f"{type(err).__name__}: {what}{where}. --debug shows where it happened")


def _fail(name: str, message: str) -> NoReturn:
    """One line that does not steer the terminal, whatever a library or a stranger's file put into the message."""
    line = printable(" ".join(message[: MESSAGE_LIMIT + 1].splitlines()))
    more = len(message) - MESSAGE_LIMIT
    print(f"{name}: {line[:MESSAGE_LIMIT]}{f' ... and {more} characters more' if more > 0 else ''}", file=sys.stderr)
    raise SystemExit(1) from None


def printable(text: object) -> str:
    """Names and values of a stranger's file must not steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def console() -> Console:
    """Where messages and progress go: standard error, so that standard output holds answers alone.

    Names come from strangers' files: nothing in them is markup.
    """
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def stage_progress(where: Console) -> Progress:
    """A bar per stage of a command's work; nothing is drawn where standard error is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=where,
        disable=not where.is_terminal,
    )
