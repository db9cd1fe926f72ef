"""What rmt-eval keeps of its results, and draws of them."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
from eval_results import LARGEST_PLOT, SIZE, head_of, results_of

from rmt_trt import FormatError
from rmt_trt.evaluation.interval import wilson
from rmt_trt.evaluation.measure import LEFT_OUT
from rmt_trt.evaluation.plots import BY_POSITION, BY_SEGMENTS, draw
from rmt_trt.evaluation.rows import FORMAT, RESULTS, Row, open_results, read_results

# Results.


def test_rows_come_back_from_the_file_as_they_were(tmp_path):
    made_rows = results_of(tmp_path, positions=(0, 50))
    made_rows.add(Row("detect", 4096, left_out=LEFT_OUT))
    assert read_results(tmp_path).rows == made_rows.rows
    value = json.loads((tmp_path / RESULTS).read_text(encoding="utf-8"))["rows"][1]
    low, high = wilson(39, 40)
    wanted = {"accuracy": 39 / 40, "low": low, "high": high, "tokens_per_second": 40 * 4 * SIZE}
    assert {name: value[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "another seed: it was 0 and is 1"),
        ({"model": head_of(dtype="fp16")["model"]}, "another model: dtype was 'fp32' and is 'fp16'"),
        ({"tasks": {"detect": {"task": "detect", "words": 9}}}, "another task detect: words was 333 and is 9"),
    ],
)
def test_results_of_another_kind_are_not_gone_on_with(tmp_path, changes, message):
    results_of(tmp_path).save()
    with pytest.raises(FormatError, match=re.escape(message)):
        open_results(tmp_path, head_of() | changes)


def test_a_task_that_is_new_joins_those_that_were_measured(tmp_path):
    results_of(tmp_path).save()
    both = open_results(tmp_path, head_of() | {"tasks": {"memorize": {"task": "memorize"}}})
    assert list(both.head["tasks"]) == ["detect", "memorize"]
    assert len(both.rows) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is no results file of rmt-eval"),
        ('{"rows": []}', "is no results file of rmt-eval"),
        (json.dumps({"format": FORMAT}), "is damaged (KeyError: 'rows')"),
        (json.dumps({"format": FORMAT, "rows": [{"task": "a", "segments": 1}]}), "is damaged (ValueError"),
    ],
)
def test_a_file_that_holds_no_results_is_named(tmp_path, text, message):
    (tmp_path / RESULTS).write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=re.escape(str(tmp_path / RESULTS)) + ".*" + re.escape(message)):
        read_results(tmp_path)


# Plots.


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_several_results_are_drawn_in_one_picture_that_a_readme_can_hold(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda figure: (drawn.append(figure.axes[0]), close(figure)))
    given_results = [
        results_of(tmp_path, "memorize", dtype="fp16"),
        results_of(tmp_path, "detect", tuple(range(0, 101, 10)), dtype="fp16"),
        results_of(tmp_path, "detect", dtype="bf16"),
    ]
    assert draw(tmp_path, given_results) == [BY_SEGMENTS, BY_POSITION]
    for name in (BY_SEGMENTS, BY_POSITION):
        assert (tmp_path / name).stat().st_size < LARGEST_PLOT
        assert 600 <= png_size(tmp_path / name)[0] <= 1200
    lines = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in drawn]
    assert lines[0] == ["chance, 16.7 %", "memorize", "detect, fp16", "detect, bf16"]
    assert lines[1] == ["chance, 16.7 %", "detect, 64 segments"]
    assert drawn[0].get_xscale() == "log"
    assert [tick.get_text() for tick in drawn[0].get_xticklabels()] == ["1", "4", "16", "64"]
    assert all(axes.get_xlabel() and "%" in axes.get_ylabel() for axes in drawn)
    assert [line.get_ydata()[0] for line in drawn[0].lines if line.get_linestyle() == ":"] == [100 / 6]
