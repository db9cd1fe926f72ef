"""The command that made a result, as anybody can give it: without the paths of the machine that it ran on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

FOLDERS = {"--out": "bench", "-o": "bench", "--work": "bench-work", "--suite": "suite"}


def shown(arguments: Sequence[str], command: str = "rmt-bench") -> str:
    """One line. An absolute path of a folder that the command makes becomes its default name; of another file, its
    path from the working folder, or its bare name where it lies elsewhere."""
    written, flag = command.split(), ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in FOLDERS:
            written.append(f"{name}={_relative(value, FOLDERS[name])}")
        else:
            written.append(_relative(argument, FOLDERS.get(flag, "")))
        flag = argument
    return shlex.join(written)


def _relative(text: str, folder: str) -> str:
    path = Path(text)
    if not path.is_absolute():
        return text
    return folder or (str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name)
