"""The runnable blocks of a Markdown document: ```python blocks, and `$ rmt-...` lines of ```console blocks.

A block that cannot be run has `<!-- not run: reason -->` on a line before it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```([\w-]*)[^`]*$")
NOT_RUN = re.compile(r"^<!--\s*not run\b:?\s*(.*?)\s*-->$")


@dataclass(frozen=True)
class Block:
    """A fenced block: the number of its first line of text, its language, and why it is not run, if it is not."""

    line: int
    language: str
    text: str
    not_run: str | None = None

    @property
    def commands(self) -> list[str]:
        """The `$ rmt-...` command lines, with the lines that a backslash continues."""
        joined = re.sub(r"\\\n", " ", self.text)
        return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ rmt-")]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text. Errors: ValueError for a mark without a reason or an open fence."""
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    body: list[str] = []
    mark: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if opened is not None:
            if fence is None:
                body.append(line)
                continue
            found.append(Block(opened[0] + 1, opened[1], "\n".join(body), mark))
            opened, body, mark = None, [], None
        elif fence is not None:
            opened = (number, fence[1])
        elif (not_run := NOT_RUN.match(line)) is not None:
            mark = not_run[1]
            if not mark:
                raise ValueError(f"line {number}: a mark 'not run' needs its reason: <!-- not run: reason -->")
        elif line.strip():
            mark = None
    if opened is not None:
        raise ValueError(f"line {opened[0]}: the fence is never closed")
    return found


def first_command(text: str) -> str | None:
    """The command that a document begins with, if it begins with one."""
    for block in blocks(text):
        if block.not_run is None and block.language == "python":
            return None
        if block.not_run is None and block.language == "console" and block.commands:
            return block.commands[0]
    return None


def script_of(text: str, name: str, begun: bool = False) -> str:
    """A Python program that runs a document's blocks in order; Python blocks share one namespace, as in a session.

    begun  the document's first command is left out: it has been run
    """
    steps: list[str] = []
    for block in blocks(text):
        if block.not_run is not None:
            continue
        if block.language == "python":
            padded = "\n" * (block.line - 1) + block.text  # so that a traceback tells the document's own line
            steps.append(f"exec(compile({padded!r}, {name!r}, 'exec'), namespace)")
        elif block.language == "console":
            steps += [f"subprocess.run({command!r}, shell=True, check=True)" for command in block.commands]
    return "\n".join(["import subprocess", "namespace = {'__name__': '__main__'}", *steps[begun:]]) + "\n"


def run_program(program: str, folder: Path, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in `folder`, with the console commands of that Python first on the path."""
    scripts = sysconfig.get_path("scripts") if python == sys.executable else str(Path(python).parent)
    env = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    env.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(python), "-"], input=program, cwd=folder, env=env, text=True, capture_output=True, timeout=900, check=False
    )
