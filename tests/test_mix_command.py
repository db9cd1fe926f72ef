"""rmt-calibrate with budgets, mixes and rescaling, on the trained example; the file of a mix."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import example_bundle

from rmt_trt.bundle import Bundle
from rmt_trt.calibration import UINT8_INT8, load_ranges
from rmt_trt.calibration.mix import Budget, Mix, load_mix
from rmt_trt.calibration.recall import Questions, answered
from rmt_trt.calibration.search import keepable
from rmt_trt.calibration.tapped import step_entry
from rmt_trt.commands import calibrate as command
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.training.tasks import open_task

SMALL = ["--documents", "2", "--segments", "4", "--draws", "1", "--check", "2", "--threads", "1"]
DRIFT = ["--drift-segments", "3", "--drift-documents", "2", "--units", "layers"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """rmt-calibrate in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["rmt-calibrate", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the example's bundle, in a folder of its own that is the working one."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(example_bundle(), tmp_path / "memorize.rmt"))


def recorded(bundle: Path) -> dict[str, Any]:
    return dict(Bundle(bundle).manifest.verification["engines"]["cpu"]["int8"]["quantization"])


def test_a_budget_gives_a_mix_that_the_bundle_names_and_that_can_be_used_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ["--max-drift", "0.006", "--min-recall", "0.9", "--recall-segments", "2", "--recall-questions", "8"]
    assert run(monkeypatch, str(bundle), "--task", "memorize,detect", *SMALL, *DRIFT, *budget, "-o", "made") == 0
    err = capsys.readouterr().err
    mix = load_mix("made/mix.json")
    assert mix.kept
    assert f"kept in float32: {', '.join(mix.kept)}. drift of the memory" in err
    assert "8 of 8 right at 2 segments" in err
    assert (Path("made") / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    record = recorded(bundle)
    assert record["kept"] == sorted(mix.products)
    assert record["mix"]["budget"] == {"max_drift": 0.006, "min_recall": 0.9}
    assert record["mix"]["reached"]["drift"]["worst"] <= 0.006
    assert record["mix"]["reached"]["recall"] == [{"segments": 2, "right": 8, "count": 8}]
    assert {unit["unit"] for unit in record["mix"]["units"]} >= {*mix.kept, "memory read", "memory written"}
    first = Bundle(bundle).manifest.files["graphs/cpu-int8-step-all.onnx"].sha256
    again = [str(bundle), "--ranges", "made/ranges.json", "--check", "2"]
    assert run(monkeypatch, *again) == 0
    assert Bundle(bundle).manifest.files["graphs/cpu-int8-step-all.onnx"].sha256 != first
    assert run(monkeypatch, *again, "--mix", "made/mix.json") == 0
    assert Bundle(bundle).manifest.files["graphs/cpu-int8-step-all.onnx"].sha256 == first
    assert recorded(bundle)["mix"]["kept"] == list(mix.kept)
    assert run(monkeypatch, *again, "--mix", "made/mix.json", "--smooth", "0.5") == 1
    assert "and made/mix.json was found with None" in capsys.readouterr().err


def test_ranges_of_an_earlier_run_are_mixed_by_documents_and_rescaled(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(monkeypatch, str(bundle), "--task", "detect", *SMALL, "--first-only", "--accept-drift", "-o", "made") == 0
    )
    ranges = load_ranges("made/ranges.json")
    assert ranges.segments == 2
    given = ["--ranges", "made/ranges.json", "--task", "detect", *SMALL, *DRIFT, "--accept-drift", "-o", "mixed"]
    capsys.readouterr()
    assert run(monkeypatch, str(bundle), *given, "--smooth", "0.5", "--sensitivity") == 0
    assert "each unit quantized alone" in capsys.readouterr().err
    mix = load_mix("mixed/mix.json")
    assert (mix.kept, mix.smooth, bool(mix.units)) == ((), 0.5, True)
    assert set() < set(recorded(bundle)["rescaled"]) <= set(ranges.tensors)
    replace(ranges, channels={}).save(Path("old.json"))
    assert run(monkeypatch, str(bundle), "--ranges", "old.json", "--smooth", "0.5") == 1
    assert "the ranges hold no largest magnitudes of channels" in capsys.readouterr().err
    value = json.loads(Path("mixed/mix.json").read_text()) | {"products": ["node_of_another"]}
    Path("other.json").write_text(json.dumps(value))
    assert run(monkeypatch, str(bundle), "--ranges", "made/ranges.json", "--mix", "other.json") == 1
    assert "other.json keeps 'node_of_another', which is no product of this bundle's step" in capsys.readouterr().err


def test_a_budget_that_no_mix_meets_adds_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rmt_trt.calibration import search

    monkeypatch.setattr(search, "answered", lambda *_: (search.Answered(4, 7, 10),))
    before = (bundle / "manifest.json").read_bytes()
    given = ["--task", "detect", *SMALL, *DRIFT, "--min-recall", "0.8"]
    assert run(monkeypatch, str(bundle), *given) == 1
    err = capsys.readouterr().err
    assert "no mix can meet --min-recall 0.8: the fp32 graph itself has 7 of 10 right at 4 segments" in err
    assert (bundle / "manifest.json").read_bytes() == before


def test_questions_are_the_same_for_every_graph_and_not_those_of_an_evaluation() -> None:
    from rmt_trt.evaluation.cases import Case, documents

    bundle, task = Bundle(example_bundle()), open_task("detect")
    path = bundle.graph_path(step_entry(bundle))
    seen: list[float] = []
    found = answered(path, Questions(task, (2, 3), 4), 1, lambda done, total: seen.append(done / total))
    assert [(one.segments, one.right, one.count) for one in found] == [(2, 4, 4), (3, 4, 4)]
    assert 0.5 < seen[-1] <= 1
    assert seen == sorted(seen)
    assert answered(path, Questions(task, (2,), 4), 1) == found[:1]
    asked = {document.tokens().tobytes() for document in documents(task, Case("detect", 2, None, 4), bundle.spec, 0)}
    mine = documents(task, Case("detect", 2, None, 4), bundle.spec, 1 << 40)
    assert not asked & {document.tokens().tobytes() for document in mine}


MIX = Mix("f" * 64, "int8", ("a",), ("node_a",), 2, None, ({"unit": "a"},), {"max_drift": 0.1})
BAD_MIXES: dict[str, tuple[Any, str]] = {
    "another file": (lambda value: [1], r"holds no mix \(no"),
    "newer": (lambda value: value | {"format_version": 9}, "has format version 9; this rmt-trt reads version 1"),
    "cut": (lambda value: {k: v for k, v in value.items() if k != "products"}, "is damaged or was altered"),
    "numbers": (lambda value: value | {"products": [1]}, "products holds 1"),
    "alpha": (lambda value: value | {"smooth": 2}, "smooth is 2"),
    "units": (lambda value: value | {"units": [[1, 2]]}, "is damaged or was altered"),
}


@pytest.mark.parametrize("name", BAD_MIXES)
def test_a_mix_is_read_back_and_a_damaged_one_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    MIX.save(path)
    assert load_mix(path) == MIX
    alter, message = BAD_MIXES[name]
    path.write_text(json.dumps(alter(json.loads(path.read_text()))))
    with pytest.raises(FormatError, match=message):
        load_mix(path)


def test_a_mix_of_another_model_dtype_or_export_is_refused(tmp_path: Path) -> None:
    bundle = Bundle(example_bundle())
    known, mine = keepable(bundle, UINT8_INT8), replace(MIX, fingerprint=bundle.spec.fingerprint)
    for mix, dtype, message in (
        (MIX, "int8", "is a mix of a model with fingerprint 'ffffffffffff'"),
        (mine, "fp8", "is a mix found for 'int8'; the evidence says nothing of fp8"),
        (mine, "int8", "keeps 'node_a', which is no product of this bundle's step"),
    ):
        with pytest.raises(FormatError, match=message):
            mix.require(bundle.spec, dtype, known, tmp_path / "mix.json")


@pytest.mark.parametrize("value", [float("nan"), 0.0, -0.1, 1.01, float("inf"), True])
@pytest.mark.parametrize("name", ["max_drift", "min_recall"])
def test_budgets_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ContractError, match=rf"--{name.replace('_', '-')} is .*; expected a .*, above 0 and up to 1"):
        Budget(**{name: value})


@pytest.mark.parametrize(
    ("segments", "count", "message"), [((0,), 4, "--recall-segments is 0"), ((2,), 0, "is 0; expected")]
)
def test_questions_of_no_number_are_refused(segments: tuple[int, ...], count: int, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Questions(open_task("detect"), segments, count)


USAGE = {
    "recall": (["--data", "x.npy", "--min-recall", "0.9"], "--min-recall is of a task's questions; name the task with --task"),
    "no documents": (["--ranges", "r.json", "--max-drift", "0.1"], "--max-drift 0.1 is measured on documents; give --data"),
    "drift": (["--task", "detect", "--max-drift", "nan"], "--max-drift is nan; expected a relative error, above 0"),
    "zero": (["--task", "detect", "--min-recall", "0"], "--min-recall is 0.0; expected a share of right answers, above 0"),
    "alpha": (["--task", "detect", "--smooth", "1.5"], "--smooth is 1.5; expected a number from 0 to 1"),
    "alpha nan": (["--task", "detect", "--smooth", "nan"], "--smooth is nan; expected a number from 0 to 1"),
    "units": (["--task", "detect", "--units", "heads"], "--units is 'heads'; expected one of products, inputs, layers"),
    "both": (["--task", "detect", "--mix", "m.json", "--max-drift", "0.1"], "--mix m.json is a mix that was found; leave"),
    "no mix": (["--task", "detect", *SMALL, "--mix", "m.json"], "m.json cannot be read"),
    "segments": (["--task", "detect", "--max-drift", "0.1", "--drift-segments", "0"], "segments is 0; expected a whole number"),
    "recall segments": (["--task", "detect", "--min-recall", "0.9", "--recall-segments", "a"], "--recall-segments is 'a'"),
    "dynamic": (["--dtype", "int8-dynamic", "--smooth", "0.5"], "in int8 and fp8 graphs by ranges, not in int8-dynamic"),
}  # fmt: skip


@pytest.mark.parametrize("name", USAGE)
def test_the_command_says_in_one_line_what_it_cannot_do(
    name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, message = USAGE[name]
    before = (bundle / "manifest.json").read_bytes()
    assert run(monkeypatch, str(bundle), *given) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("rmt-calibrate: ")
    assert message in lines[-1]
    assert (bundle / "manifest.json").read_bytes() == before
