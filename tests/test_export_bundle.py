"""The bundle that export writes: weights beside the graph, the manifest, whole or not at all, additions."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest
from models import Made, S, check_parity, loaded, made, reference, split_bundle, steps_of
from steps import ONE_STATE, Plain, left_in
from torch import nn

from rmt_trt import FormatError, RMTRuntime, StepSpec
from rmt_trt import bundle as bundles
from rmt_trt.bundle import STEP, Bundle, GraphEntry, add_file
from rmt_trt.export import ExportOptions, export_model, export_step_bundle
from rmt_trt.export import bundle as exporting

GOLDEN = Path(__file__).parent / "golden" / "manifest.json"


@pytest.fixture
def split() -> Made:
    """GPT-2 with its weights in a file beside the graph; nobody may change it."""
    return replace(made("gpt2"), bundle=split_bundle())


def test_weights_beside_the_graph_are_named_hashed_and_run(split: Made) -> None:
    opened = Bundle(split.bundle)
    assert opened.manifest.graphs[0].data == ("step.onnx.data",)
    assert opened.manifest.files["step.onnx.data"].size == (split.bundle / "step.onnx.data").stat().st_size > 1 << 10
    assert (split.bundle / "step.onnx").stat().st_size < (made("gpt2").bundle / "step.onnx").stat().st_size
    with split.open() as runtime:
        check_parity(steps_of(runtime, split.document(3 * S + 7)), reference("gpt2", 3 * S + 7, "left"))
    with RMTRuntime(split.bundle / "step.onnx", engine="cpu", threads=1) as runtime:
        assert runtime.run([5, 6]).segments == 1


def test_weights_beside_the_graph_move_with_the_folder(split: Made, tmp_path: Path) -> None:
    shutil.copytree(split.bundle, tmp_path / "elsewhere.rmt")
    with RMTRuntime(tmp_path / "elsewhere.rmt", engine="cpu", threads=1) as runtime:
        assert runtime.run([5, 6]).segments == 1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), r"step.onnx.data is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"step.onnx.data has \d+ bytes; the manifest says"),
        (lambda file: file.write_bytes(b"\x01" + file.read_bytes()[1:]), r"step.onnx.data .*SHA-256 differs"),
    ],
    ids=["missing", "cut", "altered"],
)
def test_harmed_weights_beside_the_graph_are_refused(
    split: Made, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(split.bundle, tmp_path / "harmed.rmt")
    harm(tmp_path / "harmed.rmt" / "step.onnx.data")
    with pytest.raises(FormatError, match=message):
        RMTRuntime(tmp_path / "harmed.rmt", engine="cpu")


def without_measured(value: Any, key: str = "") -> Any:
    """The manifest with everything replaced that another machine or version makes different."""
    if isinstance(value, dict):
        if key == "made_by":
            return dict.fromkeys(value, "VERSION")
        return {name: without_measured(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_measured(inner) for inner in value]
    if key in ("sha256", "fingerprint"):
        assert re.fullmatch("[0-9a-f]{64}", value)
        return "SHA-256"
    return {"size": "BYTES", "worst": "ERROR"}.get(key, value)


def test_the_manifest_is_the_golden_one() -> None:
    found = without_measured(json.loads((made("bert").bundle / "manifest.json").read_text()))
    assert found == json.loads(GOLDEN.read_text()), (
        "the manifest has changed. If that is meant, raise FORMAT_VERSION unless old readers still read it, describe it "
        f"in docs/bundle.md, and set {GOLDEN.name} anew"
    )


def test_two_exports_of_one_model_differ_in_nothing(tmp_path: Path) -> None:
    export_model(loaded("bert"), tmp_path / "bert.rmt", ExportOptions(segments=4), source=made("bert").checkpoint)
    for name in ("initial_state.safetensors", "step.onnx"):
        assert (tmp_path / "bert.rmt" / name).read_bytes() == (made("bert").bundle / name).read_bytes()


def test_no_path_of_the_machine_is_in_the_bundle() -> None:
    source = str(made("bert").checkpoint.parent).encode()
    package = str(Path(nn.__file__).parent.parent).encode()
    for file in made("bert").bundle.iterdir():
        assert source not in file.read_bytes(), file
        assert package not in file.read_bytes(), file


class Breaking:
    """Progress that raises when it is called for the `at`-th time, and records what it was told."""

    def __init__(self, at: int | None, error: BaseException) -> None:
        self.at, self.error, self.calls = at, error, []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)
        if len(self.calls) - 1 == self.at:
            raise self.error


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of Plain; nobody may change it."""
    path = tmp_path_factory.mktemp("plain") / "plain.rmt"
    export_step_bundle(Plain(), ONE_STATE, path, options=ExportOptions(segments=2))
    return path


@pytest.fixture
def plain(exported: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(exported, tmp_path / "plain.rmt")


@pytest.fixture
def traced(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export takes Plain's graph from its bundle: what breaks off lies before it or behind it."""

    def export_step(step: nn.Module, spec: StepSpec, path: Path, *args: Any, **options: Any) -> StepSpec:
        shutil.copy(exported / STEP, path)
        return Bundle(exported).spec

    monkeypatch.setattr(exporting, "export_step", export_step)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("stopped"), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("at", [0, 1, 2, 4])
def test_an_export_that_breaks_off_leaves_nothing(at: int, error: BaseException, tmp_path: Path) -> None:
    progress = Breaking(at, error)
    with pytest.raises(FormatError if isinstance(error, OSError) else type(error)):
        export_step_bundle(
            Plain(), ONE_STATE, tmp_path / "plain.rmt", options=ExportOptions(segments=4), progress=progress
        )
    assert len(progress.calls) == at + 1
    assert left_in(tmp_path) == []


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("stage", ["write_manifest", "verify", "export_step", "RMTRuntime"])
@pytest.mark.parametrize("kept", [False, True], ids=["new", "overwrite"])
def test_an_interrupt_in_any_stage_leaves_what_was_there(
    stage: str, kept: bool, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plain.rmt"
    if kept:
        shutil.copytree(exported, path)
    before = {file.name: file.read_bytes() for file in path.iterdir()} if kept else {}

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_step_bundle(Plain(), ONE_STATE, path, options=ExportOptions(segments=2, overwrite=True))
    assert left_in(tmp_path) == (["plain.rmt"] if kept else [])
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before if kept else not path.exists()


@pytest.mark.usefixtures("traced")
def test_an_interrupt_between_the_two_renames_puts_the_old_bundle_back(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (plain / "manifest.json").read_bytes()
    rename, calls = os.rename, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt):
        export_step_bundle(Plain(), ONE_STATE, plain, options=ExportOptions(segments=3, overwrite=True))
    assert left_in(tmp_path) == ["plain.rmt"]
    assert (plain / "manifest.json").read_bytes() == before


def test_overwrite_replaces_and_nothing_else_does(plain: Path, tmp_path: Path) -> None:
    before = Bundle(plain).manifest
    with pytest.raises(FormatError, match=r"plain.rmt exists already.*--overwrite"):
        export_step_bundle(Plain(), ONE_STATE, plain, options=ExportOptions(segments=2))
    assert Bundle(plain).manifest == before
    export_step_bundle(Plain(), ONE_STATE, plain, options=ExportOptions(segments=5, overwrite=True))
    assert Bundle(plain).manifest.verification["segments"] == 5
    assert left_in(tmp_path) == ["plain.rmt"]
    (tmp_path / "photos").mkdir()
    with pytest.raises(FormatError, match="photos exists and is not a bundle; it is not replaced"):
        export_step_bundle(Plain(), ONE_STATE, tmp_path / "photos", options=ExportOptions(overwrite=True))
    (tmp_path / "photos/manifest.json").write_text('{"name": "a web page"}', encoding="utf-8")
    with pytest.raises(FormatError, match="photos exists and is not a bundle; it is not replaced"):
        export_step_bundle(Plain(), ONE_STATE, tmp_path / "photos", options=ExportOptions(overwrite=True))
    assert left_in(tmp_path) == ["photos", "plain.rmt"]
    assert left_in(tmp_path / "photos") == ["manifest.json"]


def test_an_added_file_is_named_hashed_and_found(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "graph.onnx"
    source.write_bytes((plain / "step.onnx").read_bytes())
    entry = GraphEntry("graphs/fp16.onnx", engine="cuda", dtype="fp16")
    opened = add_file(plain, entry.file, source, entry, made_by={"rmt_trt": "other"})
    assert opened.graph("cuda", "fp16") == entry
    assert opened.graph_path(entry).read_bytes() == source.read_bytes()
    assert opened.manifest.made_by == {"rmt_trt": "other"}
    with RMTRuntime(plain, engine="cpu", threads=1) as runtime:
        assert runtime.run([5, 6]).segments == 1


def test_a_graph_that_needs_something_is_found_by_who_asks_for_it_alone(plain: Path) -> None:
    entry = GraphEntry("graphs/fp16.onnx", engine="cuda", dtype="fp16")
    native = replace(entry, file="graphs/native.onnx", needs=("native",))
    step = plain / "step.onnx"
    add_file(plain, native.file, step, native)
    assert Bundle(plain).graph("cuda", "fp16") is None
    opened = add_file(plain, entry.file, step, entry)
    assert opened.graph("cuda", "fp16") == entry
    assert opened.graph("cuda", "fp16", needs=("native",)) == native
    stated = json.loads((plain / "manifest.json").read_text())["graphs"]
    assert [graph.get("needs") for graph in stated if graph["engine"] == "cuda"] == [["native"], None]
    with pytest.raises(FormatError, match=r"names two graphs, 'graphs/native\.onnx' and 'graphs/again\.onnx'"):
        add_file(plain, "graphs/again.onnx", step, replace(native, file="graphs/again.onnx"))


def test_four_writers_at_once_all_get_their_file_in(plain: Path, tmp_path: Path) -> None:
    def write(number: int) -> None:
        source = tmp_path / f"source{number}"
        source.write_bytes(bytes([number]) * 1000)
        for turn in range(3):
            add_file(plain, f"extra/{number}.{turn}", source)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    opened = Bundle(plain)
    for number in range(4):
        for turn in range(3):
            assert opened.file(f"extra/{number}.{turn}").read_bytes() == bytes([number]) * 1000


def test_a_bundle_that_another_process_is_writing_is_said_to_be(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "LOCK_SECONDS", 0.05)
    (tmp_path / "extra").write_bytes(b"x")
    with filelock.FileLock(plain / ".lock"), pytest.raises(FormatError, match="is being written by another process"):
        add_file(plain, "extra", tmp_path / "extra")
    assert "extra" in add_file(plain, "extra", tmp_path / "extra").manifest.files


@pytest.fixture
def manifests(plain: Path) -> Iterator[Path]:
    """The bundle, whose manifest must be the same afterwards."""
    before = (plain / "manifest.json").read_bytes()
    yield plain
    assert (plain / "manifest.json").read_bytes() == before
    assert not list(plain.glob("**/.*.tmp"))


def test_an_addition_that_breaks_off_changes_nothing(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FormatError, match="cannot add"):
        add_file(manifests, "extra", tmp_path / "missing")
    with pytest.raises(FormatError, match=r"only relative paths inside the bundle"):
        add_file(manifests, "../extra", manifests / "step.onnx")
    real = bundles.sync

    def interrupted(path: Path) -> None:
        if "manifest.json" in path.name:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(bundles, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_file(manifests, "extra", manifests / "step.onnx")
    with RMTRuntime(manifests, engine="cpu", threads=1) as runtime:
        assert runtime.run([5, 6]).segments == 1
