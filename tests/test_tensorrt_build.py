"""TensorRT builds: real ones, without a GPU, through TensorRT-RTX, and what they leave in a bundle."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
from models import WIDTH, M, S, made
from steps import ONE_STATE, GatedStep, left_in
from tensorrt_builds import ADA, RTX, attention_graph, contents, copy_of, gated

from rmt_trt import ContractError, EngineError, FormatError, RMTRuntime
from rmt_trt.bundle import Bundle, GraphEntry, add_files
from rmt_trt.engine_check import read_record
from rmt_trt.errors import VerificationError
from rmt_trt.export.tensorrt import BuildOptions, BuiltEngine, add_engines, builder, engines, flavours, graphs
from rmt_trt.export.tensorrt.progress import Phases, interruptible
from rmt_trt.export.verify import step_reference
from rmt_trt.files import sha256
from rmt_trt.initial_state import from_metadata
from rmt_trt.runtime.engines.tensorrt_log import logger

TWO = BuildOptions((89, 120), max_batch=4, check_segments=2, optimization_level=0)
CASES = [(name, dtype) for name in ("bert", "gpt2") for dtype in ("fp32", "fp16")]


@dataclass(frozen=True)
class Built:
    """A bundle to which engines were added, what it held before, and what the builds said."""

    path: Path
    before: dict[str, bytes]
    engines: tuple[BuiltEngine, ...]
    stages: dict[str, list[tuple[int, int]]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """An encoder and a decoder with all their engines, fp32 and fp16, for two kinds of GPU."""
    found = {}
    for name in ("bert", "gpt2"):
        path = copy_of(made(name).bundle, tmp_path_factory.mktemp(name))
        before, stages = contents(path), {}  # type: ignore[var-annotated]

        def show(stage: str, done: int, total: int, stages: Any = stages) -> None:
            stages.setdefault(stage, []).append((done, total))

        both = add_engines(path, "tensorrt-rtx", ("fp32", "fp16"), TWO, progress=show)
        found[name] = Built(path, before, both, stages)
    return found


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., GraphEntry]:
    """Stands for `plain_graph`, of the step in `gated()` alone: its graph in half precision, exported once."""
    kept, bundle = tmp_path_factory.mktemp("half") / "g.onnx", Bundle(gated())
    values = dict(zip(("hidden0", "table0"), bundle.initial(), strict=True))
    entry = graphs.plain_graph(GatedStep(), bundle.spec, "fp16", kept, values)

    def copied(step: Any, spec: Any, dtype: str, path: Path, initial: Any, engine: str, opset: int) -> GraphEntry:
        shutil.copy(kept, path)
        return dataclasses.replace(entry, file=path.name, engine=engine, opset=opset)

    return copied


def test_a_language_model_gets_engines_with_and_without_logits_and_a_classifier_one(built: dict[str, Built]) -> None:
    names = {name: [one.file.removeprefix("engines/tensorrt-rtx-") for one in built[name].engines] for name in built}
    assert names == {
        "bert": [f"{dtype}-all-sm89-sm120-b4.engine" for dtype in ("fp32", "fp16")],
        "gpt2": [f"{dtype}-{head}-sm89-sm120-b4.engine" for dtype in ("fp32", "fp16") for head in ("all", "none")],
    }


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_engines_and_records_are_all_that_is_added_and_the_bundle_runs_as_before(
    name: str, built: dict[str, Built]
) -> None:
    this = built[name]
    added = {f"{one.file.removesuffix('.engine')}{suffix}" for one in this.engines for suffix in (".engine", ".json")}
    after = contents(this.path)
    assert set(after) == {*this.before, *added}
    assert all(after[file] == data for file, data in this.before.items() if file != "manifest.json")
    assert left_in(this.path.parent) == [this.path.name]
    record = Bundle(this.path).manifest.verification["engines"]["tensorrt-rtx"]
    assert {dtype: record[dtype]["unverified"] for dtype in record} == dict.fromkeys(
        ("fp32", "fp16"), engines.UNVERIFIED
    )
    assert record["fp32"]["plain"] == "compiled from step.onnx"
    with RMTRuntime(this.path, engine="cpu", threads=1) as runtime:
        assert runtime.run(made(name).document(S)).segments == 1


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_record_tells_what_its_engine_is(name: str, dtype: str, built: dict[str, Built]) -> None:
    opened = Bundle(built[name].path)
    for one in (one for one in built[name].engines if one.record.dtype == dtype):
        engine = opened.file(one.file)
        record = read_record(opened.file(one.file.replace(".engine", ".json")), opened.spec)
        assert record == one.record
        assert (record.file, record.size, record.sha256) == (engine.name, engine.stat().st_size, sha256(engine))
        assert (record.engine, record.role) == ("tensorrt-rtx", "step")
        assert (record.flavour, record.version) == ("tensorrt_rtx", trt.__version__)
        machine = (platform.system(), platform.machine())
        assert (record.compute_capabilities, record.os, record.machine) == ((89, 120), *machine)
        assert (record.stripped, record.version_compatible, record.hardware_compatible) == (False, False, "none")
        known, initial = from_metadata(record.metadata, "the record")
        assert known == made(name).spec
        np.testing.assert_array_equal(initial[0], opened.initial()[0])
        assert record.graph["file"] == ("step.onnx" if dtype == "fp32" else None)
        assert (one.check is None) == (dtype == "fp32")


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_networks_inputs_and_outputs_are_those_of_the_spec(name: str, dtype: str, built: dict[str, Built]) -> None:
    rows = [-1, models.CLASSES] if name == "bert" else [-1, -1, models.VOCAB]
    for record in (one.record for one in built[name].engines if one.record.dtype == dtype):
        assert [(t["name"], t["dtype"], t["shape"]) for t in record.inputs] == [
            ("memory", "float32", [-1, M, WIDTH]), ("segment", "int64", [-1, -1]),
        ]  # fmt: skip
        outputs = [(t["name"], t["dtype"]) for t in record.outputs]
        assert outputs == [("new_memory", "float32"), ("logits", "float32")][: 2 if record.head == "all" else 1]
        if record.head == "all":
            assert record.outputs[1]["shape"] == rows
        assert record.profiles == (
            {
                "memory": {"min": [1, M, WIDTH], "opt": [4, M, WIDTH], "max": [4, M, WIDTH]},
                "segment": {"min": [1, 1], "opt": [4, S], "max": [4, S]},
            },
        )


def test_an_engine_without_logits_lacks_what_computes_them(built: dict[str, Built]) -> None:
    opened = Bundle(built["gpt2"].path)
    data = {one.record.head: opened.file(one.file).read_bytes() for one in built["gpt2"].engines[2:]}
    assert b"logits" in data["all"]
    assert b"logits" not in data["none"]
    kernels = {head: len(flavours.KERNEL.findall(data[head])) for head in data}
    assert 0 < kernels["none"] < kernels["all"]
    assert len(data["none"]) < len(data["all"]) - models.VOCAB * WIDTH * 2  # the embedding's second copy


def test_a_build_says_how_far_it_is(built: dict[str, Built]) -> None:
    stages = built["gpt2"].stages
    heads = [f"build {dtype} {head}" for dtype in ("fp32", "fp16") for head in ("all", "none")]
    assert list(stages) == [*heads[:2], "graph fp16", "check fp16", *heads[2:]]
    for stage in heads:
        shares = [done for done, _ in stages[stage][1:-1]]
        assert shares == sorted(shares)
        assert len(set(shares)) > 10


def test_the_heads_are_chosen_and_an_engine_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    path = copy_of(gated(), tmp_path)
    one = dataclasses.replace(ADA, heads=("all",))
    (first,) = add_engines(path, dtypes=("fp32", "fp32"), options=one)
    assert [t["name"] for t in first.record.inputs] == ["hidden", "table", "segment"]
    add_engines(path, dtypes=("fp32",), options=dataclasses.replace(one, optimization_level=1))
    add_engines(path, dtypes=("fp32",), options=dataclasses.replace(ADA, heads=("none",), max_batch=2))
    stems = [f"tensorrt-rtx-fp32-{rest}" for rest in ("all-sm89-b8", "none-sm89-b2")]
    assert left_in(path / "engines") == sorted(stem + suffix for stem in stems for suffix in (".engine", ".json"))
    assert Bundle(path).file(first.file).is_file()


def test_a_graph_of_the_bundles_own_without_logits_is_compiled_for_that_head(tmp_path: Path) -> None:
    path = copy_of(gated(), tmp_path)
    model = onnx.load(str(path / "step.onnx"))
    del model.graph.output[-1]
    name = "graphs/tensorrt-rtx-fp32-step-none.onnx"
    onnx.save(model, str(tmp_path / "headless.onnx"))
    entry = GraphEntry(name, "step", "tensorrt-rtx", "fp32", "none", 20)
    add_files(path, {name: tmp_path / "headless.onnx"}, (entry,))
    (whole, none) = add_engines(path, dtypes=("fp32",), options=ADA)
    assert (whole.record.graph["file"], none.record.graph["file"]) == ("step.onnx", name)
    assert [t["name"] for t in none.record.outputs] == ["new_hidden", "new_table"]


def test_a_graph_in_half_precision_comes_from_the_users_own_module_and_is_checked(
    half: Callable[..., GraphEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of(gated(), tmp_path)
    before, few = contents(path), dataclasses.replace(ADA, heads=("all",), check_segments=2)
    monkeypatch.setattr(graphs, "plain_graph", half)
    with pytest.raises(
        FormatError, match=r"a step of the user's own.*add_engines.path, dtypes=\('fp16',\), model=step"
    ):
        add_engines(path, dtypes=("fp16",), options=few)
    other = GatedStep()
    other.head.bias.data += 1
    with pytest.raises(FormatError, match="other weights"):
        add_engines(path, dtypes=("fp16",), options=few, model=other)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "step_reference", lambda step, *rest: step_reference(other, *rest))
        with pytest.raises(VerificationError, match="does not compute this model"):
            add_engines(path, dtypes=("fp16",), options=few, model=GatedStep())
    assert contents(path) == before
    assert left_in(path.parent) == [path.name]
    (made_here,) = add_engines(path, dtypes=("fp16",), options=few, model=GatedStep())
    assert made_here.check is not None
    assert 0 < made_here.check.largest < 1e-2


def test_attention_is_kept_whole_where_there_is_a_kernel_and_made_of_several_where_not(tmp_path: Path) -> None:
    kept = builder.build_plan(attention_graph(tmp_path / "a.onnx", "float16", 64), ONE_STATE, RTX, ADA)
    assert [len(kept.whole), len(kept.decomposable), kept.joined] == [1, 0, 1]
    assert "look" in kept.whole[0]
    for kind, width in (("float32", 64), ("float16", 8)):
        apart = builder.build_plan(attention_graph(tmp_path / "a.onnx", kind, width), ONE_STATE, RTX, ADA)
        assert [len(apart.whole), len(apart.decomposable), apart.joined] == [0, 1, 0]


def test_a_build_that_may_not_take_attention_apart_fails_with_the_builders_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "NO_KERNEL", "words that no builder says")
    path = attention_graph(tmp_path / "g.onnx", "float16", 8)
    with pytest.raises(EngineError, match=r"cannot build 'g.onnx' for 8\.9: .*[Dd]ecompos"):
        builder.build_plan(path, ONE_STATE, RTX, ADA)


def test_products_and_softmax_are_joined_in_one_kernel_for_each_layer(tmp_path: Path) -> None:
    """What the choice of the graph rests on, for heads of a size that the library has a kernel for."""
    model = models.make_model("bert", backbone={"num_attention_heads": 2, "num_hidden_layers": 1})
    initial, spec = {"memory": model.memory.detach().numpy()}, model.config.spec()
    graphs.plain_graph(model, spec, "fp16", tmp_path / "g.onnx", initial, opset=graphs.OPSETS["fp16"])
    plan = builder.build_plan(tmp_path / "g.onnx", spec, RTX, ADA)
    assert (plan.whole, plan.decomposable, plan.joined) == ((), (), 1)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    path = copy_of(made("gpt2").bundle, tmp_path)
    before, seen = contents(path), []

    def interrupt(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        if stage == "build fp32 none" and 0 < done < total and not any(s == "asked" for s, *_ in seen):
            seen.append(("asked", done, total))
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        add_engines(path, dtypes=("fp32",), options=TWO, progress=interrupt)
    assert ("build fp32 all", 1, 1) in seen
    assert ("build fp32 none", 1, 1) not in seen, "the build ran to its end"
    assert not [thread for thread in threading.enumerate() if thread.name == "rmt-build"]
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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU of compute capability 8.9, as far as the code before the library can tell."""
    monkeypatch.setattr(flavours.cuda, "refusal", lambda device: None)
    monkeypatch.setattr(flavours.machine, "capability", lambda device: 89)


@pytest.mark.usefixtures("gpu")
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_the_way_of_tensorrt_is_gone_with_the_other_library_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT needs a GPU to build. Its whole way is the other flavour's but for the choice of the GPU."""
    stand_in = dataclasses.replace(flavours.FLAVOURS["tensorrt"], module="tensorrt_rtx", oldest=(1, 4))
    monkeypatch.setitem(flavours.FLAVOURS, "tensorrt", stand_in)
    chosen: list[Any] = []
    monkeypatch.setattr(flavours, "prepare", lambda flavour, options: chosen.append((flavour, options.device)))
    real = flavours.target
    monkeypatch.setattr(flavours, "target", lambda flavour, *rest: real(RTX, *rest))
    path, cache = copy_of(gated(), tmp_path), tmp_path / "times.cache"
    options = BuildOptions(timing_cache=cache, optimization_level=3, workspace_mib=1024, device=1, heads=("all",))
    (one,) = add_engines(path, "tensorrt", ("fp32",), options)
    assert chosen == [(stand_in, 1)]
    assert one.file == "engines/tensorrt-fp32-all-sm89-b8.engine"
    assert one.record.compute_capabilities == (89,)
    assert cache.stat().st_size > 0


@pytest.mark.usefixtures("gpu")
def test_an_engine_without_weights_keeps_the_graph_that_has_them(
    half: Callable[..., GraphEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag itself needs a GPU's driver, so the builder is not told of it here; what goes into the bundle is real."""
    path = Path(shutil.copytree(gated(), tmp_path / "gated.rmt"))
    monkeypatch.setattr(builder, "configure", lambda *_: None)
    monkeypatch.setattr(graphs, "plain_graph", half)
    options = dataclasses.replace(ADA, strip_weights=True)
    one, none = add_engines(path, dtypes=("fp16",), options=options, model=GatedStep())
    assert one.file == "engines/tensorrt-rtx-fp16-all-sm89-b8-stripped.engine"
    assert one.record.stripped
    name = "graphs/tensorrt-rtx-fp16-step-all.onnx"
    assert one.record.graph == none.record.graph == {"file": name, "sha256": sha256(path / name)}
    entry = Bundle(path).graph("tensorrt-rtx", "fp16")
    assert entry is not None
    assert Bundle(path).graph_path(entry) == path / name
    again = add_engines(path, dtypes=("fp16",), options=options)  # from the graph that is there: no module is needed
    assert again[0].record.graph == one.record.graph


def test_options_reach_the_builders_config() -> None:
    config = trt.Builder(logger(trt)).create_builder_config()
    plain = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE), config.builder_optimization_level
    assert config.get_flag(trt.BuilderFlag.TF32), "what the code clears is on by default"
    builder.configure(trt, config, BuildOptions())
    assert (config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE), config.builder_optimization_level) == plain
    flags = (trt.BuilderFlag.TF32, trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.VERSION_COMPATIBLE)
    assert [config.get_flag(flag) for flag in flags] == [False, False, False]
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    wanted = BuildOptions(workspace_mib=64, optimization_level=5, strip_weights=True, version_compatible=True)
    builder.configure(trt, config, wanted)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.builder_optimization_level == 5
    assert [config.get_flag(flag) for flag in flags] == [False, True, True]


def test_the_target_is_the_gpus_that_were_named_or_those_like_the_one_that_is_here() -> None:
    config = trt.Builder(logger(trt)).create_builder_config()
    flavours.target(RTX, trt, config, (89, 120), BuildOptions())
    kinds = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
    assert kinds == [trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for level in ("ampere_plus", "same_compute_capability"):  # TensorRT-RTX takes the attribute and forgets it
        plain = SimpleNamespace()
        flavours.target(flavours.FLAVOURS["tensorrt"], trt, plain, (89,), BuildOptions(hardware_compatible=level))
        assert plain.hardware_compatibility_level == getattr(trt.HardwareCompatibilityLevel, level.upper())


def test_engines_that_differ_in_kind_have_names_that_differ() -> None:
    kinds = [
        BuildOptions(), BuildOptions(max_batch=1), BuildOptions(hardware_compatible="ampere_plus"),
        BuildOptions(version_compatible=True), BuildOptions(strip_weights=True),
    ]  # fmt: skip
    names = [engines.engine_name("tensorrt", "fp16", head, (80,), kind) for kind in kinds for head in ("all", "none")]
    assert len(set(names)) == len(names)
    assert names[0] == "tensorrt-fp16-all-sm80-b8"
    assert "tensorrt-fp16-none-sm80-ampere_plus-b8" in names


def test_tensorrt_builds_for_the_gpu_that_is_there_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    full = flavours.FLAVOURS["tensorrt"]
    monkeypatch.setattr(flavours.cuda, "refusal", lambda device: "no driver")
    with pytest.raises(EngineError, match=r"measures kernels on the GPU .*tensorrt-rtx does without one.*: no driver"):
        flavours.capabilities(full, None, BuildOptions())
    monkeypatch.setattr(flavours.cuda, "refusal", lambda device: None)
    monkeypatch.setattr(flavours.machine, "capability", lambda device: 90)
    assert flavours.capabilities(full, None, BuildOptions()) == (90,)
    assert flavours.capabilities(full, None, BuildOptions((90,))) == (90,)
    with pytest.raises(ContractError, match=r"has compute capability 9\.0; 8\.9, 12\.0 was asked for"):
        flavours.capabilities(full, None, BuildOptions((89, 120)))
