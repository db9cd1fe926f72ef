"""Bundles and records of strangers: what a build reads of them, and how much of them a message repeats."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import typer
from engine_records import record_of, write_engine
from onnx import TensorProto, helper
from spoil import alter, put
from steps import ONE_STATE, left_in
from tensorrt_builds import ADA, contents, copy_of, gated

from rmt_trt import RMTRuntime
from rmt_trt.bundle import STEP
from rmt_trt.commands.app import MESSAGE_LIMIT, run_command
from rmt_trt.errors import FormatError
from rmt_trt.export.external_data import check_external_data
from rmt_trt.export.tensorrt import add_engines
from rmt_trt.initial_state import SPEC_KEY

OTHERS = "graphs/strange.onnx"


def listed(bundle: Path, location: str, *data: str) -> bytes:
    """Lists a graph for TensorRT-RTX whose largest weight is read from `location`; returns that weight."""
    model = onnx.load(str(bundle / STEP))
    weight = max(model.graph.initializer, key=lambda value: len(value.raw_data))
    content = bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for name, value in {"location": location, "offset": 0, "length": len(content)}.items():
        weight.external_data.add(key=name, value=str(value))
    (bundle / "graphs").mkdir(exist_ok=True)
    put(bundle, OTHERS, model.SerializeToString())
    entry = {
        "file": OTHERS,
        "role": "step",
        "engine": "tensorrt-rtx",
        "dtype": "fp32",
        "head": "all",
        "data": list(data),
    }
    alter(bundle, lambda manifest: manifest["graphs"].append(entry | {"opset": 20}))
    return content


@pytest.mark.parametrize("kind", ["a link out of the bundle", "a file that the manifest does not name", "a file above"])
def test_a_build_reads_no_weights_from_files_that_are_not_the_bundles(kind: str, tmp_path: Path) -> None:
    bundle = copy_of(gated(), tmp_path)
    location = "../weights" if kind == "a file above" else "weights"
    content = listed(bundle, location)
    if kind == "a link out of the bundle":
        (tmp_path / "secret").write_bytes(content)
        (bundle / "graphs" / "weights").symlink_to(tmp_path / "secret")
    else:
        (bundle / "graphs" / location).write_bytes(content)
    before = contents(bundle)
    with pytest.raises(
        FormatError, match=rf"strange\.onnx: the weight '.*' is read from '{location}', which the bundle does not list"
    ):
        add_engines(bundle, dtypes=("fp32",), options=ADA)
    assert contents(bundle) == before
    assert left_in(bundle.parent) == [bundle.name]


def test_a_build_reads_weights_from_the_files_that_are_listed(tmp_path: Path) -> None:
    bundle = copy_of(gated(), tmp_path)
    content = listed(bundle, "weights", "graphs/weights")
    put(bundle, "graphs/weights", content)
    made = add_engines(bundle, dtypes=("fp32",), options=ADA)
    assert made[0].record.graph["file"] == OTHERS


def inside(kind: str) -> onnx.ModelProto:
    """A model with one weight in another file, where only a thorough look finds it."""
    weight = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="elsewhere")
    constant = helper.make_node("Constant", [], ["c"], value=weight)
    inner = helper.make_graph([constant], "inner", [], [])
    functions = [helper.make_function("own", "F", [], ["c"], [constant], [])] if kind == "function" else []
    nodes = {"constant": [constant], "branch": [helper.make_node("If", ["x"], ["y"], then_branch=inner)]}.get(kind, [])
    weights = [weight] if kind == "initializer" else []
    return helper.make_model(helper.make_graph(nodes, "g", [], [], weights), functions=functions)


@pytest.mark.parametrize("kind", ["initializer", "constant", "branch", "function"])
def test_weights_in_other_files_are_found_wherever_they_stand(kind: str, tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(inside(kind).SerializeToString())
    check_external_data(tmp_path / "g.onnx", "graphs/g.onnx", ["graphs/elsewhere"])
    with pytest.raises(FormatError, match=r"the weight 'far' is read from 'elsewhere'"):
        check_external_data(tmp_path / "g.onnx", "graphs/g.onnx", ["elsewhere"])


def test_a_listed_graph_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\x08\x07garbage")
    with pytest.raises(FormatError, match=r"g\.onnx is no readable ONNX graph \(.*Copy the bundle again"):
        check_external_data(tmp_path / "g.onnx", "g.onnx", [])


LONG = "x" * 100_000
LONG_FIELDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "version": lambda record: record.update(format_version=LONG),
    "unknown fields": lambda record: record.update(dict.fromkeys((f"{LONG}{n}" for n in range(9)), 1)),
    "step spec": lambda record: record["metadata"].update(
        {SPEC_KEY: json.dumps(ONE_STATE.to_json() | {"alignment": LONG})}
    ),
}


@pytest.mark.parametrize("name", LONG_FIELDS)
def test_a_message_repeats_a_little_of_a_record(name: str, tmp_path: Path) -> None:
    path = write_engine(tmp_path, record_of())
    record = json.loads(path.with_suffix(".json").read_text())
    LONG_FIELDS[name](record)
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match=r"xxx.*[Aa]gain") as caught:
        RMTRuntime(path)
    assert len(str(caught.value)) < 1500


def test_a_format_version_that_only_equals_one_is_refused(tmp_path: Path) -> None:
    path = write_engine(tmp_path, record_of())
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(record | {"format_version": True}))
    with pytest.raises(FormatError, match="has format version True; this rmt-trt reads version 1"):
        RMTRuntime(path)


@pytest.mark.parametrize(("length", "more"), [(MESSAGE_LIMIT, ""), (MESSAGE_LIMIT + 7, " ... and 7 characters more")])
def test_a_command_cuts_a_message_of_megabytes(
    length: int, more: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def fails() -> None:
        raise FormatError("y" * length)

    monkeypatch.setattr("sys.argv", ["rmt-x"])
    with pytest.raises(SystemExit) as ended:
        run_command("rmt-x", app)
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"rmt-x: {'y' * MESSAGE_LIMIT}{more}\n"


@pytest.mark.parametrize(
    ("locked", "said"), [("the bundle", "the engine would be added"), ("its folder", "a build keeps")]
)
def test_a_folder_that_cannot_be_written_is_named_before_the_build(
    locked: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_of(gated(), tmp_path)
    folder = bundle if locked == "the bundle" else bundle.parent
    writable = os.access  # the tests may be run by a user who can write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and writable(path, mode))
    before = contents(bundle)
    with pytest.raises(FormatError, match=re.escape(f"{folder} cannot be written, where {said}")):
        add_engines(bundle, dtypes=("fp32",), options=ADA, progress=lambda stage, done, total: pytest.fail(stage))
    assert contents(bundle) == before
