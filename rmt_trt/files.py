"""Writing that leaves nothing half, and reading that believes no size: used for every file that rmt-trt owns."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.stage import stage_folder

_NUMBERS = itertools.count()


def checked_path(path: object) -> Path:
    """A path out of what a caller passes. Errors: ContractError, for anything that is none."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise ContractError(f"the path is {path!r}; expected the path of a file or folder as text or pathlib.Path")
    return Path(path)


def check_target(path: Path) -> None:
    """Says before the work what would stop a file from being written behind it. Errors: FormatError."""
    try:
        if path.exists() and not path.is_file():
            raise FormatError(f"{path} is no regular file; it is not replaced. Choose another name")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise FormatError(
                f"cannot write {path}: {path.parent} is no folder that can be written. Choose another place"
            )
    except OSError as err:
        raise cannot_write(path, err) from err


def check_folder(path: Path, purpose: str) -> None:
    """Says before the work that nothing can be written into a folder. Errors: FormatError."""
    if not os.access(path, os.W_OK | os.X_OK):
        raise FormatError(
            f"{path} cannot be written, where {purpose}. Give yourself the right to, or copy it elsewhere"
        )


@contextlib.contextmanager
def sole_user(folder: Path, command: str) -> Iterator[None]:
    """Keeps a second process of the same kind out of a folder while this one writes there file by file.

    The lock lies on the folder itself: it leaves no file, and goes with the process. Where a file system has no such locks
    nothing is kept out. Errors: FormatError, at once, when another process is in it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            if not _locked(descriptor):
                raise FormatError(
                    f"another {command} is at work in {folder}. Wait until it ends, or choose another folder"
                )
        yield


def _locked(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # a system that has none
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is synced and renamed to `path`, else removed.

    Errors: FormatError, when the folder cannot be written, the disk is full or `path` is a device, a pipe or a folder.
    A KeyboardInterrupt passes through; what `path` held before is untouched.
    """
    check_target(path)
    path = path.resolve() if path.is_symlink() else path
    # One file may be written while another version of it waits for its turn: see `bundle.add_files`.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.{next(_NUMBERS)}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as err:
        raise cannot_write(path, err) from err
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes `path`'s place, else it is removed.

    Errors: FormatError, when `path` exists and `overwrite` is not set, or when writing fails.
    """
    if not path.parent.is_dir():
        raise FormatError(f"cannot write {path}: {path.parent} is no folder. Create it first, or choose another place")
    if os.path.lexists(path) and not overwrite:
        raise FormatError(f"{path} exists already. Choose another name (-o), or replace it with --overwrite")
    path = path.resolve() if path.is_symlink() else path
    try:
        with stage_folder(path) as temporary:
            yield temporary
            temporary.chmod(0o755)
            for name in temporary.rglob("*"):
                sync(name)
            if path.exists():
                retired = temporary.with_suffix(".old")
                try:
                    os.rename(path, retired)
                    os.rename(temporary, path)
                except BaseException:  # Ctrl-C too: what was there is put back
                    if not os.path.lexists(path):
                        os.rename(retired, path)
                    raise
                shutil.rmtree(retired, ignore_errors=True)
            else:
                os.rename(temporary, path)
            sync_folder(path.parent)
    except OSError as err:
        raise cannot_write(path, err) from err


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole file atomically. Errors: FormatError, as `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def read_bounded(path: Path, limit: int, what: str) -> bytes:
    """Reads a regular file of at most `limit` bytes. Errors: FormatError, naming the file and `what` it should be."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise FormatError(f"{path} is not a regular file; expected {what}")
        if size > limit:
            raise FormatError(f"{path} has {size} bytes; {what} has at most {limit}. It is not read")
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as err:
        raise FormatError(f"{path} cannot be read ({err.strerror}); expected {what}") from err


def read_json(path: Path, limit: int, what: str) -> Any:
    """Reads a JSON file of at most `limit` bytes. Errors: FormatError."""
    data = read_bounded(path, limit, what)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as err:
        raise FormatError(f"{path} is not valid JSON ({err}); expected {what}") from err


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flushes a folder's list of names, where the file system can."""
    with contextlib.suppress(OSError):
        sync(path)


def cannot_write(path: Path, err: OSError) -> FormatError:
    """The error of a file or folder that was not written, and not left half either."""
    return FormatError(
        f"cannot write {path}: {err.strerror or err}. Nothing was left behind; free some space or choose another place"
    )
