"""The benchmark of dtypes and its table: what they report and how they fail. No figure that is measured is judged here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from models import example_bundle
from typer.testing import CliRunner

from rmt_trt.benchmarks.machine import describe
from rmt_trt.benchmarks.precision import app, disk_bytes
from rmt_trt.benchmarks.precision_table import app as table_app
from rmt_trt.benchmarks.precision_table import lines_of, table
from rmt_trt.bundle import Bundle
from rmt_trt.calibration import add_without_data
from rmt_trt.errors import ContractError, EngineError, FormatError
from rmt_trt.export import EngineOptions

QUICK = ["--steps", "1", "--repeat", "3", "--seconds", "0.1", "--threads", "1"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with a graph in 8 bits, and the folder of what was measured of it."""
    folder = tmp_path_factory.mktemp("precision")
    bundle = folder / "example.rmt"
    shutil.copytree(example_bundle(), bundle)
    add_without_data(bundle, "cpu", "int8-weights", options=EngineOptions(segments=0))
    out = folder / "results" / "example" / "speed-cpu"
    done = CliRunner().invoke(
        app, [str(bundle), "--dtype", "fp32,int8-weights", "--batch", "1,2", *QUICK, "-o", str(out)]
    )
    assert done.exit_code == 0, done.output
    return bundle, out


def test_every_dtype_has_its_size_its_memory_and_a_ratio_at_each_batch(results: tuple[Path, Path]) -> None:
    bundle, out = results
    rows = json.loads((out / "results.json").read_text())["rows"]
    loads = {row["name"]: row["values"] for row in rows if row["kind"] == "load"}
    opened = Bundle(bundle)
    for dtype, values in loads.items():
        files = {name for g in opened.manifest.graphs if g.dtype == dtype for name in (g.file, *g.data)}
        assert values["disk_bytes"] == sum((bundle / name).stat().st_size for name in files)
        assert values["host_bytes"] > 0
    steps = [(row["name"], row["batch"]) for row in rows if row["kind"] == "step"]
    assert steps == [("fp32", 1), ("int8-weights", 1), ("fp32", 2), ("int8-weights", 2)]
    assert all(row["values"]["speed_ratio"] == 1 for row in rows if row["kind"] == "step" and row["name"] == "fp32")
    assert "int8-weights" in (out / "results.md").read_text()


def test_the_table_takes_what_there_is_and_leaves_the_rest_empty(results: tuple[Path, Path], tmp_path: Path) -> None:
    model = tmp_path / "example"
    shutil.copytree(results[1], model / "speed-cpu")
    octaves = [{"first": 16, "memory": 2e-3}, {"first": 256, "memory": 3e-3}]
    report = {"engine": "cpu", "dtype": "int8-weights", "octaves": octaves}
    (model / "drift-cpu.json").write_text(json.dumps({"reports": [report]}))
    for number, right in enumerate((9, 8)):  # two tasks, or two machines: counted together
        head = {"model": {"engine": "cpu", "dtype": "int8-weights"}, "machine": describe(None)}
        rows = [{"segments": 64, "right": right, "count": 10}, {"segments": 1024, "left_out": "budget"}]
        (model / f"recall-{number}").mkdir()
        (model / f"recall-{number}" / "results.json").write_text(json.dumps(head | {"rows": rows}))
    section = table("example", lines_of(model))
    fp32, weights = (dict(zip(section.columns, row, strict=True)) for row in section.rows)
    assert (fp32["engine, dtype"], weights["engine, dtype"]) == ("cpu fp32", "cpu int8-weights")
    assert (weights["drift at 16"], weights["drift at 256"], weights["drift at 4,096"]) == ("2.0e-03", "3.0e-03", "")
    assert (weights["right at 64"], fp32["right at 64"]) == ("17/20", "")
    assert fp32["speed, batch 1"] == "1.00"
    assert "right at 1,024" not in section.columns
    done = CliRunner().invoke(table_app, [str(tmp_path)])
    assert done.exit_code == 0
    assert "## example" in done.output


def test_a_dtype_that_the_bundle_lacks_and_an_engine_that_is_not_measured_are_errors(
    results: tuple[Path, Path],
) -> None:
    with pytest.raises(EngineError, match=r"no int8-dynamic graph for engine 'cpu'. Add it with"):
        disk_bytes(Bundle(results[0]), "cpu", "int8-dynamic")
    with pytest.raises(ContractError, match="--engine is 'tensorrt'; expected cpu or cuda"):
        CliRunner().invoke(app, [str(results[0]), "--engine", "tensorrt"], catch_exceptions=False)


def test_a_damaged_result_is_named_and_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no folder with results"):
        CliRunner().invoke(table_app, [str(tmp_path)], catch_exceptions=False)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "drift-cpu.json").write_text('{"reports": [{"engine": "cpu"}]}')
    with pytest.raises(FormatError, match=r"drift-cpu.json is no such result, or is damaged"):
        lines_of(tmp_path / "m")
