"""Quantization and verification refuse, in one message, files and options that no run can go by; the bundle stays whole."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import S, made
from quantized import ranges_of

from rmt_trt.benchmarks.precision_table import lines_of
from rmt_trt.bundle import MANIFEST, Bundle
from rmt_trt.calibration import load_ranges
from rmt_trt.calibration.mix import Mix, load_mix
from rmt_trt.calibration.step_graph import read_step
from rmt_trt.commands import calibrate, verify
from rmt_trt.errors import FormatError

QUICK = ["--check", "0", "--threads", "1"]


@pytest.fixture(scope="module")
def ranges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ranges.json of a small model."""
    path = tmp_path_factory.mktemp("ranges") / "ranges.json"
    ranges_of("bert").save(path)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("bert").bundle, tmp_path / "bert.rmt"))


@pytest.fixture
def mix(bundle: Path, tmp_path: Path) -> Path:
    """mix.json of that model, which keeps nothing."""
    path = tmp_path / "mix.json"
    Mix(Bundle(bundle).spec.fingerprint, "int8", (), (), 1).save(path)
    return path


def run(
    command: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """What a command says on standard error when it fails."""
    monkeypatch.setattr(sys, "argv", ["rmt-command", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert "--debug shows where it happened" not in err
    return err


def altered(path: Path, *keys: Any, value: object) -> Path:
    """The JSON file with one value replaced."""
    whole = at = json.loads(path.read_text())
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.with_name("altered.json").write_text(json.dumps(whole))
    return path.with_name("altered.json")


def test_a_mix_with_more_evidence_than_a_manifest_holds_leaves_the_bundle_as_it_was(
    bundle: Path, mix: Path, ranges: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (bundle / MANIFEST).read_bytes()
    long = altered(mix, "reached", value={"a": [1] * 900_000})
    err = run(calibrate.main, monkeypatch, capsys, bundle, "--ranges", ranges, "--mix", long, *QUICK)
    assert "the manifest of" in err
    assert "too long" in err
    assert (bundle / MANIFEST).read_bytes() == before
    assert not list(bundle.glob("*int8*"))
    Bundle(bundle)


@pytest.mark.parametrize(
    ("keys", "value"),
    [(("reached",), {"drift": float("nan")}), (("kept",), "text"), (("units",), {}), (("fp32",), {"a": float("inf")})],
)
def test_a_mix_whose_values_are_no_evidence_is_damaged(mix: Path, keys: tuple[Any, ...], value: object) -> None:
    load_mix(mix)
    with pytest.raises(FormatError, match=r"altered\.json is damaged or was altered"):
        load_mix(altered(mix, *keys, value=value))


def test_a_mix_that_cannot_be_read_is_said_before_documents_are(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--data", tmp_path / "none.npy", "--mix", tmp_path / "none.json", "-o", tmp_path / "out"]
    assert "none.json cannot be read" in run(calibrate.main, monkeypatch, capsys, bundle, *asked, *QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [1e39, 1e308])
def test_ranges_beyond_float32_are_damaged(ranges: Path, value: float) -> None:
    name = next(iter(load_ranges(ranges).tensors))
    with pytest.raises(FormatError, match="has the threshold 1e"):
        load_ranges(altered(ranges, "tensors", name, "threshold", value=value))
    with pytest.raises(FormatError, match="has the bounds -1e"):
        load_ranges(altered(ranges, "tensors", name, "early", value=[-value, 0]))


def test_a_format_version_is_a_whole_number(ranges: Path, mix: Path) -> None:
    for path, load in ((ranges, load_ranges), (mix, load_mix)):
        with pytest.raises(FormatError, match="format version True"):
            load(altered(path, "format_version", value=True))


def test_more_threads_than_a_machine_has_cores_for_are_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--data", tmp_path / "none.npy", "--threads", 99_999, "-o", tmp_path / "out"]
    assert "threads is 99999; expected" in run(calibrate.main, monkeypatch, capsys, bundle, *asked)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--tolerance", "inf"), "tolerance is inf; expected a number above 0, and finite"),
        (("--seed", "-1"), "seed is -1; expected"),
    ],
)
def test_verification_refuses_numbers_that_say_nothing(
    bundle: Path,
    option: tuple[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in run(verify.main, monkeypatch, capsys, bundle, "--engine", "cpu", "--segments", "2", *option)


SPEED = {
    "model": {"engine": "cpu"},
    "machine": {"cpu": "x", "cores": 2},
    "rows": [
        {"kind": "load", "name": "int8", "values": {"disk_bytes": 3}},
        {
            "kind": "step",
            "name": "int8",
            "values": {"speed_ratio": 1.0, "speed_ratio_p10": 1.0, "speed_ratio_p90": 1.0},
        },
    ],
}


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "engine"), None),
        (("rows", 0, "name"), "int9"),
        (("rows", 0, "values", "disk_bytes"), {"a": 1}),
        (("rows", 1, "values", "speed_ratio"), float("nan")),
        (("rows", 1, "values", "speed_ratio"), 10**400),
        (("rows", 1, "batch"), "1"),
    ],
)
def test_the_table_of_dtypes_refuses_values_that_were_not_measured(
    tmp_path: Path, keys: tuple[Any, ...], value: object
) -> None:
    path = tmp_path / "speed-1" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SPEED))
    assert lines_of(tmp_path)["cpu", "int8"].disk == 3
    altered(path, *keys, value=value).rename(path)
    with pytest.raises(FormatError, match="is no such result, or is damaged"):
        lines_of(tmp_path)


def test_names_in_the_table_of_dtypes_steer_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "speed-1" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SPEED))
    altered(path, "machine", "cpu", value="a\x1b[31m|b").rename(path)
    assert lines_of(tmp_path)["cpu", "int8"].machines == {"a?[31m/b, 2 cores (no vector instructions known)"}


def spoil(bundle: Path, change: Callable[[Any], None]) -> None:
    """Alters the bundle's step, and the manifest with it, as a stranger would."""
    model = onnx.load(bundle / "step.onnx")
    change(model)
    onnx.save(model, bundle / "step.onnx")
    data, manifest = (bundle / "step.onnx").read_bytes(), json.loads((bundle / MANIFEST).read_text())
    manifest["files"]["step.onnx"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def nameless(model: Any) -> None:
    for node in model.graph.node:
        node.name = ""


def without_states(model: Any) -> None:
    del model.graph.output[0]


@pytest.mark.parametrize(
    ("change", "message"), [(nameless, "no names of their own"), (without_states, "has no 'new_memory'")]
)
def test_a_step_that_was_altered_is_no_bug_of_a_library(
    bundle: Path,
    change: Callable[[Any], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(bundle, change)
    before = (bundle / MANIFEST).read_bytes()
    np.save(bundle.parent / "ids.npy", made("bert").document(5 * S))
    asked = ["--data", bundle.parent / "ids.npy", "-o", bundle.parent / "out"]
    assert message in run(calibrate.main, monkeypatch, capsys, bundle, *asked, *QUICK)
    assert (bundle / MANIFEST).read_bytes() == before


def test_what_a_library_cannot_read_is_told_as_a_damaged_step(bundle: Path) -> None:
    entry = Bundle(bundle).manifest.files["step.onnx"]
    data = b"\xff" * entry.size
    (bundle / "step.onnx").write_bytes(data)
    text = (bundle / MANIFEST).read_text().replace(entry.sha256, hashlib.sha256(data).hexdigest())
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(FormatError, match="its fp32 step cannot be quantized"):
        read_step(Bundle(bundle))


def test_a_full_disk_for_temporary_files_is_told_as_such(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    np.save(tmp_path / "ids.npy", made("bert").document(5 * S))
    monkeypatch.setattr(onnx, "save", full)
    err = run(
        calibrate.main, monkeypatch, capsys, bundle, "--data", tmp_path / "ids.npy", "-o", tmp_path / "out", *QUICK
    )
    assert "cannot write" in err
    assert "No space left on device" in err
    assert not list((tmp_path / "out").iterdir())
