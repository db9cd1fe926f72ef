"""The folder beside a bundle in which what is to become the bundle, or a part of it, is made ready.

Its owner holds a lock on it, which ends with the process however that ends: so the next writer of the same bundle can
tell a folder that is at work from one that was left behind, and removes the latter. Locks are seen within one running
kernel alone, so a folder bears the kernel's name: what another machine works at is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")
SUFFIX = ".tmp"
LONGEST = 255  # bytes of a name that every file system takes

log = logging.getLogger("rmt_trt")


@contextlib.contextmanager
def stage_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, removed in the end unless it was renamed. Those that ended processes left there for the
    same path are removed first. Errors: OSError, when none can be made."""
    path = path.resolve()
    mark = _mark(path)
    if mark is not None:
        _clear(path.parent, mark)
    with contextlib.ExitStack() as stack:
        yield _made(path, mark, stack)


def _mark(path: Path) -> str | None:
    """How the names begin of folders for this path whose locks can be seen here; None where that is not known."""
    try:
        boot = BOOT.read_text().strip()
    except OSError:
        return None
    return f".{_short(path.name)}.{boot[:13]}." if re.fullmatch("[0-9a-f-]{36}", boot) else None


def _short(name: str) -> str:
    """The name, or a hash of it where a longer one would not fit."""
    room = LONGEST - len(f"..{'b' * 13}.{'x' * 8}{SUFFIX}")
    return name if len(os.fsencode(name)) <= room else hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _made(path: Path, mark: str | None, stack: contextlib.ExitStack) -> Path:
    """A new folder, whose lock is held until it is gone. One without a lock is without the mark too: nobody removes it."""
    if mark is not None:
        locks: list[int] = []
        stack.callback(_close, locks)
        folder = _new(path.parent, mark, stack)
        if (lock := _locked(folder)) is not None:
            locks.append(lock)
            return folder
        with contextlib.suppress(OSError):  # it may be gone: another process took it for one left behind
            folder.rmdir()
    return _new(path.parent, f".{_short(path.name)}.", stack)


def _close(locks: list[int]) -> None:
    for lock in locks:
        os.close(lock)


def _new(parent: Path, start: str, stack: contextlib.ExitStack) -> Path:
    """A new folder that goes with the stack: from before it is made, since Ctrl-C may come at any moment."""
    folder = parent / f"{start}{secrets.token_hex(4)}{SUFFIX}"
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    try:
        folder.mkdir(0o700)
    except FileExistsError:
        stack.pop_all()  # somebody else's
        raise
    return folder


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where somebody has it, it is gone, or there are no locks."""
    try:
        import fcntl
    except ImportError:  # a system that has none
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking it may have been renamed, or removed by whoever had the lock.
        if os.path.samestat(os.fstat(descriptor), folder.lstat()):
            return descriptor
    os.close(descriptor)
    return None


def _clear(parent: Path, mark: str) -> None:
    """Removes this user's folders of that mark that nobody holds, and says so in the log."""
    named = re.compile(re.escape(mark) + "[a-z0-9_]{8}" + re.escape(SUFFIX))
    try:
        found = [parent / name for name in os.listdir(parent) if named.fullmatch(name)]
    except OSError:
        return
    for folder in found:
        lock = _locked(folder)
        if lock is None:
            continue
        # The lock is held until nothing is left: whoever has just made the folder sees that it is taken.
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                with contextlib.suppress(RecursionError):  # of folders in folders that no run of ours makes
                    shutil.rmtree(folder, ignore_errors=True)
                if not folder.exists():
                    log.warning("removed %r, which a run that was ended had left behind", str(folder))
        finally:
            os.close(lock)
