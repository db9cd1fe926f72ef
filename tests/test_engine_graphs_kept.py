"""Graphs are added to a bundle all or none: a full disk, an interrupt, a process that is killed, links out of the bundle."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from added_graphs import FEW
from models import made
from spoil import alter, open_and_run
from steps import left_in
from tensorrt_builds import contents

from rmt_trt import FormatError
from rmt_trt.bundle import MANIFEST, STEP, Bundle, GraphEntry, add_files
from rmt_trt.export import add_engine_graphs


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """GPT-2's bundle alone in a folder, to add to."""
    return Path(shutil.copytree(made("gpt2").bundle, tmp_path / "work" / "model.rmt"))


def full_disk(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "plain"),
    [("os.fsync", True), ("os.replace", False), ("rmt_trt.bundle.sync", False), ("tempfile.mkdtemp", False)],
)
def test_a_full_disk_keeps_the_graphs_that_were_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, place: str, plain: bool
) -> None:
    """Plain graphs take the place of fused ones, or fused ones that of a plain one."""
    if plain:
        add_engine_graphs(bundle, "cuda", "fp16", options=FEW)
    else:
        entry = GraphEntry("graphs/cuda-fp16-step-all.onnx", engine="cuda", dtype="fp16")
        add_files(bundle, {entry.file: bundle / STEP}, [entry])
    before = contents(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(place, full_disk)
        with pytest.raises(FormatError, match="No space left on device"):
            add_engine_graphs(bundle, "cuda", "fp16", options=replace(FEW, plain=plain))
    assert contents(bundle) == before
    assert left_in(bundle.parent) == ["model.rmt"]


@pytest.mark.parametrize("stage", ["graphs", "check"])
def test_an_interrupt_in_any_stage_changes_nothing(bundle: Path, stage: str) -> None:
    before = contents(bundle)

    def interrupted(name: str, done: int, total: int) -> None:
        if name == stage and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_engine_graphs(bundle, "cuda", "fp16", options=FEW, progress=interrupted)
    assert contents(bundle) == before
    assert left_in(bundle.parent) == ["model.rmt"]


# The process dies when the n-th file of a replacement takes its place, the manifest counted.
DIE = """
import os, signal, sys
from pathlib import Path
from rmt_trt.bundle import GraphEntry, add_files
replace, left = os.replace, int(sys.argv[2])
def die(*args):
    global left
    left -= 1
    os.kill(os.getpid(), signal.SIGKILL) if left == 0 else replace(*args)
os.replace = die
path = Path(sys.argv[1])
entries = [GraphEntry(f"graphs/{name}.onnx", engine="cuda", dtype="fp16", head=name, data=("graphs/w",)) for name in ("all", "last")]
files = {"graphs/all.onnx": path / "step.onnx", "graphs/last.onnx": path / "step.onnx", "graphs/w": Path(__file__)}
add_files(path, files, entries, drop=lambda graph: graph.engine == "cuda", made_by={"made": "new"})
"""


@pytest.mark.parametrize("times", range(1, 7))
def test_a_run_that_is_killed_anywhere_leaves_the_old_graphs_the_new_ones_or_none(
    bundle: Path, tmp_path: Path, times: int
) -> None:
    old = GraphEntry("graphs/all.onnx", engine="cuda", dtype="fp16", data=("graphs/w", "graphs/old"))
    (tmp_path / "old").write_text("old")
    add_files(
        bundle, {"graphs/all.onnx": bundle / STEP, "graphs/w": tmp_path / "old", "graphs/old": tmp_path / "old"}, [old]
    )
    script = tmp_path / "die.py"
    script.write_text(DIE)
    done = subprocess.run([sys.executable, str(script), str(bundle), str(times)], check=False)
    assert done.returncode == (-signal.SIGKILL if times <= 5 else 0)
    after = Bundle(bundle)
    cuda = [graph for graph in after.manifest.graphs if graph.engine == "cuda"]
    assert len(cuda) == {1: 1, 6: 2}.get(times, 0)
    assert all(after.graph_path(graph).is_file() for graph in after.manifest.graphs)
    assert open_and_run(bundle, made("gpt2").document(50)).segments == 3
    if times == 6:
        assert "graphs/old" not in contents(bundle)
        assert after.manifest.made_by == {"made": "new"}
    subprocess.run([sys.executable, str(script), str(bundle), "99"], check=True)  # and it can be done again
    assert len(Bundle(bundle).manifest.graphs) == 3


def test_a_change_that_is_a_function_gets_the_value_that_is_there_under_the_lock(bundle: Path) -> None:
    add_files(bundle, {}, made_by=lambda old: {**old, "more": "1"})
    assert Bundle(bundle).manifest.made_by["more"] == "1"
    assert "torch" in Bundle(bundle).manifest.made_by
    with pytest.raises(FormatError, match=r"none\.rmt is no folder; expected a bundle"):
        add_files(bundle.with_name("none.rmt"), {})


def test_graphs_that_the_bundle_needs_are_not_dropped(bundle: Path) -> None:
    before = contents(bundle)
    with pytest.raises(FormatError, match="cannot do without its graphs of role 'step'"):
        add_files(bundle, {}, drop=lambda graph: True)
    assert contents(bundle) == before


def test_nothing_is_written_or_removed_through_a_link_out_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.onnx").write_bytes((bundle / STEP).read_bytes())
    (bundle / "graphs").symlink_to(outside)
    with pytest.raises(FormatError, match=r"graphs/cuda-\S+ leads out of the bundle through a link"):
        add_engine_graphs(bundle, "cuda", "fp16", options=FEW)
    entry = json.loads((bundle / MANIFEST).read_text())["files"][STEP]
    graph = {"file": "graphs/precious.onnx", "engine": "cuda", "role": "full"}
    alter(bundle, lambda m: (m["files"].update({"graphs/precious.onnx": entry}), m["graphs"].append(graph)))
    add_files(bundle, {}, drop=lambda graph: graph.engine == "cuda")
    assert left_in(outside) == ["precious.onnx"]
