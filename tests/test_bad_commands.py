"""Commands that are given nonsense: one line on standard error, exit 1 (2 for usage), 130 when interrupted."""

from __future__ import annotations

import fcntl
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest

from rmt_trt import RMTRuntime
from rmt_trt.bundle import MANIFEST
from rmt_trt.commands import export, info, run, verify
from rmt_trt.files import sha256
from rmt_trt.runtime.tokens import FIRST_PIECE

MAIN: dict[str, Callable[[], None]] = {
    "rmt-run": run.main, "rmt-info": info.main, "rmt-export": export.main, "rmt-verify": verify.main,
}  # fmt: skip
HEADER = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"


class Outcome:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process; `stdin` are the bytes on its standard input."""

    def call(name: str, *arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        # As Python opens it in a C locale, where bytes that are no UTF-8 come through as they are.
        given = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", given)
        with pytest.raises(SystemExit) as info:  # noqa: PT012
            MAIN[name]()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return Outcome(int(info.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two bundles, a state of the other's and inputs of every kind of badness."""
    monkeypatch.chdir(tmp_path)
    for name, kind in (("c", "bert"), ("l", "gpt2")):
        (tmp_path / f"{name}.rmt").symlink_to(models.made(kind).bundle)
    np.save("ids.npy", np.arange(50) % 90 + 5)
    np.save("objects.npy", np.array([1, None], object), allow_pickle=True)
    np.save("cube.npy", np.zeros((1, 2, 3), int))
    np.save("half.npy", np.array([5, 0.5]))
    np.save("beyond.npy", np.array([5, 500]))
    np.save("none.npy", np.empty(0, int))
    np.save("batch.npy", np.full((3, 30), 5))
    np.savez("archive.npz", np.arange(3))
    shutil.copy("archive.npz", "archive.npy")
    whole = Path("ids.npy").read_bytes()
    files = {
        "short.npy": whole[:200], "header.npy": whole[:20], "empty.npy": b"", "text.npy": b"hello",
        "huge.npy": b"\x93NUMPY\x01\x00\x76\x00" + HEADER.ljust(117) + b"\n" + bytes(80),
        "latin.txt": b"caf\xe9 au lait", "words.txt": b"hello there", "ids.txt": b"5 6 seven", "comma.txt": b"5,6,7",
        "float.txt": b"5 6.5", "digits.txt": b"9" * 100, "blank.txt": b" \n", "letters.txt": b"a" * 3_000_000,
        "padded.txt": b"5 -1 6", "long.txt": b"5 " * 100_000,
    }  # fmt: skip
    for name, content in files.items():
        Path(name).write_bytes(content)
    Path("folder.json").mkdir()
    with RMTRuntime("c.rmt", threads=1) as runtime:
        runtime.run(np.load("ids.npy"), alignment="left").state.save("other.state")
    return tmp_path


RUNS: dict[str, tuple[str, str]] = {
    "bundle missing": ("x.rmt ids.npy", "x.rmt cannot be opened (No such file or directory); expected a bundle"),
    "bundle with markup in its name": ("[/b].rmt ids.npy", "[/b].rmt cannot be opened"),
    "bundle is no bundle": ("ids.npy ids.npy", "ids.npy is none of what a runtime opens"),
    "array missing": ("l.rmt x.npy", "x.npy cannot be read: No such file or directory; expected an .npy array of token ids"),
    "array of pickled objects": ("l.rmt objects.npy", "objects.npy is no readable .npy array of numbers"),
    "array that is text": ("l.rmt text.npy", "(it holds Python objects, or is no .npy file). Write it with numpy.save"),
    "array cut": ("l.rmt short.npy", "short.npy is no readable .npy array of numbers"),
    "array cut in its header": ("l.rmt header.npy", "header.npy is no readable .npy array of numbers"),
    "array empty": ("l.rmt empty.npy", "empty.npy is no readable .npy array of numbers"),
    "array that claims terabytes": ("l.rmt huge.npy", "huge.npy is no readable .npy array of numbers"),
    "array in an archive": ("l.rmt archive.npy", "archive.npy is an .npz archive or another file; expected one array"),
    "archive": ("l.rmt archive.npz", "archive.npz is not UTF-8 text"),
    "array of three axes": ("l.rmt cube.npy", "tokens have shape (1, 2, 3); expected 1-D"),
    "array of fractions": ("l.rmt half.npy", "token 1 is 0.5; token ids are whole numbers"),
    "array of other ids": ("l.rmt beyond.npy", "token 1 is 500; the vocabulary has ids 0 to 95"),
    "array of nothing": ("l.rmt none.npy", "the document is empty: it has no token"),
    "text missing": ("l.rmt x.txt", "x.txt cannot be read: No such file or directory"),
    "text is a folder": ("l.rmt folder.json", "folder.json cannot be read: Is a directory"),
    "text in another encoding": ("l.rmt latin.txt", "latin.txt is not UTF-8 text (invalid continuation byte at byte 3)"),
    "text without a tokenizer": ("l.rmt words.txt", "holds no tokenizer, so it reads token ids, not text"),
    "ids missing": ("l.rmt --ids x.txt", "x.txt cannot be read: No such file or directory"),
    "ids with words": ("l.rmt --ids ids.txt", "'seven'; expected whole numbers between spaces. For text, leave out --ids"),
    "ids with commas": ("l.rmt --ids comma.txt", "'5,6,7'; expected whole numbers between spaces"),
    "ids with fractions": ("l.rmt --ids float.txt", "'6.5'; expected whole numbers between spaces"),
    "ids of 100 digits": ("l.rmt --ids digits.txt", "'99999999999999999999'... is no token id"),
    "ids that are one long word": ("l.rmt --ids letters.txt", "'aaaaaaaaaaaaaaaaaaaa'... is no token id"),
    "ids that are not ASCII": ("l.rmt --ids latin.txt", "latin.txt is not a text of token ids"),
    "ids that are blank": ("l.rmt --ids blank.txt", "the document is empty: it has no token"),
    "ids padded inside": ("l.rmt --ids padded.txt", "token 1 is padding (an id below 0), but token 2"),
    "ids of unknown length aligned right": ("c.rmt --ids long.txt", "alignment 'right' needs the number of tokens"),
    "skip beyond the end": ("l.rmt ids.npy --skip 100", "the document is empty"),
    "skip in a text": ("l.rmt words.txt --skip 2", "--skip counts tokens, so it goes with token ids (.npy, or --ids)"),
    "skip in a batch": ("l.rmt batch.npy --skip 2", "--skip goes with one document; batch.npy holds an array of shape (3, 30)"),
    "batch too large": ("l.rmt batch.npy --max-batch 2 --logits loglik", "stream got 3 documents; this runtime steps at most max_batch=2"),
    "engine": ("l.rmt ids.npy --engine gpu", "engine is 'gpu'; expected 'auto' or one of cpu"),
    "engine for another file": ("l.rmt ids.npy --engine torch", "engine 'torch' cannot run"),
    "dtype": ("l.rmt ids.npy --dtype float32", "dtype is 'float32'; expected one of fp32"),
    "threads": ("l.rmt ids.npy --threads 0", "threads is 0; expected a whole number from 1"),
    "alignment": ("l.rmt ids.npy --alignment top", "alignment is 'top'; expected one of left, right, center"),
    "loglik of a classifier": ("c.rmt ids.npy --logits loglik", "logits='loglik' is for language models"),
    "limit": ("l.rmt ids.npy --max-segments 2", "50 tokens make 3 segments of 20; max_segments=2 allows 40 tokens"),
    "every row without a file": ("l.rmt ids.npy --logits all", "which goes into an array: add -o FILE.npz"),
    "output of another kind": ("l.rmt ids.npy -o out.txt", "--out is out.txt; expected a name that ends in .json or .npz"),
    "output is a folder": ("l.rmt ids.npy -o folder.json", "folder.json is no regular file; it is not replaced"),
    "output in no folder": ("l.rmt ids.npy -o no/such.json", "cannot write no/such.json: no is no folder that can be written"),
    "output in a folder that takes none": ("l.rmt ids.npy -o /proc/x.json", "cannot write /proc/x.json"),
    "state to a device": ("l.rmt ids.npy --save-state /dev/null", "/dev/null is no regular file; it is not replaced"),
    "state to no folder": ("l.rmt ids.npy --save-state no/s", "cannot write no/s: no is no folder that can be written"),
    "state of a batch": ("l.rmt batch.npy --save-state s", "--save-state s goes with one document, not with a batch"),
    "state aligned right": ("c.rmt ids.npy --save-state s", "--save-state needs --alignment left (the model's own is 'right')"),
    "state missing": ("l.rmt ids.npy --load-state s", "s cannot be read (No such file or directory); expected a saved state"),
    "state of another model": ("l.rmt ids.npy --load-state other.state", "other.state was saved by another model"),
    "state that is none": ("l.rmt ids.npy --load-state ids.npy", "ids.npy is no readable state"),
    "state aligned right, loaded": ("c.rmt ids.npy --load-state other.state", "going on from a state needs alignment='left'"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_rmt_run_says_in_one_line_what_is_wrong(place: Path, command: Callable[..., Outcome], name: str) -> None:
    arguments, message = RUNS[name]
    before = set(place.iterdir())
    done = command("rmt-run", *arguments.split())
    assert done.code == 1
    assert message in done.err
    assert done.err.startswith("rmt-run: ")
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert set(place.iterdir()) == before


def test_a_run_that_stops_on_a_bad_token_keeps_the_state_in_front_of_it(
    place: Path, command: Callable[..., Outcome]
) -> None:
    tokens = np.full(FIRST_PIECE + 100, 5)
    tokens[FIRST_PIECE + 9] = 500  # in the second of the pieces that tokens are checked in
    np.save("late.npy", tokens)
    done = command("rmt-run", "l.rmt", "late.npy", "--save-state", "late.state")
    kept = (
        FIRST_PIECE // models.S - 1
    ) * models.S  # one segment is read ahead: is it the last, whose logits are wanted?
    assert done.code == 1
    assert f"token {FIRST_PIECE + 9} is 500; the vocabulary has ids 0 to 95" in done.err
    assert f"stopped after {kept} tokens of the document; the state is in late.state" in done.err
    assert f"--load-state late.state --skip {kept}" in done.err
    with RMTRuntime("l.rmt", threads=1) as runtime:
        rest = runtime.run([5] * 5, state=runtime.load_state("late.state"))
        assert np.array_equal(rest.logits, runtime.run([5] * (kept + 5)).logits)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ("l.rmt -", b"\xff\xfe", "standard input is not UTF-8 text"),
        ("l.rmt -", b"hello", "holds no tokenizer, so it reads token ids, not text"),
        ("l.rmt - --ids", b"5 6 \xff", "standard input: "),
        ("l.rmt - --ids", b"", "the document is empty"),
        (
            "l.rmt - --ids",
            b"five",
            "standard input: invalid literal for int() with base 10: 'five'; expected whole numbers",
        ),
    ],
)
def test_rmt_run_refuses_what_comes_on_standard_input(
    place: Path, command: Callable[..., Outcome], arguments: str, stdin: bytes, message: str
) -> None:
    done = command("rmt-run", *arguments.split(), stdin=stdin)
    assert (done.code, done.err.count("\n"), done.out) == (1, 1, "")
    assert message in done.err


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rmt-run", ""), ("rmt-run", "l.rmt"), ("rmt-run", "l.rmt ids.npy --skip -1"), ("rmt-run", "l.rmt ids.npy --threads x"),
        ("rmt-run", "l.rmt ids.npy --no-such-option"), ("rmt-info", ""), ("rmt-export", ""), ("rmt-verify", ""),
        ("rmt-export", "model.pt --segments many"), ("rmt-info", "a b c"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(place: Path, command: Callable[..., Outcome], name: str, arguments: str) -> None:
    done = command(name, *arguments.split())
    assert done.code == 2
    assert f"Usage: {name}" in done.err
    assert "Traceback" not in done.err


def test_an_output_file_that_exists_is_replaced_whole(place: Path, command: Callable[..., Outcome]) -> None:
    Path("out.json").write_text("x" * 100_000)
    assert command("rmt-run", "l.rmt", "ids.npy", "-o", "out.json").code == 0
    assert json.loads(Path("out.json").read_text())["tokens"] == 50


def test_debug_shows_the_traceback(
    place: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rmt-run", "l.rmt", "ids.npy", "--alignment", "top", "--debug"])
    with pytest.raises(ValueError, match="alignment is 'top'"):
        run.main()


def test_an_error_that_nobody_foresaw_is_one_line_too(
    place: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise MemoryError("out of\nmemory")

    monkeypatch.setattr(run, "read_input", fail)
    done = command("rmt-run", "l.rmt", "ids.npy")
    assert (done.code, done.err) == (1, "rmt-run: MemoryError: out of memory. --debug shows where it happened\n")


def strange_bundle(place: Path, report: Any = None, **spec: Any) -> Path:
    """A bundle with another report and other fields in its spec, whose hashes are right."""
    path = place / "strange.rmt"
    shutil.copytree(models.made("bert").bundle, path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["spec"].update(spec)
    if report is not None:
        (path / "verification.json").write_text(json.dumps(report))
        size = (path / "verification.json").stat().st_size
        manifest["files"]["verification.json"] = {"size": size, "sha256": sha256(path / "verification.json")}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize(
    "report", [{}, [], {"engine": 1, "dtype": 2, "reference": 3, "rows": [{"segment": "a"}]}, {"rows": 5}]
)
def test_rmt_info_refuses_a_report_that_is_none(place: Path, command: Callable[..., Outcome], report: Any) -> None:
    done = command("rmt-info", strange_bundle(place, report))
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert re.search(r"verification\.json is (no verification report|list; expected a JSON object)", done.err)


def test_rmt_info_prints_names_as_they_are_but_no_control_characters(
    place: Path, command: Callable[..., Outcome]
) -> None:
    labels = ["[/red]", "[bold]", ":smile:", "\x1b[2J", "e"]
    done = command("rmt-info", strange_bundle(place, id2label=labels))
    assert done.code == 0
    assert "[/red], [bold], :smile:, ?[2J, e" in done.out
    assert "\x1b[2J" not in done.out


OTHERS: dict[str, tuple[str, str, str]] = {
    "info of nothing": ("rmt-info", "x.rmt", "x.rmt cannot be opened (No such file or directory)"),
    "info of an array": ("rmt-info", "ids.npy", "ids.npy is none of what a runtime opens"),
    "info of a folder": ("rmt-info", "folder.json", "folder.json holds no weights"),
    "export of nothing": ("rmt-export", "x.pt", "x.pt does not exist"),
    "export of text": ("rmt-export", "words.txt", "words.txt is no checkpoint"),
    "export to a bundle that exists": ("rmt-export", "m.pt -o l.rmt", "l.rmt exists already. Choose another name (-o)"),
    "export to no folder": ("rmt-export", "m.pt -o no/such.rmt", "no is no folder"),
    "export with another alignment": ("rmt-export", "m.pt --alignment top", "--alignment is 'top'; expected one of left"),
    "export with words for ids": ("rmt-export", "m.pt --drop-ids a,b", "--drop-ids is 'a,b'; expected whole numbers with commas"),
    "export over no segments": ("rmt-export", "m.pt --segments 1", "segments is 1; expected at least 2"),
    "export with no tolerance": ("rmt-export", "m.pt --tolerance 0", "tolerance is 0.0; expected a number above 0"),
    "export with a strange tokenizer": ("rmt-export", "m.pt --tokenizer words.txt", "words.txt is not the text of a tokenizer"),
    "verify nothing": ("rmt-verify", "x.rmt", "x.rmt is no folder; expected a bundle written by rmt-export"),
    "verify over no segments": ("rmt-verify", "l.rmt --segments 0", "segments is 0; expected at least 2"),
    "verify to no folder": ("rmt-verify", "l.rmt -o no/such.json", "cannot write no/such.json: no is no folder"),
    "verify with another model": ("rmt-verify", "l.rmt --model m.pt", "m.pt holds other weights than l.rmt was exported from"),
    "verify with no model": ("rmt-verify", "l.rmt --model words.txt", "words.txt is no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_commands_say_in_one_line_what_is_wrong(
    place: Path, command: Callable[..., Outcome], name: str
) -> None:
    shutil.copy(models.made("bert").checkpoint, "m.pt")
    program, arguments, message = OTHERS[name]
    before = set(place.iterdir())
    done = command(program, *arguments.split())
    assert done.code == 1
    assert message in done.err
    assert done.err.startswith(f"{program}: ")
    assert done.err.count("\n") == 1
    assert set(place.iterdir()) == before


def start(name: str, *arguments: object, first: str = "", **options: Any) -> subprocess.Popen[bytes]:
    """A command in a process of its own; `first` is run before it."""
    code = f"{first}; from rmt_trt.commands.{name.removeprefix('rmt-')} import main; main()".removeprefix("; ")
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=_hear_interrupts, **options
    )


def _hear_interrupts() -> None:
    """What a shell starts in the background ignores interrupts, and hands that down to the processes of its tests."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_rmt_run_saves_its_state_and_says_how_to_go_on(place: Path) -> None:
    tokens = np.resize(np.arange(1000) % 90 + 5, 30_000)
    np.save("tokens.npy", tokens)
    process = start(
        "rmt-run", "l.rmt", "-", "--ids", "--save-state", "kept.state", "--threads", 1,
        first="from rmt_trt.commands import inputs; inputs.BLOCK = 4096", stdin=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stderr is not None
    fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, 4096)
    # The reader takes 4096 characters at a time and runs them before it takes more: once all of these are written,
    # most have been run, and it waits for the rest, which never comes.
    process.stdin.write(" ".join(map(str, tokens)).encode() + b" ")
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    message = process.stderr.read().decode()
    assert process.wait() == 130, message
    process.stdin.close()
    assert "Traceback" not in message
    found = re.search(r"interrupted after (\d+) tokens.*Go on with: --load-state kept\.state --skip (\d+)", message)
    assert found is not None, message
    assert 10_000 < int(found[1]) <= 30_000
    with RMTRuntime("l.rmt", threads=1) as runtime:
        state = runtime.load_state("kept.state")
        assert (state.position, state.tokens_read) == (int(found[1]), int(found[2]))
        resumed = runtime.run(tokens[state.tokens_read :], state=state)
        whole = runtime.run(tokens)
    assert np.array_equal(resumed.logits, whole.logits)
    assert np.array_equal(resumed.memory, whole.memory)


def test_an_interrupted_rmt_export_leaves_nothing(tmp_path: Path) -> None:
    process = start("rmt-export", models.made("bert").checkpoint, "-o", tmp_path / "new.rmt", "--segments", 200)
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] != ["new.rmt"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []
