"""The command rmt-eval: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_results import LARGEST_PLOT, SIZE, head_of, results_of
from models import example_bundle, made

from rmt_trt import RMTRuntime
from rmt_trt.bundle import MANIFEST
from rmt_trt.commands import eval as command_file
from rmt_trt.evaluation.plots import BY_POSITION, BY_SEGMENTS
from rmt_trt.evaluation.rows import RESULTS, Results, read_results

EXCERPT = Path(__file__).parent / "data" / "coriolanus.txt"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """Runs rmt-eval in this process, in a folder of its own that holds m.rmt; its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    Path("m.rmt").symlink_to(example_bundle())
    Path("t.txt").write_bytes(EXCERPT.read_bytes())

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rmt-eval", *line.split()])
        try:
            command_file.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


QUICK = "--engine cpu --threads 1 --slots 8"


def test_the_example_answers_right_at_one_and_four_segments_and_all_of_it_is_written(command):
    line = f"m.rmt --task memorize,detect --segments 1,4 --samples 16,8 -o out {QUICK}"
    code, shown, err = command(line)
    assert code == 0, err
    found = read_results(Path("out"))
    assert [(row.task, row.segments, row.count) for row in found.rows] == [
        ("memorize", 1, 16), ("detect", 1, 16), ("memorize", 4, 8), ("detect", 4, 8),
    ]  # fmt: skip
    assert all(row.right >= row.count - 1 for row in found.rows)
    assert found.head["command"].startswith("rmt-eval m.rmt --task memorize,detect")
    assert found.head["model"]["fingerprint"] == RMTRuntime("m.rmt").spec.fingerprint
    assert all(row.memory["end"]["host"] and row.memory["end"]["device"] is None for row in found.rows)
    text = Path("out/results.md").read_text(encoding="utf-8")
    for words in ("| detect | 4 | 512 | random | 8 of 8 | 100.0% | 67.6% to 100.0% |", f"![{BY_SEGMENTS}]", "Wilson"):
        assert words in text
    assert "Accuracy" in shown
    assert 0 < Path("out", BY_SEGMENTS).stat().st_size < LARGEST_PLOT
    assert not Path("out", BY_POSITION).exists()

    # The same again elsewhere; and here nothing is run twice.
    command(line.replace("-o out", "-o again"))
    facts = [(row.right, row.wrong, row.tokens, row.steps) for row in found.rows]
    assert facts == [(row.right, row.wrong, row.tokens, row.steps) for row in read_results(Path("again")).rows]
    assert "out holds results already. Go on with them (--resume)" in command(line)[2]
    code, _, err = command(f"{line} --resume --segments 1,2,4 --samples 16,8,8")
    assert (code, err.count("measured before")) == (0, 4)
    assert {(row.task, row.segments) for row in read_results(Path("out")).rows} > {("detect", 2), ("memorize", 2)}
    assert read_results(Path("out")).rows[:4] == found.rows


def test_positions_give_a_row_each_and_a_plot_of_their_own(command):
    code, _, err = command(f"m.rmt --task detect --segments 2,3 --positions 0,50,100 --samples 4 -o out {QUICK}")
    assert code == 0, err
    found = read_results(Path("out"))
    assert [(row.segments, row.position) for row in found.rows] == [(n, p) for n in (2, 3) for p in (0, 50, 100)]
    text = Path("out/results.md").read_text(encoding="utf-8")
    assert "| fact at | detect, 2 segments | detect, 3 segments |" in text
    assert f"![{BY_POSITION}]" in text
    assert sorted(path.name for path in Path("out").iterdir()) == [BY_POSITION, RESULTS, "results.md"]
    code, _, err = command("--plot out out/results.json -o both")
    assert (code, err.split()) == (0, [f"both/{BY_POSITION}"])


def test_a_text_hides_the_facts_by_the_bundles_own_tokenizer_and_is_told_with_its_repeats(command):
    line = f"m.rmt --task detect --text t.txt --part 0.5:1 --segments 1,8 --samples 4 -o out {QUICK}"
    code, _, err = command(line)
    assert code == 0, err
    found = read_results(Path("out"))
    about = found.head["tasks"]["detect"]
    assert (about["text"], about["part"]) == ("t.txt", [0.5, 1.0])
    assert [row.text["repeats"] for row in found.rows] == [row.longest / about["tokens"] for row in found.rows]
    assert "| 95 % interval | repeats |" in Path("out/results.md").read_text(encoding="utf-8")


def test_an_interrupt_leaves_the_rows_so_far_with_their_report(command, monkeypatch):
    first = f"m.rmt --segments 1,2 --samples 4 -o out {QUICK}"
    steps = RMTRuntime.run_many

    def interrupted(self: RMTRuntime, documents: Any, **options: Any) -> Any:
        if options["length"][0] > SIZE:
            raise KeyboardInterrupt
        return steps(self, documents, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RMTRuntime, "run_many", interrupted)
        code, shown, err = command(first)
    assert code == 130
    assert "interrupted; out/results.json holds 1 rows. Go on with --resume" in err
    assert [row.segments for row in read_results(Path("out")).rows] == [1]
    assert Path("out/results.md").exists()
    assert "Accuracy" in shown
    assert command(f"{first} --resume")[0] == 0
    assert [row.segments for row in read_results(Path("out")).rows] == [1, 2]


def test_without_matplotlib_there_are_tables_and_no_plots(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, shown, err = command(f"m.rmt --segments 1 --samples 4 -o out {QUICK}")
    assert code == 0
    assert "no plots: plots needs the Python package 'matplotlib'" in err
    assert sorted(path.name for path in Path("out").iterdir()) == [RESULTS, "results.md"]
    assert "Accuracy" in shown
    code, _, err = command("--plot out -o plots")
    assert (code, "needs the Python package 'matplotlib'" in err) == (1, True)


BAD: dict[str, tuple[str, str]] = {
    "task unknown": ("m.rmt --task memorise", "--task is 'memorise'; expected memorize, detect, reasoning, or several"),
    "no task": ("m.rmt --task ,", "--task is empty; expected memorize"),
    "position above": ("m.rmt --positions 0,101", "--positions is 0,101; expected percents from 0 to 100, each once"),
    "position below": ("m.rmt --positions=-1", "--positions is -1; expected percents from 0 to 100"),
    "position twice": ("m.rmt --positions 5,5", "--positions is 5,5; expected percents from 0 to 100, each once"),
    "position no number": ("m.rmt --positions middle", "--positions is 'middle'; expected whole numbers with commas"),
    "no position": ("m.rmt --positions ,", "--positions is empty; expected percents"),
    "position of memorize": ("m.rmt --task detect,memorize --positions 50", "memorize has its fact at the very start"),
    "samples of other lengths": ("m.rmt --segments 1,2,4 --samples 5,6", "--samples has 2 numbers and --segments 3"),
    "samples 0": ("m.rmt --samples 0", "--samples is 0; expected numbers from 1 to 600000"),
    "samples absurd": ("m.rmt --samples 10_000_000", "--samples is 10000000; expected numbers from 1 to 600000"),
    "segments 0": ("m.rmt --segments 0,4", "--segments is 0,4; expected numbers of at least 1, each once"),
    "segments twice": ("m.rmt --segments 4,4", "--segments is 4,4; expected numbers of at least 1, each once"),
    "no segments": ("m.rmt --segments ,", "--segments is empty"),
    "segments absurd": ("m.rmt --segments 99999999999", "length is 12799999999872 tokens"),
    "part without a text": ("m.rmt --part 0.9:1", "--part 0.9:1 is a part of a text; give the text with --text FILE"),
    "part in wrong order": ("m.rmt --text t.txt --part 0.9:0.1", "--part is '0.9:0.1'; expected two shares of the text"),
    "part beyond": ("m.rmt --text t.txt --part 0.9:1.1", "--part is '0.9:1.1'; expected two shares of the text"),
    "part of one number": ("m.rmt --text t.txt --part 0.9", "--part is '0.9'; expected two shares of the text"),
    "part no numbers": ("m.rmt --text t.txt --part a:b", "--part is 'a:b'; expected two shares of the text"),
    "text missing": ("m.rmt --text none.txt", "none.txt"),
    "text without a tokenizer": ("bare.rmt --text t.txt", "holds no tokenizer, by which --text t.txt is to be read"),
    "bundle missing": ("none.rmt", "none.rmt cannot be opened"),
    "two bundles": ("m.rmt m.rmt", "measures one model at a time and got 2"),
    "folder under a file": ("m.rmt -o t.txt/out", "cannot write t.txt/out: Not a directory"),
    "folder is a file": ("m.rmt -o t.txt", "cannot write t.txt: File exists"),
    "engine unknown": ("m.rmt --engine gpu", "engine is 'gpu'; expected"),
    "words that the model lacks": ("m.rmt --task reasoning", "the task's ids go up to"),
    "another model": ("other.rmt", "the task's ids go up to 332; the model's vocabulary has ids 0 to 95"),
    "plot of nothing": ("--plot none.json", "none.json cannot be read"),
    "plot into a file": ("--plot done -o t.txt", "cannot write t.txt: File exists"),
    "plot without rows": ("--plot empty -o plots", "no row was measured"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(command, name):
    line, message = BAD[name]
    Path("other.rmt").symlink_to(made("bert").bundle)
    if line.startswith("bare"):
        shutil.copytree(example_bundle(), "bare.rmt")
        manifest = json.loads(Path("bare.rmt", MANIFEST).read_text(encoding="utf-8"))
        del manifest["files"]["tokenizer.json"]
        Path("bare.rmt", MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    for folder, rows in (("done", results_of(Path("done")).rows), ("empty", [])):
        Path(folder).mkdir()
        Results(Path(folder), head_of(), rows).save()
    code, shown, err = command(line)
    assert (code, shown, len(err.splitlines())) == (1, "", 1), err
    assert err.startswith("rmt-eval: ")
    assert message in err
