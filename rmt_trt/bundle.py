"""The bundle `NAME.rmt/`: what travels from the training side to the serving side. `docs/bundle.md` describes it.

`manifest.json` names every other file with size and SHA-256; files that it does not name are ignored. A new bundle
is written in a temporary folder and renamed. An addition writes its files, syncs them, then replaces the manifest last,
under a lock. Loading trusts nothing: sizes before reading, hashes before use, paths inside the folder, no pickle.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from rmt_trt import initial_state
from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.files import (
    atomic_file,
    atomic_folder,
    cannot_write,
    check_folder,
    checked_path,
    read_bounded,
    read_json,
    sha256,
    sync,
    write_file,
)
from rmt_trt.manifest import (
    FILE_LIMIT,
    FORMAT,
    GRAPHS,
    INITIAL,
    LOCK,
    MANIFEST,
    MANIFEST_LIMIT,
    REPORT,
    ROLES,
    STEP,
    TOKENIZER,
    FileEntry,
    GraphEntry,
    Manifest,
    check_uses,
    made_by,
    safe_name,
)

__all__ = [
    "FILE_LIMIT", "GRAPHS", "INITIAL", "LOCK", "MANIFEST", "REPORT", "ROLES", "STEP", "TOKENIZER",
    "Bundle", "FileEntry", "GraphEntry", "Manifest", "add_file", "add_files", "check_writable", "made_by", "new_bundle",
    "write_manifest",
]  # fmt: skip

TOKENIZER_LIMIT = 256 << 20
LOCK_SECONDS = 60
TEMPORARY = re.compile(r"\..+\.(\d{1,10})\.\d+\.\d+\.tmp")  # of `files.atomic_file`, with its process


class Bundle:
    """A bundle on disk, opened for reading. Each file is checked once, when it is first used.

    Errors, of every method: FormatError, when a file is missing, altered, too large or outside the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = checked_path(path)
        if not self.path.is_dir():
            raise FormatError(f"{self.path} is no folder; expected a bundle written by rmt-export")
        where = self.path / MANIFEST
        if where.is_symlink():
            raise FormatError(f"{where} is a link, and a bundle holds its own files. Copy the whole folder again")
        self.manifest = Manifest.from_json(read_json(where, MANIFEST_LIMIT, "a bundle's manifest"), where)
        self._checked: set[str] = set()

    @property
    def spec(self) -> StepSpec:
        return self.manifest.spec

    def file(self, name: str) -> Path:
        """Path of a file whose size and hash are those of the manifest."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise FormatError(f"{self.path} has no file {name!r} in its manifest; it has {sorted(self.manifest.files)}")
        path = self.path / name
        if name not in self._checked:
            if not path.resolve().is_relative_to(self.path.resolve()) or path.is_symlink() or not path.is_file():
                raise FormatError(
                    f"{path} is missing, or no regular file inside the bundle. Copy the whole folder again"
                )
            size = path.stat().st_size
            if size != entry.size:
                raise FormatError(
                    f"{path} has {size} bytes; the manifest says {entry.size}. It was cut or altered: copy the bundle again"
                )
            if sha256(path) != entry.sha256:
                raise FormatError(f"{path} is not the file that was exported (SHA-256 differs). Copy the bundle again")
            self._checked.add(name)
        return path

    def graph(
        self, engine: str, dtype: str = "fp32", head: str = "all", role: str = "step", needs: tuple[str, ...] = ()
    ) -> GraphEntry | None:
        """The entry of the graph made for this use that needs just this, or None."""
        wanted = (role, engine, dtype, head, needs)
        return next((g for g in self.manifest.graphs if (g.role, g.engine, g.dtype, g.head, g.needs) == wanted), None)

    def graph_path(self, entry: GraphEntry) -> Path:
        """Path of a graph whose external data files are checked too."""
        for name in entry.data:
            self.file(name)
        return self.file(entry.file)

    def initial(self) -> tuple[np.ndarray, ...]:
        """The initial states in the spec's order, each (*shape)."""
        limit = initial_state.size_limit(self.spec)
        data = read_bounded(self.file(INITIAL), limit, "the initial state")
        return initial_state.from_bytes(data, self.spec, str(self.path / INITIAL))

    def tokenizer(self) -> str | None:
        """The text of tokenizer.json, or None."""
        if TOKENIZER not in self.manifest.files:
            return None
        data = read_bounded(self.file(TOKENIZER), TOKENIZER_LIMIT, "a tokenizer")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as err:
            raise FormatError(f"{self.path / TOKENIZER} is not UTF-8 text ({err})") from err

    def report(self) -> dict[str, Any]:
        """The verification report that was written at export."""
        report = read_json(self.file(REPORT), MANIFEST_LIMIT, "a verification report")
        if not isinstance(report, dict):
            raise FormatError(f"{self.path / REPORT} is {type(report).__name__}; expected a JSON object")
        return report


@contextlib.contextmanager
def new_bundle(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; `write_manifest` comes last. It becomes `path` on success and vanishes otherwise.

    Errors: FormatError, when `path` exists and `overwrite` is not set, or it is no bundle: nothing else is replaced.
    """
    if overwrite and os.path.lexists(path) and not _is_bundle(path):
        raise FormatError(f"{path} exists and is not a bundle; it is not replaced. Choose another name (-o)")
    with contextlib.ExitStack() as held, atomic_folder(path, overwrite) as folder:
        yield folder
        if not (folder / MANIFEST).is_file():
            raise ContractError(f"no manifest was written for {path}")
        if path.is_dir():  # nobody may be adding to the bundle that goes
            held.enter_context(_locked(path))


def _is_bundle(path: Path) -> bool:
    """Whether a folder's manifest is a bundle's, of any format version: other programs write a manifest.json too."""
    try:
        manifest = read_json(path / MANIFEST, MANIFEST_LIMIT, "a bundle's manifest")
    except FormatError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Measures every file in the folder and writes the manifest, which names them all."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {name: FileEntry((folder / name).stat().st_size, sha256(folder / name)) for name in names}
    write_file(folder / MANIFEST, _encoded(replace(manifest, files=files), folder))


def _encoded(manifest: Manifest, folder: Path) -> bytes:
    """Errors: FormatError, for one that no reader would take: what it records may have come from a stranger's file."""
    data = manifest.to_json().encode()
    if len(data) > MANIFEST_LIMIT:
        raise FormatError(
            f"the manifest of {folder} would have {len(data):,} bytes, and one has at most {MANIFEST_LIMIT:,}: what is to be "
            f"recorded in it is too long. Nothing was written; look at the files that it is taken from"
        )
    return data


def add_file(path: Path, name: str, source: Path, graph: GraphEntry | None = None, **changes: Any) -> Bundle:
    """Adds one file, copied from `source`, and maybe lists it as a graph: `add_files` for the least of cases."""
    return add_files(path, {name: source}, (graph,) if graph else (), **changes)


def add_files(
    path: Path,
    files: Mapping[str, Path],
    graphs: Sequence[GraphEntry] = (),
    drop: Callable[[GraphEntry], bool] = lambda graph: False,
    fingerprint: str | None = None,
    **changes: Any,
) -> Bundle:
    """Adds files and graphs to an existing bundle as one change, under a lock.

    files    name inside the bundle -> the file that is copied there; one that the bundle has is replaced, and the
             graphs that read it are no longer listed
    graphs   what is listed in addition
    drop     says of a listed graph that it goes; so do its files, where no other graph reads them
    fingerprint  of the model that they are for: a bundle that was replaced by another model's meanwhile refuses them
    changes  fields of the manifest; a function is given the field's old value and returns the new one

    New files and the new manifest are written whole before anything is changed, so a full disk leaves the bundle as it
    was. Then the manifest forgets what is replaced or dropped, the files take their places, and the manifest that names
    them comes last: a run that dies leaves a bundle that can be read. Errors: FormatError.
    """
    for name, source in files.items():
        safe_name(name, path)
        if not path.is_dir() or not source.is_file():
            raise FormatError(f"cannot add {source} to {path}: expected a file and a bundle. Check both paths")
    if not path.is_dir():
        raise FormatError(f"{path} is no folder; expected a bundle written by rmt-export")
    forgotten = False
    try:
        with _locked(path):
            old = Bundle(path).manifest
            if fingerprint is not None and old.spec.fingerprint != fingerprint:
                raise FormatError(
                    f"{path} was replaced by another model's bundle meanwhile; nothing was added. Do it again"
                )
            kept = _without(old, files, drop, path)
            _clear(path)
            # Each file is renamed to its place when the stack is left, the one that was entered first comes last.
            with contextlib.ExitStack() as places:
                last = places.enter_context(atomic_file(path / MANIFEST))
                added = {name: _place(path, name, source, places) for name, source in files.items()}
                values = {name: new(getattr(kept, name)) if callable(new) else new for name, new in changes.items()}
                manifest = replace(kept, files={**kept.files, **added}, graphs=(*kept.graphs, *graphs), **values)
                check_uses(manifest.graphs, path)
                last.write_bytes(_encoded(manifest, path))
                sync(last)
                if kept != old:
                    # A run that dies in between must not leave a file that its manifest contradicts.
                    write_file(path / MANIFEST, kept.to_json().encode())
                    forgotten = True
            _remove(path, set(old.files) - set(manifest.files))
    except (OSError, FormatError) as err:
        if isinstance(err, FormatError) and not forgotten:
            raise
        what = f"{len(files)} files" if len(files) > 1 else ", ".join(files) or MANIFEST
        left = "It lacks what was to be replaced: do it again" if forgotten else "The bundle is what it was"
        raise FormatError(f"cannot add {what} to {path}: {getattr(err, 'strerror', None) or err}. {left}") from err
    return Bundle(path)


def check_writable(path: Path) -> None:
    """Says before the work that nothing can be added to a bundle. Errors: FormatError."""
    for folder in (path, path / GRAPHS):
        if folder.exists():
            check_folder(folder, "the graph would be added")
    check_folder(path.resolve().parent, "the graph is kept beside the bundle until it is verified")


def _clear(path: Path) -> None:
    """Removes the files beside their places that writers which were killed left there, while the lock is held."""
    for folder in (path, path / GRAPHS):
        for name in os.listdir(folder) if folder.is_dir() and not folder.is_symlink() else ():
            left = TEMPORARY.fullmatch(name)
            if left and not _alive(int(left[1])):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other writers off a bundle. Errors: FormatError, when one does not finish in a minute."""
    lock = filelock.FileLock(path / LOCK)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout as err:
        raise FormatError(f"{path} is being written by another process; try again when it is done") from err
    except OSError as err:
        raise FormatError(
            f"{path / LOCK} cannot be locked: {err.strerror or err}. The bundle is what it was; make its folder writable, "
            f"and the lock a regular file"
        ) from err
    try:
        yield
    finally:
        lock.release()


def _without(old: Manifest, names: Collection[str], drop: Callable[[GraphEntry], bool], where: Path) -> Manifest:
    """The manifest without files that are replaced, the graphs that read them, and the graphs that are dropped."""
    dropped = [graph for graph in old.graphs if drop(graph)]
    graphs = tuple(g for g in old.graphs if g not in dropped and not any(name in names for name in (g.file, *g.data)))
    used = {INITIAL, STEP, *(name for graph in graphs for name in (graph.file, *graph.data))}
    gone = {name for graph in dropped for name in (graph.file, *graph.data)} - used
    needed = [name for name in names if name in (INITIAL, STEP)]
    if needed or not any(graph.role == "step" for graph in graphs):
        what = needed[0] if needed else "its graphs of role 'step'"
        raise FormatError(f"{where} cannot do without {what}, so it is not replaced there. Export the model again")
    files = {name: entry for name, entry in old.files.items() if name not in names and name not in gone}
    return replace(old, files=files, graphs=graphs)


def _place(path: Path, name: str, source: Path, places: contextlib.ExitStack) -> FileEntry:
    """Copies a file beside its place; leaving `places` renames it there."""
    target = path / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(target, err) from err
    if not target.parent.resolve().is_relative_to(path.resolve()) or target.is_symlink():
        raise FormatError(f"{target} leads out of the bundle through a link; nothing is written there. Remove the link")
    temporary = places.enter_context(atomic_file(target))
    with source.open("rb") as reader, temporary.open("wb") as writer:
        while block := reader.read(1 << 20):
            writer.write(block)
    sync(temporary)
    return FileEntry(temporary.stat().st_size, sha256(temporary))


def _remove(path: Path, names: Collection[str]) -> None:
    """Removes files that no manifest names any more; one that stays behind is ignored by every reader."""
    for name in names:
        with contextlib.suppress(OSError):
            if (path / name).parent.resolve().is_relative_to(path.resolve()):
                (path / name).unlink()
