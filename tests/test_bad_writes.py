"""Writing that fails: a full disk, a dying process, an interrupt, two writers at once. Nothing half is left behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import models
import numpy as np
import pytest
import torch
from torch import nn

from rmt_trt import FormatError, RMTRuntime, StateSpec, StepSpec, bundle, files
from rmt_trt.bundle import (
    LOCK,
    MANIFEST,
    STEP,
    Bundle,
    GraphEntry,
    Manifest,
    add_file,
    add_files,
    new_bundle,
    write_manifest,
)
from rmt_trt.export import ExportOptions, export_step_bundle

DOCUMENT = np.arange(50) % 90 + 5
SPEC = StepSpec(
    form="custom", states=(StateSpec(shape=(2, 4)),), segment_length=8, vocab_size=16, logits="classifier", num_logits=4
)


class Step(nn.Module):
    """The smallest step that there is: the memory takes in the mean of the text's embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.ones(2, 4))
        self.embedding = nn.Embedding(16, 4)

    def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        valid = (segment >= 0)[:, :, None].float()
        text = (self.embedding(segment.clamp(min=0)) * valid).sum(1, keepdim=True)
        some = (valid.sum(1, keepdim=True) > 0).float()
        new = some * torch.tanh(memory + text) + (1 - some) * memory
        return new, new.sum(1)


def export(path: Path, **options: Any) -> None:
    torch.manual_seed(0)
    export_step_bundle(Step(), SPEC, path, options=ExportOptions(segments=2, **options))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle to add to, alone in its folder."""
    path = tmp_path / "work" / "model.rmt"
    shutil.copytree(models.made("bert").bundle, path)
    return path


def runs(path: Path) -> bool:
    with RMTRuntime(path, engine="cpu", threads=1) as runtime:
        return bool(runtime.run(DOCUMENT).segments == 3)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """The operating system itself refuses to write more, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("external", [False, True], ids=["in the graph", "external weights"])
def test_a_full_disk_while_a_graph_is_written_leaves_nothing(tmp_path: Path, external: bool) -> None:
    with no_file_longer_than(200), pytest.raises(FormatError, match=r"cannot write .*File too large\. .*another place"):
        export(tmp_path / "model.rmt", **({"external_data_bytes": 1} if external else {}))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "place", ["rmt_trt.export.bundle.write_manifest", "rmt_trt.initial_state.to_bytes", "os.fsync", "os.rename"]
)
def test_a_full_disk_at_any_stage_of_an_export_leaves_nothing(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place, full_disk)
        with pytest.raises(FormatError, match=r"cannot write .*: No space left on device\. .*free some space"):
            export(tmp_path / "model.rmt")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("place", ["os.fsync", "os.replace", "pathlib.Path.write_bytes"])
def test_a_full_disk_while_a_state_is_saved_keeps_the_old_one(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with models.made("gpt2").open() as runtime:
        state = runtime.run(DOCUMENT).state
        state.save(tmp_path / "a.state")
        before = (tmp_path / "a.state").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(place, full_disk)
            with pytest.raises(FormatError, match=r"cannot write .*a\.state: No space left on device"):
                runtime.run(DOCUMENT, state=state).state.save(tmp_path / "a.state")
        with no_file_longer_than(100), pytest.raises(FormatError, match=r"cannot write .*a\.state: File too large"):
            runtime.run(DOCUMENT, state=state).state.save(tmp_path / "a.state")
    assert names(tmp_path) == {"a.state"}
    assert (tmp_path / "a.state").read_bytes() == before


@pytest.mark.parametrize("kind", ["missing", "file", "unwritable"])
def test_a_target_folder_that_takes_nothing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("a file")
    # Not even root creates files in /proc.
    folder = {"missing": tmp_path / "no" / "such", "file": tmp_path / "file", "unwritable": Path("/proc")}[kind]
    with models.made("gpt2").open() as runtime, pytest.raises(FormatError, match=r"cannot write .*a\.state: "):
        runtime.run(DOCUMENT).state.save(folder / "a.state")
    with pytest.raises(FormatError, match=r"cannot write .*model\.rmt: "):
        export(folder / "model.rmt")
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "link to a device"])
def test_a_device_a_pipe_or_a_folder_is_never_replaced_by_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    else:
        path = Path("/dev/null")
    before = path.lstat().st_mode
    with (
        models.made("gpt2").open() as runtime,
        pytest.raises(FormatError, match="is no regular file; it is not replaced"),
    ):
        runtime.run(DOCUMENT).state.save(path)
    assert path.lstat().st_mode == before
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_link_stays_a_link_to_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    files.write_file(tmp_path / "link.txt", b"new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_an_existing_bundle_is_not_replaced_unasked(small: Path) -> None:
    before = (small / MANIFEST).read_bytes()
    with pytest.raises(
        FormatError, match=r"model\.rmt exists already\. Choose another name \(-o\), or replace it with --over"
    ):
        export(small)
    assert (small / MANIFEST).read_bytes() == before
    assert names(small.parent) == {"model.rmt"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_bundle_is_not_replaced_even_when_asked(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.rmt"
    path.write_text("precious") if kind == "file" else path.mkdir()
    with pytest.raises(FormatError, match=r"model\.rmt exists and is not a bundle; it is not replaced"):
        export(path, overwrite=True)
    assert path.is_file() == (kind == "file")
    assert names(tmp_path) == {"model.rmt"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("call", [0, 1])
def test_an_overwritten_bundle_is_put_back_when_the_exchange_breaks_off(
    small: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], call: int
) -> None:
    rename, calls = os.rename, iter(range(10))

    def break_off(*args: Any) -> None:
        if next(calls) == call:
            raise error(5, "broken off")
        rename(*args)

    old = (small / MANIFEST).read_bytes()
    spec = Bundle(small).manifest
    broken = pytest.raises((KeyboardInterrupt, FormatError), match="broken off")
    with broken, new_bundle(small, overwrite=True) as folder:
        shutil.copytree(small, folder, dirs_exist_ok=True)
        write_manifest(folder, Manifest(spec.spec, spec.graphs, {}, {"made": "new"}))
        monkeypatch.setattr(os, "rename", break_off)
    monkeypatch.undo()
    assert (small / MANIFEST).read_bytes() == old
    assert names(small.parent) == {"model.rmt"}
    assert runs(small)


def test_a_folder_without_a_manifest_never_becomes_a_bundle(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"no manifest was written for .*model\.rmt"),
        new_bundle(tmp_path / "model.rmt"),
    ):
        pass
    assert names(tmp_path) == set()


def test_a_file_that_cannot_be_added_leaves_the_bundle_as_it_was(small: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    (tmp_path / "notes.txt").write_text("x" * 1000)
    with pytest.raises(FormatError, match=r"cannot add .*none\.txt to .*model\.rmt: expected a file and a bundle"):
        add_file(small, "notes.txt", tmp_path / "none.txt")
    with pytest.raises(FormatError, match=r"cannot add .*notes\.txt to .*other\.rmt: expected a file and a bundle"):
        add_file(small.with_name("other.rmt"), "notes.txt", tmp_path / "notes.txt")
    with no_file_longer_than(100), pytest.raises(FormatError, match=r"cannot write .*notes\.txt: File too large"):
        add_file(small, "notes.txt", tmp_path / "notes.txt")
    with pytest.raises(FormatError, match="only relative paths inside the bundle are read"):
        add_file(small, "../notes.txt", tmp_path / "notes.txt")
    with pytest.raises(
        FormatError, match=r"cannot do without step\.onnx, so it is not replaced there\. Export the model"
    ):
        add_file(small, STEP, tmp_path / "notes.txt")
    assert {path.name: path.read_bytes() for path in small.iterdir() if path.name != LOCK} == before
    assert runs(small)


def test_a_bundle_that_another_process_writes_is_waited_for_and_then_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("x")
    monkeypatch.setattr(bundle, "LOCK_SECONDS", 0.05)
    with (
        filelock.FileLock(small / LOCK),
        pytest.raises(FormatError, match="is being written by another process; try again"),
    ):
        add_file(small, "notes.txt", tmp_path / "notes.txt")


ADD_SIX = """
import sys
from pathlib import Path
from rmt_trt.bundle import add_file
for number in range(6):
    add_file(Path(sys.argv[1]), f"notes/{sys.argv[2]}{number}.txt", Path(__file__))
"""


def test_two_processes_that_add_to_one_bundle_both_succeed(small: Path, tmp_path: Path) -> None:
    script = tmp_path / "add.py"
    script.write_text(ADD_SIX)
    writers = [subprocess.Popen([sys.executable, str(script), str(small), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    after = Bundle(small)
    added = {f"notes/{name}{number}.txt" for name in "ab" for number in range(6)}
    assert added <= set(after.manifest.files)
    assert all(after.file(name).read_text() == ADD_SIX for name in added)
    assert runs(small)


# The process dies at the n-th time that a manifest would take its place: by the last the file itself is in place.
ADD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from rmt_trt import bundle
replace, left = os.replace, int(sys.argv[3])
def die(source, target):
    global left
    left -= Path(target).name == bundle.MANIFEST
    os.kill(os.getpid(), signal.SIGKILL) if left == 0 else replace(source, target)
os.replace = die
bundle.add_file(Path(sys.argv[1]), sys.argv[2], Path(__file__), bundle.GraphEntry(sys.argv[2], head="none"))
"""


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["graphs/new.onnx", "graphs/old.onnx"])
def test_a_run_that_is_killed_before_the_manifest_leaves_a_readable_bundle(
    small: Path, tmp_path: Path, name: str, times: int
) -> None:
    add_file(small, "graphs/old.onnx", small / STEP, GraphEntry("graphs/old.onnx", head="last"))
    script = tmp_path / "die.py"
    script.write_text(ADD_AND_DIE)
    done = subprocess.run([sys.executable, str(script), str(small), name, str(times)], check=False)
    replaced_once = name == "graphs/new.onnx" and times == 2  # a new file takes one manifest only
    assert done.returncode == (0 if replaced_once else -signal.SIGKILL)
    after = Bundle(small)
    assert all(after.file(listed).is_file() for listed in after.manifest.files)
    assert {graph.file for graph in after.manifest.graphs} <= set(after.manifest.files)
    assert runs(small)
    with contextlib.suppress(OSError):
        (small / LOCK).unlink()
    left = {path.name for path in small.rglob(".*.tmp")}
    assert bool(left) is not replaced_once
    mine = small / f".manifest.json.{os.getpid()}.1.2.tmp"  # of a process that is at work
    mine.touch()
    add_file(small, name, small / STEP)  # and it can be written again
    assert {path.name for path in small.rglob(".*.tmp")} == {mine.name}
    mine.unlink()
    assert runs(small)


def test_a_replaced_file_takes_the_old_ones_graph_away(small: Path, tmp_path: Path) -> None:
    add_file(small, "graphs/none.onnx", small / STEP, GraphEntry("graphs/none.onnx", head="none"))
    (tmp_path / "new.onnx").write_bytes((small / STEP).read_bytes())
    after = add_file(small, "graphs/none.onnx", tmp_path / "new.onnx", GraphEntry("graphs/none.onnx", head="last"))
    assert [graph.head for graph in after.manifest.graphs] == ["all", "last"]
    assert json.loads((small / MANIFEST).read_text())["graphs"][1]["file"] == "graphs/none.onnx"


@pytest.mark.parametrize("times", range(1, 7))
def test_a_disk_that_fills_up_at_any_write_leaves_the_graphs_that_were_there(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Nothing is written any more once the manifest has forgotten what is replaced: the new one lies ready."""
    add_file(small, "graphs/none.onnx", small / STEP, GraphEntry("graphs/none.onnx", head="none"))
    before = {path.name: path.read_bytes() for path in small.rglob("*") if path.is_file()}
    (tmp_path / "new.onnx").write_bytes(b"another graph")
    real, left = os.fsync, times

    def fills_up(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0 and stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills_up)
        try:
            add_file(small, "graphs/none.onnx", tmp_path / "new.onnx", GraphEntry("graphs/none.onnx", head="last"))
        except FormatError as err:
            assert "No space left on device" in str(err)  # noqa: PT017
            done = "do it again" in str(err)
        else:
            done = True
    if not done:
        assert {path.name: path.read_bytes() for path in small.rglob("*") if path.is_file()} == before
    assert runs(small)
    assert not list(small.rglob("*.tmp"))


def test_two_graphs_for_one_use_are_refused(small: Path) -> None:
    before = (small / MANIFEST).read_bytes()
    message = r"names two graphs, 'step\.onnx' and 'graphs/x\.onnx', for engine 'cpu', fp32, role 'step', head 'all'"
    with pytest.raises(FormatError, match=message):
        add_file(small, "graphs/x.onnx", small / STEP, GraphEntry("graphs/x.onnx"))
    assert (small / MANIFEST).read_bytes() == before
    value = json.loads(before)
    value["graphs"] *= 2
    (small / MANIFEST).write_text(json.dumps(value))
    with pytest.raises(FormatError, match=r"names two graphs, 'step\.onnx' and 'step\.onnx', for engine 'cpu'"):
        Bundle(small)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_lock_that_is_no_regular_file_is_not_written_through(small: Path, tmp_path: Path, kind: str) -> None:
    (small / LOCK).unlink(missing_ok=True)
    (tmp_path / "precious").write_text("keep")
    if kind == "link":
        (small / LOCK).symlink_to(tmp_path / "precious")
    else:
        (small / LOCK).mkdir()
    with pytest.raises(FormatError, match=r"\.lock cannot be locked: .*the lock a regular file"):
        add_file(small, "notes.txt", small / STEP)
    assert (tmp_path / "precious").read_text() == "keep"
    assert "notes.txt" not in names(small)


def test_a_bundle_that_another_one_adds_to_is_not_replaced_meanwhile(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "LOCK_SECONDS", 0.2)
    with filelock.FileLock(small / LOCK), pytest.raises(FormatError, match="being written by another process"):
        export(small, overwrite=True)
    assert runs(small)
    assert names(small.parent) == {"model.rmt"}
    export(small, overwrite=True)
    assert Bundle(small).spec.form == "custom"
    with pytest.raises(FormatError, match="was replaced by another model's bundle meanwhile; nothing was added"):
        add_files(small, {"notes.txt": small / STEP}, fingerprint=models.made("bert").spec.fingerprint)
    assert "notes.txt" not in names(small)
