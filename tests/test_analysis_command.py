"""The command rmt-analyze: what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
from memories import OPERATIONS, document_of
from models import S

from rmt_trt.analysis.report import markdown
from rmt_trt.commands import analyze
from rmt_trt.training.tasks import open_task

FILES = {
    "analysis.json", "analysis.md", "trajectory.csv", "trajectory.png", "attention_detect.png", "attention_write.png",
    "attention_retain.png", "attention_read.png",
}  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs rmt-analyze in this process; gives its exit code and what it wrote to standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rmt-analyze", *map(str, arguments)])
        with pytest.raises(SystemExit) as info:  # noqa: PT012
            analyze.main()
            raise SystemExit(0)
        return int(info.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's bundle, analysed over documents whose fact stands in the fifth of twelve segments."""
    folder = tmp_path_factory.mktemp("analysed")
    before = sys.argv
    sys.argv = [
        "rmt-analyze", str(models.example_bundle()), "--task", "detect", "--segments", "12", "--documents", "3",
        "--place", "0.4", "--threads", "1", "--engine", "cpu", "--model", str(models.EXAMPLE), "-o", str(folder / "made"),
    ]  # fmt: skip
    try:
        with pytest.raises(SystemExit, match=r"^0$"):
            analyze.app()
    finally:
        sys.argv = before
    return folder / "made"


def test_the_command_writes_figures_report_and_pictures_that_open(analysed):
    import matplotlib.image

    assert {path.name for path in analysed.iterdir()} == FILES
    for path in analysed.glob("*.png"):
        assert path.stat().st_size < 150_000
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) >= 500
        assert image[..., :3].std() > 0.05, f"{path.name} is blank"


def test_the_report_tells_of_the_document_and_its_fact(analysed):
    facts = json.loads((analysed / "analysis.json").read_text(encoding="utf-8"))
    assert [one["fact_segments"] for one in facts["documents"]] == [[5]] * 3
    assert all(one["right"] and one["answer"] == one["answered"] for one in facts["documents"])
    assert facts["model"]["memory"] == [10, 128]
    assert [row["segments"] for row in facts["trajectory"]["at_segments"]] == [1, 2, 4, 8, 12]
    kinds = facts["trajectory"]["by_kind"]
    assert kinds["fact"]["change"]["median"] > 5 * kinds["noise"]["change"]["median"]
    text = (analysed / "analysis.md").read_text(encoding="utf-8")
    assert text == markdown(facts)
    assert str(models.example_bundle().parent) not in text
    assert all(f"({name})" in text for name in FILES if name.endswith(".png"))


def test_the_csv_holds_a_row_per_document_and_segment(analysed):
    with (analysed / "trajectory.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["document"], row["segment"]) for row in rows] == [
        (str(document), str(segment)) for document in (1, 2, 3) for segment in range(1, 13)
    ]
    assert {row["segment"]: row["kind"] for row in rows[:12]} == {
        **{str(n): "noise" for n in range(2, 12)}, "1": "first", "5": "fact", "12": "question",
    }  # fmt: skip
    for row in rows:
        each = [float(row[f"previous_{i}"]) for i in range(1, 11)]
        assert float(row["previous"]) == pytest.approx(np.mean(each), abs=1e-5)
    assert rows[0]["initial"] == rows[0]["previous"]


def test_the_report_of_attention_agrees_with_itself(analysed):
    facts = json.loads((analysed / "analysis.json").read_text(encoding="utf-8"))["attention"]
    assert [one["name"] for one in facts["operations"]] == list(OPERATIONS)
    task = open_task("detect")
    facts_of_seed = {seed: task.labels[task.document(4 * 128, seed, 0.4).label] for seed in facts["seeds"]}
    for one in facts["operations"]:
        shares = np.array(one["share_by_layer_and_head"])
        assert shares.shape == (4, 4)
        assert one["share"] == shares.max() == shares[one["layer"] - 1, one["head"] - 1]
        assert one["share"] == pytest.approx(np.mean(one["share_of_each_map"]), rel=1e-5)
        counts = Counter(facts_of_seed[seed] for seed in facts["seeds"])
        assert set(one["share_by_answer"]) == set(counts)
        if one["maps"] == len(facts["seeds"]):
            parts = [counts[name] * value for name, value in one["share_by_answer"].items()]
            assert sum(parts) / one["maps"] == pytest.approx(one["share"], rel=1e-5)
        drawn = one["drawn"]
        assert sum(drawn["share_by_region"].values()) == pytest.approx(1, abs=1e-4)
        columns = [drawn["share_by_region"].get(name, 0) for name in one["columns"]]
        assert drawn["share"] == pytest.approx(sum(columns), abs=1e-5)
        assert drawn["regions"][-1]["stop"] == 141
        assert len(drawn["words"]) == len(drawn["ids"]) == 128
    write = facts["operations"][1]
    assert write["share"] > 3 * write["even_attention"]  # the example was trained to find the fact


def test_a_document_of_ones_own_is_followed_without_marks_or_maps(command, tmp_path):
    np.save(tmp_path / "ids.npy", document_of("gpt2", 3 * S + 5))
    code, err = command(models.made("gpt2").checkpoint, "--tokens", tmp_path / "ids.npy", "-o", tmp_path / "out")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name for name in FILES if "attention" not in name}
    facts = json.loads((tmp_path / "out/analysis.json").read_text(encoding="utf-8"))
    assert (facts["engine"], facts["documents"]) == ("torch", [{"tokens": 3 * S + 5, "segments": 4}])
    assert "## By what stands" not in (tmp_path / "out/analysis.md").read_text(encoding="utf-8")


def test_a_text_of_the_users_is_the_background(command, place):
    """By the example's own tokenizer, which lacks the words of the one task and knows those of the other."""
    options = "--task memorize,reasoning --text words.txt --part 0.5:1 --segments 2 --documents 2 --attention 0 -o out"
    code, err = command("e.rmt", *options.split())
    assert code == 1
    assert "use one that knows these words" in err
    code, err = command("e.rmt", *options.replace(",reasoning", "").split())
    assert code == 0, err
    facts = json.loads(Path("out/analysis.json").read_text(encoding="utf-8"))
    assert (facts["task"]["text"], facts["task"]["part"]) == ("words.txt", [0.5, 1.0])
    assert [one["fact_segments"] for one in facts["documents"]] == [[1], [1]]
    assert "in words.txt" in Path("out/analysis.md").read_text(encoding="utf-8")


BAD: dict[str, tuple[str, str]] = {
    "neither task nor tokens": ("e.rmt", "give either --task, of which documents are made, or --tokens FILE"),
    "both": ("e.rmt --task detect --tokens ids.npy", "give either --task"),
    "text with tokens": ("e.rmt --tokens ids.npy --text words.txt", "--text, --part and --place go with --task"),
    "no segments": ("e.rmt --task detect --segments 0", "--segments is 0; expected at least 1"),
    "no documents": ("e.rmt --task detect --documents 0", "--documents is 0; expected at least 1"),
    "more segments than are held": (
        "e.rmt --task detect --segments 100000 --documents 32", "32 documents have 3,200,000 segments in all"
    ),
    "place beyond the text": ("e.rmt --task detect --place 1.5", "--place is 1.5; expected 0, the very start, to 1"),
    "too few segments for maps": ("e.rmt --task detect --attention 2", "--attention is 2; a fact, noise and the question"),
    "place without noise behind it": (
        "e.rmt --task detect --place 1 --documents 1 --segments 1", "with facts at the place 1.0, 0 have each fact"
    ),
    "unknown task": ("e.rmt --task memorise", "task is 'memorise'; expected one or several of memorize"),
    "missing model": ("x.rmt --task detect", "x.rmt cannot be opened (No such file or directory)"),
    "missing text": ("e.rmt --task detect --text x.txt", "x.txt"),
    "missing tokens": ("e.rmt --tokens x.npy", "x.npy cannot be read"),
    "model without tokenizer": ("b.pt --task detect --text words.txt", "b.pt holds no tokenizer"),
    "tokens as text for a model without tokenizer": ("b.pt --tokens words.txt", "b.pt holds no tokenizer"),
    "tokens beyond the vocabulary": ("b.pt --tokens ids.npy", "500"),
    "another model's classes": ("b.pt --task detect", "the task's ids go up to 332"),
    "part without text": ("e.rmt --task detect --part 0:1", "--part 0:1 is a part of a text"),
    "part that is none": ("e.rmt --task detect --text words.txt --part all", "--part is 'all'; expected two shares"),
    "part out of order": ("e.rmt --task detect --text words.txt --part 0.9:0.1", "0.9"),
    "checkpoint of a checkpoint": ("e.pt --task detect --model e.pt", "--model goes with a bundle; e.pt is a checkpoint"),
    "another model's checkpoint": ("e.rmt --task detect --model b.pt", "(--attention 0 leaves the maps out)"),
    "a graph without its model": ("e.rmt/step.onnx --task detect", "e.rmt/step.onnx is no bundle's folder"),
    "a file for a folder": ("e.rmt --task detect --attention 0 -o words.txt", "--out is words.txt, a file"),
    "a folder in a file": ("e.rmt --task detect --attention 0 -o words.txt/out", "cannot write words.txt/out"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models and inputs."""
    monkeypatch.chdir(tmp_path)
    for name, target in {
        "e.rmt": models.example_bundle(), "e.pt": models.EXAMPLE, "b.pt": models.made("bert").checkpoint,
    }.items():  # fmt: skip
        Path(name).symlink_to(target)
    np.save("ids.npy", np.array([5, 6, 500]))
    Path("words.txt").write_text("A miller found a rope. The old captain slept.\n" * 50, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_nonsense_gets_one_clear_line(case, command, place):
    arguments, message = BAD[case]
    code, err = command(*arguments.split())
    assert (code, len(err.strip().splitlines())) == (1, 1), err
    assert message in err
    assert "Traceback" not in err


def test_a_bundles_maps_without_torch_say_how_to_go_on(command, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, err = command("e.rmt", "--task", "detect")
    assert code == 1
    assert "the attention maps (--attention 0 leaves the maps out) come from the PyTorch recurrence" in err
    assert "pip install 'rmt-trt[export]'" in err
    code, err = command("e.rmt", "--task", "detect", "--attention", 0, "--segments", 3, "--engine", "cpu", "-o", "out")
    assert code == 0, err


def test_without_matplotlib_it_is_said_before_the_work(command, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, err = command("e.rmt", "--task", "detect")
    assert code == 1
    assert "pip install 'rmt-trt[analyze]'" in err
