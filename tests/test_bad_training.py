"""What is given to training, evaluation and analysis by mistake: one clear line, and no file lost or half written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch

from rmt_trt import FormatError
from rmt_trt.benchmarks import ablations
from rmt_trt.commands import analyze, train
from rmt_trt.commands import eval as evaluate
from rmt_trt.commands.app import run_command
from rmt_trt.evaluation.rows import FORMAT, RESULTS, Row, read_results
from rmt_trt.files import sole_user
from rmt_trt.training.questions import make_questions, save_questions
from rmt_trt.training.records import COLUMNS, read_metrics
from rmt_trt.training.tasks.background import Background
from rmt_trt.training.tasks.words import ID, PLACES, tokenizer_json

TEXT = Path(__file__).parent / "data" / "coriolanus.txt"
SMALL = (
    "--layers 1 --width 32 --heads 2 --segment-length 16 --num-memory 2 --stages 1 --batch 8 --eval-rows 8 --steps 4"
)
FLAGS = f"{SMALL} --eval-every 2 --device cpu"
MAIN: dict[str, Callable[[], None]] = {
    "rmt-train": train.main, "rmt-eval": evaluate.main, "rmt-analyze": analyze.main,
    "ablations": lambda: run_command("ablations", ablations.app),
}  # fmt: skip


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Runs a command line in a folder of its own: its exit code and what stands on standard error."""
    monkeypatch.chdir(tmp_path)
    Path("m.rmt").symlink_to(models.example_bundle())

    def call(line: str) -> tuple[int, str]:
        name, *arguments = line.split()
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as info:  # noqa: PT012
            MAIN[name]()
            raise SystemExit(0)
        return int(info.value.code or 0), capsys.readouterr().err

    return call


def files() -> list[Path]:
    """What lies in the working folder, but for empty folders."""
    return sorted(path for path in Path().rglob("*") if path.is_file())


BAD: dict[str, tuple[str, str]] = {
    "minutes without an end": (f"rmt-train out {FLAGS} --minutes inf", "--minutes is inf; expected a number of minutes"),
    "questions for a decoder": (
        f"rmt-train out {FLAGS} --form decoder --questions q.jsonl", "for a classifier; this run trains a decoder"
    ),
    "questions for a text": (
        f"rmt-train out {FLAGS} --text t.txt --tokenizer t.json --questions q.jsonl", "this run reads the text t.txt"
    ),
    "a question with a number of 5,000 digits": (
        f"rmt-train out {FLAGS} --questions digits.jsonl", "digits.jsonl, line 1: not JSON: Exceeds the limit"
    ),
    "budget is no number": ("rmt-eval m.rmt --budget nan", "--budget is nan; expected seconds, more than 0"),
    "budget below nothing": ("rmt-eval m.rmt --budget=-1", "--budget is -1; expected seconds, more than 0"),
    "maps of endless documents": (
        "rmt-analyze m.rmt --task detect --attention 1000000000", "--attention is 1000000000; a fact, noise and the"
    ),
    "a part of tokens": ("rmt-analyze m.rmt --tokens t.txt --part 0:0.5", "--text, --part and --place go with --task"),
    "ablations of no seed": ("ablations out --seeds ,", "--seeds is (); expected one number or several"),
    "ablations of words": ("ablations out --seeds one", "--seeds is 'one'; expected whole numbers with commas"),
    "ablations of 0 segments": ("ablations out --segments 0", "--segments is (0,); expected one number or several"),
    "ablations of huge memory": ("ablations out --memory 1,5000", "--memory is (1, 5000); expected one number or several"),
    "more documents than are followed": (
        "rmt-analyze m.rmt --task detect --documents 1000000 --segments 1 --engine cpu",
        "1000000 documents have 1,000,000 segments in all",
    ),
    "an array of one number": ("rmt-analyze m.rmt --tokens one.npy", "tokens have shape (); expected 1-D"),
    "ablations into a file": ("ablations t.txt", "cannot write t.txt: File exists"),
    "ablations of decoders": ("ablations out --extra=--form=decoder", "--extra holds --form=decoder; what is compared"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_gets_one_line_and_leaves_no_file(command, name):
    line, message = BAD[name]
    save_questions("q.jsonl", make_questions(40, 2, 1))
    Path("digits.jsonl").write_text('{"seed": ' + "1" * 5000 + "}\n", encoding="utf-8")
    np.save("one.npy", np.array(5))
    Path("t.txt").write_text("A sentence stands here.", encoding="utf-8")
    before = files()
    code, err = command(line)
    assert (code, len(err.splitlines())) == (1, 1), err
    assert message in err
    assert files() == before


def test_a_second_process_in_the_same_folder_is_sent_away(command, tmp_path):
    (tmp_path / "out").mkdir()
    for line, name in ((f"rmt-train out {FLAGS}", "rmt-train"), ("rmt-eval m.rmt -o out", "rmt-eval")):
        with sole_user(tmp_path / "out", name):
            code, err = command(line)
        assert (code, len(err.splitlines())) == (1, 1), err
        assert f"another {name} is at work in out. Wait until it ends" in err
        assert not list((tmp_path / "out").iterdir())
    with sole_user(tmp_path / "out", "rmt-eval"):
        pass


@pytest.mark.parametrize("name", ["resume.pt", "model.pt", "delta.safetensors"])
def test_what_another_run_has_left_is_not_written_over(command, name):
    Path("out").mkdir()
    Path("out", name).write_bytes(b"somebody's")
    code, err = command(f"rmt-train out {FLAGS}")
    assert (code, len(err.splitlines())) == (1, 1), err
    assert f"out holds {name} of another run" in err
    assert [path.read_bytes() for path in Path("out").iterdir()] == [b"somebody's"]


def test_a_folder_without_locks_is_used_all_the_same(tmp_path):
    with sole_user(tmp_path / "none", "rmt-train"):
        pass


def test_a_row_of_metrics_that_was_broken_off_does_not_stop_the_run_from_going_on(command):
    assert command(f"rmt-train out {FLAGS}")[0] == 0
    metrics = Path("out/metrics.csv")
    whole = metrics.read_text(encoding="utf-8")
    metrics.write_text(whole[:-5], encoding="utf-8")
    assert [row["step"] for row in read_metrics(metrics)] == ["2"]
    assert command("rmt-train out --resume --device cpu")[0] == 0
    assert metrics.read_text(encoding="utf-8") == whole[: whole.index("\n4,") + 1]


HEADER = ",".join(COLUMNS).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\n", b"step,stage\n1,2\n", b'"' + b"x" * 200_000 + b'"\n' * 2, b"a\0b\nc\n", b"something else\n",
        HEADER + b"\n1,2,3\n", HEADER + b"\n1,0,1,1.5,0.5,0.1,2.0,more\n", HEADER + b"\n" + b"9" * 5000 + b",0,1,1,1,1,1\n",
    ],
)  # fmt: skip
def test_metrics_of_another_kind_are_named(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(FormatError, match=r"is no metrics\.csv of rmt-train"):
        read_metrics(tmp_path / "metrics.csv")


def results_with(place: tuple[str, ...], value: object) -> dict[str, Any]:
    """A results file whose value at a place is another one."""
    whole: dict[str, Any] = {
        "format": FORMAT, "seed": 0, "labels": list(PLACES), "tasks": {"detect": {"task": "detect", "part": [0, 1]}},
        "model": {"name": "m", "fingerprint": "f", "engine": "cpu", "dtype": "fp32", "segment_length": 128},
        "rows": [Row("detect", 4, 50, 10, 9, 5000, 512, 1.0, 8, text={"repeats": 0.5}).to_json()],
    }  # fmt: skip
    part: Any = whole
    for step in place[:-1]:
        part = part[0] if step == "0" else part[step]
    part[place[-1]] = value
    return whole


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("model",), []), (("model", "name"), 3), (("model", "segment_length"), "long"), (("labels",), []),
        (("labels",), [1]), (("tasks",), ["detect"]), (("tasks", "detect"), 5), (("tasks", "detect", "part"), [[[]]]),
        (("rows",), {"a": 1}), (("rows", "0", "segments"), "4"), (("rows", "0", "segments"), 10**400),
        (("rows", "0", "segments"), True), (("rows", "0", "task"), None), (("rows", "0", "position"), 101),
        (("rows", "0", "seconds"), float("nan")), (("rows", "0", "seconds"), 0), (("rows", "0", "right"), 11),
        (("rows", "0", "count"), 0), (("rows", "0", "tokens"), 1.5), (("rows", "0", "wrong"), 7),
        (("rows", "0", "wrong"), ["x"]), (("rows", "0", "memory"), {"end": 1}), (("rows", "0", "text"), {"repeats": [[1]]}),
        (("rows", "0", "left_out"), 1), (("rows", "0", "idle_share"), float("inf")),
    ],
)  # fmt: skip
def test_a_results_file_that_was_edited_is_refused(tmp_path, place, value):
    (tmp_path / RESULTS).write_text(json.dumps(results_with(("seed",), 0)), encoding="utf-8")
    assert len(read_results(tmp_path).rows) == 1
    (tmp_path / RESULTS).write_text(json.dumps(results_with(place, value)), encoding="utf-8")
    with pytest.raises(FormatError, match=r"results\.json is damaged"):
        read_results(tmp_path)


def test_a_model_may_have_any_name(command):
    Path("5$ and $\\frac{ [red].rmt").symlink_to(models.example_bundle())
    results = results_with(("model", "name"), "5$ and $\\frac{ [red].rmt")
    Path("done").mkdir()
    Path("done", RESULTS).write_text(json.dumps(results), encoding="utf-8")
    assert command("rmt-eval --plot done -o plots") == (0, "plots/accuracy_by_position.png\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_text_in_another_encoding_is_told(tmp_path, encoding):
    (tmp_path / "t.txt").write_bytes(TEXT.read_text(encoding="utf-8").encode(encoding))
    with pytest.raises(FormatError, match=r"t\.txt is no.* UTF-8.*convert it to UTF-8"):
        Background.open(tmp_path / "t.txt", tokenizer_json(ID))


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_while_another_is_told_ends_the_command_in_silence(command, monkeypatch):
    monkeypatch.setattr("typer.main.get_command", interrupted)
    assert command(f"rmt-train out {FLAGS}") == (130, "")


def test_an_interrupt_before_anything_is_saved_says_so(command, monkeypatch):
    monkeypatch.setattr("rmt_trt.commands.train_view.save_run", interrupted)
    code, err = command(f"rmt-train out {FLAGS}")
    assert code == 130
    assert err.splitlines()[-1] == "stopped at step 0. Nothing was saved yet: start it again"


def test_an_interrupt_while_saving_keeps_what_was_saved_before(command, monkeypatch):
    def save(value: object, path: Path) -> None:
        path.write_bytes(b"half")
        if Path("out/resume.pt").exists():
            raise KeyboardInterrupt
        path.write_bytes(b"whole")

    monkeypatch.setattr("torch.save", save)
    monkeypatch.setattr("rmt_trt.commands.train_view.SAVE_SECONDS", 0.0)
    code, err = command(f"rmt-train out {FLAGS}")
    assert code == 130
    assert "stopped at step 2. --resume goes on from where the run was last saved" in err
    assert Path("out/resume.pt").read_bytes() == b"whole"
    assert sorted(path.name for path in Path("out").iterdir()) == ["metrics.csv", "resume.pt", "train.log"]


def test_what_a_killed_run_left_half_written_goes_when_it_goes_on(command):
    assert command(f"rmt-train out {FLAGS}")[0] == 0
    Path("out/.model.pt.17.4711.0.tmp").write_bytes(b"half")
    Path("out/.mine.tmp").write_bytes(b"mine")
    assert command("rmt-train out --resume --device cpu")[0] == 0
    hidden = [path.name for path in Path("out").iterdir() if path.name.startswith(".")]
    assert hidden == [".mine.tmp"]


@pytest.mark.skipif(sys.platform != "linux", reason="the size of files is bounded as Linux does it")
def test_a_full_disk_is_told_and_what_was_saved_before_stays(tmp_path):
    line = f"ulimit -f 180; exec {sys.executable} -m rmt_trt.commands.train {tmp_path}/out {FLAGS}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.search(r"cannot write .*out/resume\.pt: .* Nothing was left behind; free some space", last)
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.csv", "resume.pt", "train.log"]
    assert torch.load(tmp_path / "out" / "resume.pt", weights_only=True)["step"] == 0
