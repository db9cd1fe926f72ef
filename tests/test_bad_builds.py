"""Builds that fail: what is said, by whom, and that nothing half is left."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
from onnx import TensorProto
from steps import ONE_STATE, left_in
from tensorrt_builds import ADA, HEAD, MEAN, NODE, RTX, contents, copy_of, gated, graph

from rmt_trt import ContractError, EngineError, FormatError
from rmt_trt.bundle import MANIFEST, Bundle, GraphEntry, add_files
from rmt_trt.export.tensorrt import BuildOptions, add_engines, builder, check_build, flavours
from rmt_trt.export.tensorrt.options import parse_capabilities

ONE = dataclasses.replace(ADA, heads=("all",))


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Path]:
    """A bundle that no failed build may change or leave anything beside."""
    path = copy_of(gated(), tmp_path)
    before = contents(path)
    yield path
    assert contents(path) == before
    assert left_in(path.parent) == [path.name]


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """As on a disk with so much room: writing beyond fails."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def full_disk(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unknown(operator: str, domain: str = "") -> tuple[Any, ...]:
    return NODE(operator, ["memory"], ["new_memory"], "wizard", domain=domain), MEAN, HEAD


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            {"nodes": unknown("Det")},
            FormatError,
            r"TensorRT-RTX 1\.\S+ cannot read 'g.onnx': node 'wizard' \(Det\): it has no operator Det .*standard ONNX alone.* "
            r"export the step with other nodes",
        ),
        (
            {"nodes": unknown("Mystery", "no.such"), "domains": ("no.such",)},
            FormatError,
            r"node 'wizard' \(Mystery\): it has no operator Mystery .*[Pp]lugin",
        ),
        (
            {"nodes": (NODE("BiasGelu", ["memory", "memory"], ["new_memory"], "gelu", domain="com.microsoft"), MEAN, HEAD),
             "domains": ("com.microsoft",)},
            FormatError,
            r"node 'gelu' \(BiasGelu\): .*[Pp]lugin.*rmt-trt brings no plugins",
        ),
        ({"batch": 2}, ContractError, r"'memory' is float32 of shape \(2, 1, 8\); the step spec says float32 of shape \(-1"),
        ({"logits": "answer"}, ContractError, r"has the outputs \['new_memory', 'answer'\]; the step spec says"),
        ({"kind": TensorProto.FLOAT16}, ContractError, r"'memory' is float16 of shape \(-1, 1, 8\); the step spec says float32"),
    ],
    ids=["unsupported operator", "custom domain", "node of ONNX Runtime's", "frozen batch", "other names", "other dtype"],
)  # fmt: skip
def test_a_wrong_graph_is_refused_by_what_is_wrong_with_it(
    spoil: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    options = {name: value for name, value in spoil.items() if name != "nodes"}
    path = graph(tmp_path / "g.onnx", *spoil.get("nodes", ()), **options)
    with pytest.raises(error, match=message):
        builder.build_plan(path, ONE_STATE, RTX, ADA)


def test_a_graph_without_logits_is_refused_for_a_head_that_has_them(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx")
    model = onnx.load(str(path))
    del model.graph.output[1]
    onnx.save(model, str(path))
    with pytest.raises(
        ContractError, match=r"has the outputs \['new_memory'\]; the step spec says \['new_memory', 'logits'\]"
    ):
        builder.build_plan(path, ONE_STATE, RTX, ADA)
    plan = builder.build_plan(path, ONE_STATE, RTX, ADA, "none", "none")
    assert [entry["name"] for entry in plan.tensors["outputs"]] == ["new_memory"]
    with pytest.raises(EngineError, match=r"outputs \['new_memory'\] was about to be built for head 'all'"):
        builder.build_plan(path, ONE_STATE, RTX, ADA, "all", "none")


def test_a_file_that_is_no_graph_is_refused_and_a_right_one_is_built(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(FormatError, match=r"TensorRT-RTX \S+ cannot read 'bad.onnx': \w"):
        builder.build_plan(tmp_path / "bad.onnx", ONE_STATE, RTX, ADA)
    plan = builder.build_plan(graph(tmp_path / "g.onnx"), ONE_STATE, RTX, ADA)
    assert plan.data.nbytes > 0


def test_what_the_builder_says_reaches_the_caller_with_the_nodes_name(bundle: Path) -> None:
    with pytest.raises(
        EngineError, match=r"cannot build 'step.onnx' for 7\.5: .*node_MatMul_\d+.*FP32 GEMM is not supported"
    ):
        add_engines(bundle, dtypes=("fp32",), options=dataclasses.replace(ONE, compute_capabilities=(75,)))


def test_too_little_workspace_says_what_to_give_instead(tmp_path: Path) -> None:
    weights = {"table": np.random.default_rng(0).standard_normal((100_000, 8)).astype(np.float32)}
    tied = (
        NODE("Gather", ["table", "segment"], ["text"]), NODE("ReduceMean", ["text", "one"], ["read"], keepdims=1),
        NODE("Transpose", ["table"], ["turned"], perm=[1, 0]), NODE("MatMul", ["memory", "turned"], ["scores"]),
        NODE("Softmax", ["scores"], ["shares"]), NODE("MatMul", ["shares", "table"], ["seen"]),
        NODE("Add", ["read", "seen"], ["new_memory"]), MEAN, HEAD,
    )  # fmt: skip
    path = graph(tmp_path / "g.onnx", *tied, weights=weights)
    with pytest.raises(
        EngineError, match=r"for 8\.9: .*workspace limit.*\. Give --workspace more than 1 MiB, or leave it out"
    ):
        builder.build_plan(path, ONE_STATE, RTX, dataclasses.replace(ADA, workspace_mib=1))


def test_a_machine_without_the_memory_is_told_of_the_batch() -> None:
    build = builder._Build(trt, RTX, ADA, (89,), None, lambda done, total: None)  # type: ignore[arg-type]
    assert build._advice(["Error Code 2: OutOfMemory (Requested size was 7)"]).startswith(
        ". Build with a smaller --max-batch"
    )
    assert build._advice(["node_MatMul_3: no implementation"]) == ""


@pytest.mark.parametrize("kind", ["garbage", "folder"])
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_a_timing_cache_of_another_kind_is_refused_and_kept(
    kind: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = dataclasses.replace(flavours.FLAVOURS["tensorrt"], module="tensorrt_rtx", oldest=(1, 4))
    monkeypatch.setitem(flavours.FLAVOURS, "tensorrt", stand_in)
    monkeypatch.setattr(flavours.cuda, "refusal", lambda device: None)
    monkeypatch.setattr(flavours.machine, "capability", lambda device: 89)
    monkeypatch.setattr(flavours, "prepare", lambda *_: None)
    real = flavours.target
    monkeypatch.setattr(flavours, "target", lambda flavour, *rest: real(RTX, *rest))
    cache = tmp_path / "times.cache"
    if kind == "folder":
        cache.mkdir()
        message = "times.cache is no regular file"
    else:
        cache.write_bytes(b"times of another library" * 100)
        message = r"times.cache is no timing cache of this TensorRT and this GPU: .*Give another name, or remove it"
    options = dataclasses.replace(ONE, timing_cache=cache)
    with pytest.raises(FormatError, match=message):
        add_engines(bundle, "tensorrt", ("fp32",), options)
    assert cache.is_dir() or cache.read_bytes().startswith(b"times of another library")


def test_a_disk_without_room_for_the_engine_leaves_nothing(bundle: Path) -> None:
    with (
        no_file_longer_than(1000),
        pytest.raises(FormatError, match=r"cannot write .*gated\.rmt: File too large\. Nothing was left behind"),
    ):
        add_engines(bundle, dtypes=("fp32",), options=ONE)


@pytest.mark.parametrize("place", ["pathlib.Path.write_bytes", "os.fsync", "os.replace", "rmt_trt.bundle.sync"])
def test_a_disk_that_is_full_leaves_nothing(bundle: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place, full_disk)
        with pytest.raises(FormatError, match=r"(write|add) .*gated\.rmt.*: No space left on device\. "):
            add_engines(bundle, dtypes=("fp32",), options=ONE)


def test_a_bundle_that_becomes_another_models_meanwhile_is_not_added_to(tmp_path: Path) -> None:
    path = copy_of(gated(), tmp_path)
    manifest = path / MANIFEST

    def replaced(stage: str, done: int, total: int) -> None:
        if stage == "build fp32 all" and (done, total) == (1, 1):
            manifest.write_text(manifest.read_text().replace(Bundle(path).spec.fingerprint, "f" * 64))

    with pytest.raises(FormatError, match="was replaced by another model's bundle meanwhile; nothing was added"):
        add_engines(path, dtypes=("fp32",), options=ONE, progress=replaced)
    assert not (path / "engines").exists()


def test_a_library_that_is_missing_or_too_old_is_named_with_its_pip_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "__version__", "1.3.0.1")
    with pytest.raises(
        EngineError, match=r"TensorRT-RTX 1.3.0.1 is installed; builds need 1.4 .*--upgrade 'rmt-trt\[tensorrt-rtx\]'"
    ):
        add_engines(bundle, options=ADA)
    for engine, module in (("tensorrt-rtx", "tensorrt_rtx"), ("tensorrt", "tensorrt")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            EngineError, match=rf"needs the Python package '{module}'.*pip install 'rmt-trt\[{engine}\]'"
        ):
            add_engines(bundle, engine, options=ADA)


def test_what_a_flavour_does_not_do_is_refused_before_anything_is_made(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flavours.cuda, "refusal", lambda device: "no GPU")
    rtx = "tensorrt-rtx"
    cases: list[tuple[str, BuildOptions, type[Exception], str]] = [
        ("cuda", ADA, ContractError, "engine is 'cuda'; engines are built for tensorrt, tensorrt-rtx"),
        (rtx, BuildOptions((90,)), ContractError, r"does not build for compute capability 9\.0; .* 8\.9, 12\.0"),
        (rtx, BuildOptions(), EngineError, "was not told what to build for .*: no GPU"),
        (rtx, BuildOptions((89,), strip_weights=True), EngineError, "driver to build .* without its weights: no"),
        (rtx, BuildOptions((89,), timing_cache=Path("c")), ContractError, "takes no --timing-cache: it measures no kernels"),
        (rtx, BuildOptions((89,), version_compatible=True), ContractError, "takes no --version-compatible: .*libnvinfer_lean"),
        (rtx, BuildOptions((89,), hardware_compatible="ampere_plus"), ContractError,
         "takes no --hardware-compatible: its kernels are finished on the GPU .*--compute-capability"),
    ]  # fmt: skip
    for engine, options, error, message in cases:
        with pytest.raises(error, match=message):
            add_engines(bundle, engine, ("fp32",), options)


def test_all_dtypes_are_looked_at_before_the_first_is_built(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmt_trt.export.tensorrt.engines.build_plan", lambda *_: pytest.fail("something was built"))
    for dtypes, error, message in (
        (("fp32", "fp17", "x"), ContractError, r"dtype is 'fp17', 'x'; expected one of fp32, fp16"),
        (
            ("fp32", "int8"),
            FormatError,
            r"gated.rmt lists no int8 graph for engine 'tensorrt-rtx'.* or take --dtype fp16",
        ),
        ((), ContractError, "dtype is missing"),
    ):
        with pytest.raises(error, match=message):
            add_engines(bundle, dtypes=dtypes, options=ADA)
    with pytest.raises(FormatError, match="a new bundle lists no fp8 graph"):
        check_build("tensorrt-rtx", ("fp16", "fp8"), ADA, None)


def test_a_graph_of_another_dtype_that_is_listed_is_what_is_compiled(tmp_path: Path) -> None:
    path = copy_of(gated(), tmp_path)
    name = "graphs/tensorrt-rtx-int8-step-all.onnx"
    entry = GraphEntry(name, "step", "tensorrt-rtx", "int8", "all", 20)
    broken = graph(tmp_path / "g.onnx")
    add_files(path, {name: broken}, (entry,))
    with pytest.raises(
        ContractError, match=r"graph 'tensorrt-rtx-int8-step-all.onnx' has the inputs \['memory', 'segment'\]"
    ):
        add_engines(path, dtypes=("int8",), options=ONE)
    assert Bundle(path).graph("tensorrt-rtx", "int8") == entry


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0; expected a whole number from 1"),
        ({"max_batch": True}, "max_batch is True"),
        ({"workspace_mib": 0}, "workspace_mib is 0"),
        ({"optimization_level": 6}, "optimization_level is 6; expected a whole number from 0 to 5"),
        ({"compute_capabilities": (8,)}, "a compute capability is 8;"),
        ({"check_segments": 1}, "check_segments is 1"),
        ({"device": -1}, "device is -1"),
        ({"heads": ("last",)}, r"heads are \('last',\); expected all or none, or both"),
        (
            {"hardware_compatible": "ampere+"},
            "hardware_compatible is 'ampere.'; expected one of none, same_compute_cap",
        ),
    ],
)
def test_options_are_checked_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        BuildOptions(**options)


def test_compute_capabilities_are_read_in_both_spellings() -> None:
    assert parse_capabilities("89, 12.0") == (89, 120)
    assert parse_capabilities(None) == ()
    for wrong in ("", "sm89", "8.", "8", "1.2.3", "89,", "12345", "8.90"):
        with pytest.raises(ContractError, match=re.escape(f"--compute-capability is {wrong!r}; expected")):
            parse_capabilities(wrong)
