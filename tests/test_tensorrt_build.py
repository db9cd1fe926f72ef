"""TensorRT builds: real ones, without a GPU, through TensorRT-RTX; what is refused, and what an end leaves behind."""

from __future__ import annotations

import ast
import dataclasses
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
from models import WIDTH, M, S, made
from onnx import TensorProto, helper
from steps import ONE_STATE, TWO_STATES, GatedStep, left_in

from rmt_trt import ContractError, EngineError, FormatError, RMTRuntime
from rmt_trt.bundle import LOCK, Bundle
from rmt_trt.commands import build as command
from rmt_trt.errors import VerificationError
from rmt_trt.export import ExportOptions, export_step_bundle
from rmt_trt.export import tensorrt as package
from rmt_trt.export.tensorrt import BuildOptions, EngineRecord, add_engine, builder, engines, flavours
from rmt_trt.export.tensorrt.options import parse_capabilities
from rmt_trt.export.tensorrt.progress import Phases, interruptible
from rmt_trt.files import sha256
from rmt_trt.initial_state import from_metadata
from rmt_trt.runtime.engines.tensorrt_log import logger

RTX = flavours.FLAVOURS["tensorrt-rtx"]
TWO = BuildOptions((89, 120), max_batch=4, check_segments=2)
ADA = BuildOptions((89,))
# What code of the package calls things of TensorRT's, and the names that it looks up in them.
ROOTS = {"trt", "builder", "network", "parser", "problem", "config", "profile", "layer", "attention", "tensor", "cache"}
OVERRIDDEN = {"log", "phase_start", "phase_finish", "step_complete"}
RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
PYTHON_ONLY = {"__version__", "__members__", "__class__"}


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a model's bundle, alone in a folder, to add to."""
    return lambda name: Path(shutil.copytree(made(name).bundle, tmp_path / "work" / f"{name}.rmt"))


def contents(path: Path) -> dict[str, bytes]:
    """Every file but the lock, which a writer leaves behind."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != LOCK)
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def graph(path: Path, *nodes: Any, batch: Any = "b", logits: str = "logits", kind: int = TensorProto.FLOAT) -> Path:
    """A graph with the inputs and outputs of `ONE_STATE`, or nearly; `nodes` are its own."""
    nodes = nodes or (
        helper.make_node("Identity", ["memory"], ["new_memory"]),
        helper.make_node("ReduceMean", ["memory", "axes"], ["mean"], keepdims=0),
        helper.make_node("Slice", ["mean", "zero", "three", "one"], [logits]),
    )
    constants = {"axes": [1], "zero": [0], "three": [3], "one": [1]}
    value = helper.make_tensor_value_info
    made_of = helper.make_graph(
        list(nodes), "step",
        [value("memory", kind, [batch, 1, 8]), value("segment", TensorProto.INT64, [batch, "s"])],
        [value("new_memory", kind, [batch, 1, 8]), value(logits, kind, [batch, 3])],
        [helper.make_tensor(name, TensorProto.INT64, [1], values) for name, values in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(made_of, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), str(path))
    return path


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_step_is_compiled_for_two_kinds_of_gpu_and_added_with_all_that_tells_what_it_is(
    name: str, dtype: str, bundle: Callable[[str], Path]
) -> None:
    path = bundle(name)
    before, spec = contents(path), made(name).spec
    stages: dict[str, list[tuple[int, int]]] = {}
    built = add_engine(
        path, "tensorrt-rtx", dtype, TWO, progress=lambda s, a, b: stages.setdefault(s, []).append((a, b))
    )

    stem = f"engines/tensorrt-rtx-{dtype}-sm89-sm120-b4"
    after = contents(path)
    assert set(after) == {*before, f"{stem}.engine", f"{stem}.json"}
    assert all(after[file] == data for file, data in before.items() if file != "manifest.json")
    opened = Bundle(path)
    record = EngineRecord.from_json(json.loads(opened.file(f"{stem}.json").read_text()), "the record")
    assert record == built.record
    engine = opened.file(built.file)
    assert (record.file, record.size, record.sha256) == (engine.name, engine.stat().st_size, sha256(engine))
    assert (record.engine, record.dtype, record.role, record.head) == ("tensorrt-rtx", dtype, "step", "all")
    assert (record.flavour, record.version) == ("tensorrt_rtx", trt.__version__)
    assert (record.compute_capabilities, record.os, record.machine) == (
        (89, 120),
        platform.system(),
        platform.machine(),
    )

    rows = [-1, models.CLASSES] if name == "bert" else [-1, -1, models.VOCAB]
    assert [(t["name"], t["dtype"], t["shape"]) for t in record.inputs] == [
        ("memory", "float32", [-1, M, WIDTH]), ("segment", "int64", [-1, -1]),
    ]  # fmt: skip
    assert [t["name"] for t in record.outputs] == list(spec.outputs)
    assert [t["dtype"] for t in record.outputs] == ["float32", "float32"]
    assert record.outputs[1]["shape"] == rows
    assert record.profiles == (
        {
            "memory": {"min": [1, M, WIDTH], "opt": [4, M, WIDTH], "max": [4, M, WIDTH]},
            "segment": {"min": [1, 1], "opt": [4, S], "max": [4, S]},
        },
    )
    known, initial = from_metadata(record.metadata, "the record")
    assert known == spec
    np.testing.assert_array_equal(initial[0], opened.initial()[0])
    assert (built.check is None) == (dtype == "fp32")
    assert record.graph["file"] == ("step.onnx" if dtype == "fp32" else None)
    assert opened.manifest.verification["engines"]["tensorrt-rtx"][dtype]["unverified"] == engines.UNVERIFIED

    shares = [done for done, _ in stages["build"][1:-1]]
    assert shares == sorted(shares)
    assert len(set(shares)) > 10, "a build says how far it is"
    assert left_in(path.parent) == [path.name]
    with RMTRuntime(path, engine="cpu", threads=1) as runtime:
        assert runtime.run(made(name).document(S)).segments == 1


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gated") / "gated.rmt"
    export_step_bundle(GatedStep(), TWO_STATES, path, options=ExportOptions(segments=2))
    return path


def test_an_engine_of_the_same_name_is_replaced_and_another_stays(gated: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(gated, tmp_path / "gated.rmt"))
    first = add_engine(path, dtype="fp32", options=ADA)
    assert [t["name"] for t in first.record.inputs] == ["hidden", "table", "segment"]
    add_engine(path, dtype="fp32", options=dataclasses.replace(ADA, optimization_level=1))
    add_engine(path, dtype="fp32", options=dataclasses.replace(ADA, max_batch=2))
    names = [f"tensorrt-rtx-fp32-sm89-b{batch}{suffix}" for batch in (2, 8) for suffix in (".engine", ".json")]
    assert left_in(path / "engines") == sorted(names)
    assert Bundle(path).file(first.file).is_file()


def test_a_graph_in_half_precision_comes_from_the_users_own_module_and_is_checked(
    gated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(gated, tmp_path / "work" / "gated.rmt"))
    before, few = contents(path), dataclasses.replace(ADA, check_segments=2)
    with pytest.raises(FormatError, match=r"a step of the user's own.*add_engine.path, dtype='fp16', model=step"):
        add_engine(path, dtype="fp16", options=few)
    other = GatedStep()
    other.head.bias.data += 1
    with pytest.raises(FormatError, match="other weights"):
        add_engine(path, dtype="fp16", options=few, model=other)
    with pytest.raises(FormatError, match="lists no int8 graph"):
        add_engine(path, dtype="int8", options=few)
    plain = engines.plain_graph
    with monkeypatch.context() as patch:
        patch.setattr(engines, "plain_graph", lambda step, *rest, **options: plain(other, *rest, **options))
        with pytest.raises(VerificationError, match="does not compute this model"):
            add_engine(path, dtype="fp16", options=few, model=GatedStep())
    assert contents(path) == before
    assert left_in(path.parent) == [path.name]
    made_half = add_engine(path, dtype="fp16", options=few, model=GatedStep())
    assert made_half.check is not None
    assert 0 < made_half.check.largest < 1e-2


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            {"nodes": [helper.make_node("Mystery", ["memory"], ["new_memory"], "wizard", domain="no.such")]},
            FormatError,
            r"TensorRT-RTX 1\.\S+ cannot read 'g.onnx': node 'wizard' \(Mystery\): .*",
        ),
        ({"batch": 2}, ContractError, r"'memory' is float32 of shape \(2, 1, 8\); the step spec says float32 of shape \(-1"),
        ({"logits": "answer"}, ContractError, r"has the outputs \['new_memory', 'answer'\]; the step spec says"),
        ({"kind": TensorProto.FLOAT16}, ContractError, r"'memory' is float16 of shape \(-1, 1, 8\); the step spec says float32"),
    ],
    ids=["unknown node", "frozen batch", "other names", "other dtype"],
)  # fmt: skip
def test_a_wrong_graph_is_refused_by_what_is_wrong_with_it(
    spoil: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    nodes = spoil.pop("nodes", ())
    path = graph(tmp_path / "g.onnx", *nodes, **spoil)
    spoil["nodes"] = nodes
    with pytest.raises(error, match=message):
        builder.build_plan(path, ONE_STATE, RTX, ADA)


def test_a_file_that_is_no_graph_is_refused_and_a_right_one_is_built(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(FormatError, match=r"TensorRT-RTX \S+ cannot read 'bad.onnx': \w"):
        builder.build_plan(tmp_path / "bad.onnx", ONE_STATE, RTX, ADA)
    plan = builder.build_plan(graph(tmp_path / "g.onnx"), ONE_STATE, RTX, ADA)
    assert plan.data.nbytes > 0


def test_what_the_builder_says_reaches_the_caller_with_the_nodes_name(bundle: Callable[[str], Path]) -> None:
    path = bundle("bert")
    before = contents(path)
    with pytest.raises(
        EngineError, match=r"cannot build 'step.onnx' for 7\.5: .*node_MatMul_\d+.*FP32 GEMM is not supported"
    ):
        add_engine(path, dtype="fp32", options=BuildOptions((75,)))
    assert contents(path) == before
    assert left_in(path.parent) == [path.name]


def test_attention_without_a_kernel_is_made_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query = helper.make_node("Add", ["memory", "memory"], ["query"])
    key = helper.make_node("Mul", ["memory", "memory"], ["key"])
    look = ["query", "key", "memory"]
    attention = helper.make_node("Attention", look, ["new_memory"], "look", q_num_heads=1, kv_num_heads=1)
    mean = helper.make_node("ReduceMean", ["new_memory", "axes"], ["mean"], keepdims=0)
    head = helper.make_node("Slice", ["mean", "zero", "three", "one"], ["logits"])
    path = graph(tmp_path / "g.onnx", query, key, attention, mean, head)
    plan = builder.build_plan(path, ONE_STATE, RTX, ADA)
    assert len(plan.decomposable) == 1
    assert "look" in plan.decomposable[0]
    monkeypatch.setattr(builder, "allow_decomposition", lambda *_: ())
    with pytest.raises(EngineError, match=r"cannot build 'g.onnx' for 8\.9: "):
        builder.build_plan(path, ONE_STATE, RTX, ADA)


def test_an_interrupted_build_leaves_nothing(bundle: Callable[[str], Path]) -> None:
    path = bundle("gpt2")
    before, seen = contents(path), []

    def interrupt(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        if stage == "build" and 0 < done < total and not any(s == "asked" for s, *_ in seen):
            seen.append(("asked", done, total))
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        add_engine(path, dtype="fp32", options=TWO, progress=interrupt)
    assert ("build", 1, 1) not in seen, "the build ran to its end"
    assert not [thread for thread in threading.enumerate() if thread.name == "rmt-build"]
    assert contents(path) == before
    assert left_in(path.parent) == [path.name]


def test_an_interrupted_command_exits_with_130(bundle: Callable[[str], Path]) -> None:
    path = bundle("bert")
    before = contents(path)
    program = (
        "import signal, sys; from rmt_trt.commands import build; from rmt_trt.export.tensorrt import progress\n"
        "step = progress.Phases.step\n"
        "def stopped(*args): signal.raise_signal(signal.SIGINT); return step(*args)\n"
        "progress.Phases.step = stopped; build.main()"
    )
    arguments = (path, "--dtype", "fp32", "--compute-capability", "89")
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=path.parent,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert contents(path) == before
    assert left_in(path.parent) == [path.name]


def test_a_build_fails_in_the_callers_thread() -> None:
    def fails() -> None:
        raise EngineError("the reason")

    with pytest.raises(EngineError, match="the reason"):
        interruptible(fails, threading.Event())
    assert interruptible(lambda: 7, threading.Event()) == 7


def test_nested_phases_are_a_share_of_the_whole() -> None:
    phases = Phases()
    phases.start("all", None, 4)
    assert phases.step("all", 0) == 0.25
    phases.start("inner", "all", 2)
    assert phases.step("inner", 0) == 0.375
    assert phases.step("inner", 1) == 0.5
    phases.finish("inner")
    assert phases.step("all", 1) == 0.5
    phases.start("late", "all", 10)
    assert phases.step("late", 0) == pytest.approx(0.525)
    assert phases.step("never started", 3) == pytest.approx(0.525)


def test_a_library_that_is_missing_or_too_old_is_named_with_its_pip_line(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle("bert")
    monkeypatch.setattr(trt, "__version__", "1.3.0.1")
    with pytest.raises(
        EngineError, match=r"TensorRT-RTX 1.3.0.1 is installed; builds need 1.4 .*--upgrade 'rmt-trt\[tensorrt-rtx\]'"
    ):
        add_engine(path, options=ADA)
    for engine, module in (("tensorrt-rtx", "tensorrt_rtx"), ("tensorrt", "tensorrt")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            EngineError, match=rf"needs the Python package '{module}'.*pip install 'rmt-trt\[{engine}\]'"
        ):
            add_engine(path, engine, options=ADA)


def test_what_a_flavour_does_not_do_is_refused_before_anything_is_made(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle("bert")
    before = contents(path)
    monkeypatch.setattr(flavours.cuda, "refusal", lambda device: "no GPU")
    cases: list[tuple[str, BuildOptions, type[Exception], str]] = [
        ("cuda", ADA, ContractError, "engine is 'cuda'; engines are built for tensorrt, tensorrt-rtx"),
        ("tensorrt-rtx", BuildOptions((90,)), ContractError, r"does not build for compute capability 9\.0; .* 8\.9, 12\.0"),
        ("tensorrt-rtx", BuildOptions(), EngineError, "was not told what to build for .*: no GPU"),
        ("tensorrt-rtx", BuildOptions((89,), strip_weights=True), EngineError, "driver to build .* without its weights: no"),
        ("tensorrt-rtx", BuildOptions((89,), timing_cache=Path("c")), ContractError, "TensorRT-RTX has no timing cache"),
        ("tensorrt-rtx", BuildOptions((89,), version_compatible=True), ContractError, "has no version compatibility"),
    ]  # fmt: skip
    for engine, options, error, message in cases:
        with pytest.raises(error, match=message):
            add_engine(path, engine, "fp32", options)
    assert contents(path) == before


def test_tensorrt_builds_for_the_gpu_that_is_there_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    full = flavours.FLAVOURS["tensorrt"]
    monkeypatch.setattr(flavours.cuda, "refusal", lambda device: "no driver")
    with pytest.raises(EngineError, match=r"measures kernels on the GPU .*tensorrt-rtx does without one.*: no driver"):
        flavours.capabilities(full, None, BuildOptions())
    monkeypatch.setattr(flavours.cuda, "refusal", lambda device: None)
    monkeypatch.setattr(flavours, "_capability", lambda device: 90)
    assert flavours.capabilities(full, None, BuildOptions()) == (90,)
    assert flavours.capabilities(full, None, BuildOptions((90,))) == (90,)
    with pytest.raises(ContractError, match=r"has compute capability 9\.0; 8\.9, 12\.0 was asked for"):
        flavours.capabilities(full, None, BuildOptions((89, 120)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU of compute capability 8.9, as far as the code before the library can tell."""
    monkeypatch.setattr(flavours.cuda, "refusal", lambda device: None)
    monkeypatch.setattr(flavours, "_capability", lambda device: 89)


@pytest.mark.usefixtures("gpu")
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_the_way_of_tensorrt_is_gone_with_the_other_library_in_its_place(
    gated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT needs a GPU to build. Its whole way is the other flavour's but for the choice of the GPU."""
    stand_in = dataclasses.replace(flavours.FLAVOURS["tensorrt"], module="tensorrt_rtx", oldest=(1, 4))
    monkeypatch.setitem(flavours.FLAVOURS, "tensorrt", stand_in)
    chosen: list[Any] = []
    monkeypatch.setattr(flavours, "prepare", lambda flavour, options: chosen.append((flavour, options.device)))
    monkeypatch.setattr(flavours, "target", lambda flavour, *rest, real=flavours.target: real(RTX, *rest))
    path, cache = Path(shutil.copytree(gated, tmp_path / "gated.rmt")), tmp_path / "times.cache"
    options = BuildOptions(timing_cache=cache, optimization_level=3, workspace_mib=1024, device=1)
    built = add_engine(path, "tensorrt", "fp32", options)
    assert chosen == [(stand_in, 1)]
    assert built.file == "engines/tensorrt-fp32-sm89-b8.engine"
    assert built.record.compute_capabilities == (89,)
    assert cache.stat().st_size > 0
    add_engine(path, "tensorrt", "fp32", options)
    cache.unlink()
    cache.mkdir()
    with pytest.raises(FormatError, match="expected a timing cache of TensorRT"):
        add_engine(path, "tensorrt", "fp32", options)


@pytest.mark.usefixtures("gpu")
def test_an_engine_without_weights_keeps_the_graph_that_has_them(
    gated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag itself needs a GPU's driver, so the builder is not told of it here; what goes into the bundle is real."""
    path = Path(shutil.copytree(gated, tmp_path / "gated.rmt"))
    monkeypatch.setattr(builder, "_configure", lambda *_: None)
    options = BuildOptions((89,), strip_weights=True, check_segments=0)
    built = add_engine(path, dtype="fp16", options=options, model=GatedStep())
    assert built.record.stripped
    name = "graphs/tensorrt-rtx-fp16-step-all.onnx"
    assert built.record.graph == {"file": name, "sha256": sha256(path / name)}
    entry = Bundle(path).graph("tensorrt-rtx", "fp16")
    assert entry is not None
    assert Bundle(path).graph_path(entry) == path / name
    again = add_engine(path, dtype="fp16", options=options)  # from the graph that is there: no module is needed
    assert again.record.graph == built.record.graph


def test_options_reach_the_builders_config() -> None:
    config = trt.Builder(logger(trt)).create_builder_config()
    plain = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE), config.builder_optimization_level
    assert config.get_flag(trt.BuilderFlag.TF32), "what the code clears is on by default"
    builder._configure(trt, config, BuildOptions())
    assert (config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE), config.builder_optimization_level) == plain
    flags = (trt.BuilderFlag.TF32, trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.VERSION_COMPATIBLE)
    assert [config.get_flag(flag) for flag in flags] == [False, False, False]
    wanted = BuildOptions(workspace_mib=64, optimization_level=5, strip_weights=True, version_compatible=True)
    builder._configure(trt, config, wanted)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.builder_optimization_level == 5
    assert [config.get_flag(flag) for flag in flags] == [False, True, True]


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


def test_a_record_that_was_altered_is_refused() -> None:
    whole = EngineRecord(
        "tensorrt-rtx", "fp16", "step", "all", "a.engine", 3, "00", "tensorrt_rtx", "1", (89,), ({},), ({},), ({},), {}, {}
    )  # fmt: skip
    value = json.loads(whole.to_json())
    assert EngineRecord.from_json(value, "r") == whole
    wrong: list[tuple[Any, str]] = [
        ([], "describes no engine"), ({**value, "format_version": 2}, "has format version 2"),
        ({**value, "more": 1}, r"unknown fields \['more'\]"), ({**value, "size": "3"}, "'size' is '3'"),
        ({**value, "compute_capabilities": [True]}, r"'compute_capabilities' is \[True\]"),
    ]  # fmt: skip
    for spoiled, message in wrong:
        with pytest.raises(FormatError, match=message):
            EngineRecord.from_json(spoiled, "r")


def test_the_command_builds_and_says_what_and_fails_in_one_line(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle("bert")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rmt-build", str(path), *arguments])
        with pytest.raises(SystemExit) as info:  # noqa: PT012
            command.main()
            raise SystemExit(0)
        return int(info.value.code or 0), capsys.readouterr().err

    code, shown = run("--dtype", "fp32", "--compute-capability", "8.9,120", "--max-batch", "2", "--workspace", "512")
    assert code == 0, shown
    assert "engines/tensorrt-rtx-fp32-sm89-sm120-b2.engine" in shown
    assert "compute capability 8.9, 12.0" in shown
    assert "batch 1 to 2, text 1 to 20" in shown
    assert "compiled and not run" in shown
    for arguments, message in (
        (("--dtype", "fp17"), "--dtype is 'fp17'; expected one of fp32"),
        (("--compute-capability", "sm89"), "--compute-capability is 'sm89'"),
        (("--compute-capability", "90"), "does not build for compute capability 9.0"),
        (("--max-batch", "0", "--compute-capability", "89"), "max_batch is 0"),
    ):
        code, shown = run(*arguments)
        assert (code, shown.count("\n")) == (1, 1), shown
        assert message in shown


def touched() -> set[str]:
    """Every name that the package looks up in something of TensorRT's, read from its source."""
    names = set(OVERRIDDEN)
    for file in Path(next(iter(package.__path__))).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                base: ast.expr = node.value
                while isinstance(base, (ast.Attribute, ast.Call, ast.Subscript)):
                    base = base.func if isinstance(base, ast.Call) else base.value
                if isinstance(base, ast.Name) and base.id in ROOTS:
                    names.add(node.attr)
    return names - PYTHON_ONLY


def test_every_name_is_in_the_installed_library() -> None:
    known = {name for value in vars(trt).values() for name in dir(value)} | set(dir(trt))
    assert touched() - known == set()
    assert len(touched()) > 40, "the names were not found in the source"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_every_name_is_in_the_bindings_of_tensorrt(version: str, tmp_path: Path) -> None:
    """TensorRT itself is not installed here: its names stand in the extension module of its Python bindings."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", "download", "--no-deps")
    done = subprocess.run(
        [*pip, "-d", str(tmp_path), f"tensorrt_cu13_bindings=={version}.*"], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, f"pip needs a package index for this test and failed:\n{done.stderr}"
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read("tensorrt_bindings/tensorrt.so")
    words = set(re.findall(rb"(?<![A-Za-z0-9_])[A-Za-z_][A-Za-z0-9_]*(?![A-Za-z0-9_])", data))
    missing = {name for name in touched() if name.encode() not in words}
    assert missing == RTX_ONLY, "names that TensorRT lacks may be used in flavours.py for TensorRT-RTX alone"
