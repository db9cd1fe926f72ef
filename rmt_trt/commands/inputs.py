"""What rmt-run reads: an array of ids, a text, or ids and text from standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from rmt_trt.errors import FormatError, TokenError

STDIN = Path("-")
BLOCK = 1 << 20  # characters of a text of ids that are parsed at a time
LONGEST_NUMBER = 32  # digits after which a text of ids is no such thing


def read_input(path: Path, ids: bool, skip: int) -> Any:
    """Tokens or text for `RMTRuntime`, from the token `skip` on.

    .npy     an integer array, memory-mapped: constant memory; 2-D is a batch
    ids      a text of whole numbers between spaces or line ends, read as it comes: constant memory
    others   UTF-8 text, for a model with a tokenizer; it is tokenised as a whole

    Errors: FormatError or TokenError, naming the file.
    """
    if path != STDIN and path.suffix == ".npy":
        array = _open_array(path)
        if skip and array.ndim != 1:
            raise TokenError(f"--skip goes with one document; {path} holds an array of shape {array.shape}")
        return array[skip:] if skip else array
    if ids:
        return _skipped(_ids(path), skip)
    if skip:
        raise TokenError("--skip counts tokens, so it goes with token ids (.npy, or --ids), not with text")
    try:
        text = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        return text.decode("utf-8")
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise FormatError(
            f"{_name(path)} is not UTF-8 text ({err.reason} at byte {err.start}). Give text, an .npy array, or ids with --ids"
        ) from err


def _open_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror}; expected an .npy array of token ids") from err
    except (ValueError, EOFError) as err:
        # numpy's own words advise to unpickle what is no array.
        reason = "it holds Python objects, or is no .npy file" if "pickle" in str(err) else err
        raise FormatError(f"{path} is no readable .npy array of numbers ({reason}). Write it with numpy.save") from err
    if not isinstance(array, np.ndarray):
        raise FormatError(f"{path} is an .npz archive or another file; expected one array of token ids")
    return array


def _ids(path: Path) -> Iterator[np.ndarray]:
    try:
        if path == STDIN:
            yield from _parse(sys.stdin, path)
            return
        with path.open(encoding="ascii") as file:
            yield from _parse(file, path)
    except UnicodeDecodeError as err:
        raise FormatError(f"{_name(path)} is not a text of token ids ({err.reason} at byte {err.start})") from err
    except OSError as err:
        raise FormatError(f"{_name(path)} cannot be read: {err.strerror}") from err


def _parse(file: IO[str], path: Path) -> Iterator[np.ndarray]:
    rest = ""
    while block := file.read(BLOCK):
        block = rest + block
        cut = len(block) if block[-1].isspace() else max(block.rfind(" "), block.rfind("\n"), block.rfind("\t")) + 1
        rest = block[cut:]
        if len(rest) > LONGEST_NUMBER:
            raise FormatError(f"{_name(path)}: {rest[:20]!r}... is no token id; expected whole numbers between spaces")
        yield _numbers(block[:cut], path)
    yield _numbers(rest, path)


def _numbers(text: str, path: Path) -> np.ndarray:
    words = text.split()
    try:
        return np.array(list(map(int, words)), np.int64)
    except (ValueError, OverflowError) as err:
        raise FormatError(
            f"{_name(path)}: {err}; expected whole numbers between spaces. For text, leave out --ids"
        ) from err


def _skipped(pieces: Iterator[np.ndarray], skip: int) -> Iterator[np.ndarray]:
    for piece in pieces:
        passed = min(skip, len(piece))
        skip -= passed
        yield piece[passed:]


def _name(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)
