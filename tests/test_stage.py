"""Folders beside a bundle: those of ended runs go with the next one that writes it, nobody else's do."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from models import example_bundle

from rmt_trt import stage
from rmt_trt.bundle import Bundle, Manifest, new_bundle, write_manifest
from rmt_trt.commands import calibrate
from rmt_trt.stage import stage_folder

KERNEL, OTHER = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9", "f9e8d7c6-b5a4-9382-7160-5f4e3d2c1b0a"

AT_WORK = """
import sys
from pathlib import Path
from rmt_trt import stage
stage.BOOT = Path(sys.argv[2])
with stage.stage_folder(Path(sys.argv[1])) as folder:
    (folder / "graphs").mkdir()
    (folder / "graphs" / "half.onnx").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def boot(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that names the kernel, on any system."""
    path = tmp_path_factory.mktemp("proc") / "boot_id"
    path.write_text(KERNEL + "\n")
    monkeypatch.setattr(stage, "BOOT", path)
    return path


@contextmanager
def at_work(path: Path, boot: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that makes something ready for `path`, and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK, str(path), str(boot)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process:
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def killed(path: Path, boot: Path) -> Path:
    """The folder of a process that was killed."""
    with at_work(path, boot) as (process, folder):
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert (folder / "graphs" / "half.onnx").is_file()
    return folder


def left_behind(path: Path) -> Path:
    """A folder as such a process leaves it."""
    folder = path.with_name(f".{path.name}.{KERNEL[:13]}.abcdefgh.tmp")
    (folder / "graphs").mkdir(parents=True)
    (folder / "graphs" / "half.onnx").write_text("half")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_has_is_not(
    tmp_path: Path, boot: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.rmt"
    with at_work(path, boot) as (process, alive):
        dead, another = killed(path, boot), killed(tmp_path / "model.rmt.rmt", boot)
        with caplog.at_level(logging.WARNING, "rmt_trt"), stage_folder(path) as mine:
            assert names(tmp_path) == {mine.name, alive.name, another.name}
            assert (alive / "graphs" / "half.onnx").read_text() == "half"
        assert caplog.messages == [f"removed {str(dead)!r}, which a run that was ended had left behind"]
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
    assert names(tmp_path) == {another.name}


def test_a_run_in_the_same_process_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with stage_folder(tmp_path / "model.rmt") as first, stage_folder(tmp_path / "model.rmt") as second:
        assert names(tmp_path) == {first.name, second.name}
    assert names(tmp_path) == set()
    assert not caplog.messages


def write_anew(path: Path) -> None:
    source = Bundle(example_bundle())
    with new_bundle(path, overwrite=True) as folder:
        shutil.copytree(source.path, folder, dirs_exist_ok=True)
        write_manifest(folder, Manifest(source.spec, source.manifest.graphs[:1], {}, {"made": "new"}))


def add_a_graph(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rmt-calibrate", str(path), "--dtype", "int8-dynamic", "--check", "0"])
        with pytest.raises(SystemExit) as ended:
            calibrate.main()
    assert not ended.value.code


@pytest.mark.parametrize("write", [write_anew, add_a_graph])
@pytest.mark.parametrize("through_a_link", [False, True])
def test_whoever_writes_a_bundle_clears_what_was_left_beside_it(
    tmp_path: Path, through_a_link: bool, write: Any
) -> None:
    path = Path(shutil.copytree(example_bundle(), tmp_path / "model.rmt"))
    left_behind(path)
    if through_a_link:
        (tmp_path / "links").mkdir()
        path = tmp_path / "links" / "link.rmt"
        path.symlink_to(tmp_path / "model.rmt")
    write(path)
    assert names(tmp_path) - {"links"} == {"model.rmt"}
    Bundle(path)


@pytest.mark.parametrize(
    "name",
    [
        f".model.rmt.{OTHER[:13]}.abcdefgh.tmp",  # another machine's, whose lock is not seen here
        ".model.rmt.abcdefgh.tmp",  # one without a lock
        f".model.rmt.{KERNEL[:13]}.abcdefgh.old",  # a bundle on its way out
        f".model.rmt.{KERNEL[:13]}.notes.tmp",
    ],
)
def test_a_folder_of_which_nothing_is_known_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with stage_folder(tmp_path / "model.rmt"):
        pass
    assert names(tmp_path) == {name}


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_only_has_the_name_of_such_a_folder_stays(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("keep")
    name = tmp_path / f".model.rmt.{KERNEL[:13]}.abcdefgh.tmp"
    name.write_text("keep") if kind == "file" else name.symlink_to(tmp_path / "mine")
    with stage_folder(tmp_path / "model.rmt"):
        pass
    assert (tmp_path / "mine" / "precious").read_text() == "keep"
    assert os.path.lexists(name)


@pytest.mark.parametrize("removed", [False, True], ids=["locked", "removed"])
def test_a_new_folder_that_another_process_is_about_to_remove_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    """Between making the folder and locking it, the other process found it without a lock."""
    make, held = Path.mkdir, []

    def seen(path: Path, mode: int = 0o777) -> None:
        make(path, mode)
        if not held:
            held.append(os.open(path, os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX)
            if removed:
                path.rmdir()

    monkeypatch.setattr(Path, "mkdir", seen)
    with stage_folder(tmp_path / "model.rmt") as folder:
        assert KERNEL[:13] not in folder.name
        with stage_folder(tmp_path / "model.rmt"):
            assert folder.is_dir()
    os.close(held[0])
    assert names(tmp_path) == set()


def test_a_new_folder_that_another_process_removes_while_it_is_opened_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        for folder in tmp_path.iterdir():
            folder.rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with stage_folder(tmp_path / "model.rmt") as folder:
        assert folder.is_dir()
    assert names(tmp_path) == set()


def test_a_folder_that_becomes_the_bundle_while_it_is_looked_at_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = left_behind(tmp_path / "model.rmt")
    lock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        if name.exists():
            name.rename(tmp_path / "model.rmt")
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with stage_folder(tmp_path / "model.rmt"):
        pass
    assert (tmp_path / "model.rmt" / "graphs" / "half.onnx").is_file()
    assert names(tmp_path) == {"model.rmt"}
    assert not caplog.messages


@pytest.mark.parametrize("lacks", ["locks", "a name of the kernel", "a sensible name"])
def test_where_locks_tell_nothing_a_run_goes_on_and_removes_nothing(
    tmp_path: Path, boot: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    dead = left_behind(tmp_path / "model.rmt")

    def none(*_: Any) -> None:
        raise OSError(9, "Bad file descriptor")

    if lacks == "locks":
        monkeypatch.setattr(fcntl, "flock", none)
    elif lacks == "a sensible name":
        boot.write_text("../..")
    else:
        boot.unlink()
    with stage_folder(tmp_path / "model.rmt") as folder:
        assert names(tmp_path) == {dead.name, folder.name}
        assert KERNEL[:13] not in folder.name
    assert names(tmp_path) == {dead.name}


@pytest.mark.parametrize("length", [227, 228, 255])
def test_a_name_of_any_length_has_room_for_the_folder_beside_it(
    length: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ("\u00e4" * 10 + "x" * (length - 20))
    path.touch()
    with stage_folder(path) as folder:
        left = folder.with_name(folder.name.replace(folder.name[-12:-4], "00000000"))
        left.mkdir()
    with stage_folder(path):
        assert not left.exists()
    assert len(caplog.messages) == 1


def test_folders_in_folders_without_end_stop_nobody(tmp_path: Path) -> None:
    dead = left_behind(tmp_path / "model.rmt")
    here = os.open(dead, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    with stage_folder(tmp_path / "model.rmt"):
        pass
    subprocess.run(["rm", "-rf", str(dead)], check=True)  # pytest's own clean-up fails on it too


def test_the_log_shows_an_odd_name_as_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left_behind(tmp_path / "e\x1b[31m\nx.rmt")
    with stage_folder(tmp_path / "e\x1b[31m\nx.rmt"):
        pass
    (line,) = caplog.messages
    assert "e\\x1b[31m\\nx.rmt" in line
    assert line.isprintable()


@pytest.mark.parametrize("where", ["mkdir", "flock"])
def test_an_interrupt_while_the_folder_is_made_leaves_none(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = {"mkdir": Path, "flock": fcntl}[where]
    plain = getattr(owner, where)

    def interrupted(*arguments: Any) -> None:
        plain(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt), stage_folder(tmp_path / "model.rmt"):
        pass
    assert names(tmp_path) == set()
