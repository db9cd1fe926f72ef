"""The TensorRT engine's own code on a strict stand-in for its libraries and a GPU: numbers, refusals, releases.

What every engine must do is in test_conformance.py, where the stand-in takes part; what happens when this code has
mistakes is in test_tensorrt_mistakes.py.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_library
import tensorrt_rtx
import torch
from models import TOLERANCE, M, S, check_parity, made, reference, steps_of
from stand_in import Memory
from steps import LENGTH, TWO_STATES, GatedStep
from tensorrt_library import ACTIVATIONS, OFFERED, WEIGHTS
from tensorrt_stand_in import engine_bundle, engine_file, tensorrt_host
from tensorrt_world import StrictGpu, Violation, World, watched

from rmt_trt import EngineError, RMTRuntime
from rmt_trt.errors import ContractError, FormatError
from rmt_trt.export import ExportOptions, export_step_bundle
from rmt_trt.export.verify import engine_reference, random_document, relative_error, verify
from rmt_trt.runtime.engines import tensorrt_versions
from rmt_trt.runtime.engines.tensorrt import TensorRTEngine

ENGINES = ("tensorrt", "tensorrt-rtx")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with tensorrt_host(tmp_path / "cache") as found:
        yield found


def engine_of(runtime: RMTRuntime) -> TensorRTEngine:
    engine = runtime._engine
    assert isinstance(engine, TensorRTEngine)
    return engine


@pytest.mark.parametrize("flavour", sorted(OFFERED))
def test_every_name_of_the_stand_in_is_one_of_the_real_library(flavour: str) -> None:
    for kind, members in OFFERED[flavour].items():
        real = getattr(tensorrt_rtx, kind)
        missing = [member for member in members if not hasattr(real, member)]
        assert not missing, f"{kind} has no {missing}"
        own = getattr(tensorrt_library, kind)
        made_here = {name for name in {*vars(own)} if not name.startswith("_")} - {
            "kind",
            "strategy",
            "cache",
            "kernels",
        }
        assert made_here - set(OFFERED["tensorrt_rtx"][kind]) <= {"MAGIC"}, kind


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_an_engine_by_itself_follows_the_recurrence_over_20_segments(
    name: str, engine: str, world: World, tmp_path: Path
) -> None:
    length = 19 * S + 3
    with RMTRuntime(engine_file(tmp_path, made(name).bundle, engine)) as runtime:
        assert (runtime.engine, runtime.dtype) == (engine, "fp32")
        for alignment in ("left", "right", "center"):
            wanted = reference(name, length, alignment)
            check_parity(steps_of(runtime, made(name).document(length), alignment=alignment), wanted, alignment)
            out = runtime.run(made(name).document(length), alignment=alignment)
            last = wanted[-1][1] if name == "bert" else wanted[-1][1][-1]
            check_parity([(out.memory, out.logits)], [(wanted[-1][0], last)], alignment)
    assert world.launched > 60


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bundle_with_two_engines_runs_batches_and_many_and_goes_on_from_states(
    engine: str, world: World, tmp_path: Path
) -> None:
    bundle = engine_bundle(tmp_path, "gpt2", engine, heads=("all", "none"))
    documents = [random_document(made("gpt2").spec, length, seed) for seed, length in enumerate([65, 1, 20, 21, 140])]
    with RMTRuntime(bundle, engine="cpu", threads=1) as cpu:
        wanted = cpu.run(documents, alignment="left")
    with RMTRuntime(bundle, engine=engine) as runtime:
        many = dict(runtime.run_many(documents, slots=3, alignment="left"))
        for row, (found, alone) in enumerate(zip(runtime.run(documents, alignment="left"), wanted, strict=True)):
            for out in (found, many[row]):
                check_parity([(out.memory, out.logits)], [(alone.memory, alone.logits)], f"document {row}")
        whole = runtime.run(documents[4], alignment="left")
        for cut in (S, 3 * S, 3 * S + 7):
            runtime.run(documents[4][:cut], alignment="left").state.save(tmp_path / "state")
            out = runtime.run(documents[4][cut:], runtime.load_state(tmp_path / "state"), alignment="left")
            assert np.array_equal(out.memory, whole.memory)
            assert np.array_equal(out.logits, whole.logits)


def test_where_no_logits_are_asked_for_the_engine_without_runs_and_the_other_is_not_loaded(
    world: World, tmp_path: Path
) -> None:
    bundle = engine_bundle(tmp_path, "gpt2", "tensorrt", heads=("all", "none"))
    with RMTRuntime(bundle, engine="tensorrt") as runtime:
        runtime.run(random_document(runtime.spec, 5 * S + 3, 0), logits="none")
        assert [name.split("-")[2] for name in engine_of(runtime).device_memory] == ["none"]
        runtime.run(random_document(runtime.spec, 5 * S + 3, 0))
        memory = engine_of(runtime).device_memory
        assert [name.split("-")[2] for name in memory] == ["none", "all"]
        assert {(one.weights, one.activations) for one in memory.values()} == {(WEIGHTS, ACTIVATIONS)}


def test_device_memory_is_logged(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "rmt_trt"),
        RMTRuntime(engine_file(tmp_path, made("bert").bundle)),
    ):
        assert "on GPU 0: 3.0 MiB of weights, 0.1 MiB for intermediate values" in caplog.text


class HalfTable(GatedStep):
    """Two states, one of them carried in half precision."""

    def forward(self, hidden: torch.Tensor, table: torch.Tensor, segment: torch.Tensor) -> Any:
        new, written, logits = super().forward(hidden, table.float(), segment)
        return new, written.half(), logits


def test_a_step_of_several_states_and_dtypes_follows_the_cpu_engine(world: World, tmp_path: Path) -> None:
    states = (TWO_STATES.states[0], dataclasses.replace(TWO_STATES.states[1], dtype="float16"))
    path = tmp_path / "gated.rmt"
    options = ExportOptions(segments=2, tolerance=2e-3)
    export_step_bundle(HalfTable(), TWO_STATES.with_(states=states), path, options=options)
    documents = [random_document(TWO_STATES, length, length) for length in (6 * LENGTH + 5, 1, 2 * LENGTH)]
    with RMTRuntime(path, engine="cpu", threads=1) as cpu, RMTRuntime(engine_file(tmp_path, path)) as runtime:
        found, wanted = (each.run(documents, alignment="left") for each in (runtime, cpu))
        for row in range(len(documents)):
            assert [value.dtype for value in found[row].states.values()] == [np.float32, np.float16]
            for name, value in wanted[row].states.items():
                assert relative_error(found[row].states[name], value) <= 2e-3
            assert relative_error(found[row].logits, wanted[row].logits) <= 2e-3


# What an engine takes.


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_profile_of_any_size_runs_batches_of_any_size(batch: int, world: World, tmp_path: Path) -> None:
    documents = [random_document(made("bert").spec, 3 * S + seed, seed) for seed in range(7)]
    with made("bert").open() as cpu, RMTRuntime(engine_file(tmp_path, made("bert").bundle, batch=batch)) as runtime:
        assert runtime.max_batch == batch
        for found, wanted in zip(runtime.run(documents), cpu.run(documents), strict=True):
            check_parity([(found.memory, found.logits)], [(wanted.memory, wanted.logits)])
        assert max(engine_of(runtime)._buckets) == batch


@pytest.mark.parametrize("batch", [1, 3])
def test_an_engine_for_few_documents_is_verified(batch: int, world: World, tmp_path: Path) -> None:
    with made("bert").open() as cpu, RMTRuntime(engine_file(tmp_path, made("bert").bundle, batch=batch)) as runtime:
        report = verify(runtime, engine_reference(cpu), segments=2)
        report.require()
        assert max(engine_of(runtime)._buckets) == batch


def test_more_documents_than_the_profile_takes_are_refused_with_what_to_do(world: World, tmp_path: Path) -> None:
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle, batch=2), max_batch=5) as runtime:
        documents = [random_document(runtime.spec, S, seed) for seed in range(3)]
        with pytest.raises(
            ContractError, match=r"stream got 3 documents; .* max_batch=2 together\. Build .* --max-batch 3"
        ):
            runtime.stream(documents)
        with pytest.raises(ContractError, match=r"slots is 3; expected .* from 1 to 2\. Build .* --max-batch 3"):
            runtime.run_many(documents, slots=3)
        states = engine_of(runtime).load(tuple(np.stack([value] * 3) for value in runtime.initial))
        with pytest.raises(
            ContractError, match=r"a step of 3 documents; engine '.*' takes at most 2\. .* --max-batch 3"
        ):
            engine_of(runtime).steps(states, np.stack(documents)[None])


def test_an_engine_for_fewer_documents_than_asked_for_lowers_max_batch_and_says_so(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "rmt_trt"),
        RMTRuntime(engine_file(tmp_path, made("bert").bundle, batch=2)) as runtime,
    ):
        assert runtime.max_batch == 2
        assert "max_batch is 2, for which the engine was built, not 64" in caplog.text


# What goes wrong.


def told(call: str) -> str:
    return f"stand-in: {call} was made to fail"


@pytest.mark.parametrize(
    "call",
    [
        "deserialize_cuda_engine", "create_runtime_config", "create_runtime_cache", "set_runtime_cache",
        "create_execution_context", "set_device_memory", "set_input_shape", "infer_shapes", "set_tensor_address",
        "execute_async_v3",
    ],
)  # fmt: skip
def test_what_fails_while_an_engine_is_opened_says_why_and_leaves_nothing(
    call: str, world: World, tmp_path: Path
) -> None:
    path = engine_file(tmp_path, made("bert").bundle)
    world.fail(call)
    with pytest.raises(EngineError, match=rf"TensorRT-RTX 1\.7\.1\.116 .*{told(call)}"):
        RMTRuntime(path)
    gc.collect()
    assert not list(world.alive), "something of the library is still there"
    assert not [memory for memory in world.memory if memory.size], "memory of the GPU is still there"
    assert all(stream.closed for stream in world.streams.values())
    with RMTRuntime(path) as runtime:
        runtime.run(random_document(runtime.spec, 2 * S, 0))


@pytest.mark.parametrize("number", range(1, 5))
def test_a_gpu_without_memory_leaves_nothing_either(number: int, world: World, tmp_path: Path) -> None:
    path = engine_file(tmp_path, made("bert").bundle)
    world.fail("allocate", number)
    with pytest.raises(EngineError, match=r"gave no \d+ bytes of memory"):
        RMTRuntime(path)
    gc.collect()
    assert not list(world.alive)
    assert all(stream.closed for stream in world.streams.values())


def test_a_replay_that_fails_is_an_engine_error_and_earlier_states_stay(world: World, tmp_path: Path) -> None:
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle)) as runtime:
        tokens = random_document(runtime.spec, 6 * S, 0)
        wanted = runtime.run(tokens)
        world.fail("launch", 4)
        with pytest.raises(EngineError, match="TensorRT failed in a step of 1 documents: CUDA_ERROR_LAUNCH_FAILED"):
            runtime.run(tokens)
        assert np.array_equal(runtime.run(tokens).memory, wanted.memory)


@pytest.mark.parametrize("call", ["set_tensor_address", "execute_async_v3"])
def test_a_step_that_is_not_enqueued_is_an_engine_error(call: str, world: World, tmp_path: Path) -> None:
    world.flaws["streamable_weights_size"] = 1
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle)) as runtime:
        tokens = random_document(runtime.spec, 6 * S, 0)
        wanted = runtime.run(tokens)
        world.fail(call, 4)
        with pytest.raises(EngineError, match=told(call)):
            runtime.run(tokens)
        assert np.array_equal(runtime.run(tokens).memory, wanted.memory)


def spoiled(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def test_an_engine_file_that_was_altered_is_not_loaded(world: World, tmp_path: Path) -> None:
    path = spoiled(engine_file(tmp_path, made("bert").bundle), lambda data: data[:-1] + b"?")
    with pytest.raises(FormatError, match=r"is not the engine that its record describes \(SHA-256 differs\)"):
        RMTRuntime(path)
    assert not world.calls["deserialize_cuda_engine"]


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"outputs": []}, r"the engine has the tensors \['memory', 'segment'\]; its record says"),
        ({"inputs": [{"name": "memory", "dtype": "float16", "shape": [-1, M, 32]}, {"name": "segment", "dtype": "int64", "shape": [-1, -1]}]}, r"the engine's 'memory' is .*HALF of shape \(-1, 4, 32\); its record says float32"),
        ({"profile": {"memory": {"min": [1, M, 32], "opt": [2, M, 32], "max": [2, M, 32]}, "segment": {"min": [1, 1], "opt": [2, S], "max": [2, S]}}}, r"the engine takes .* for 'memory'; its record says"),
    ],
)  # fmt: skip
def test_an_engine_that_is_not_what_its_record_says_is_refused(
    lie: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    world.flaws["engine"] = lie
    with pytest.raises(FormatError, match=message):
        RMTRuntime(engine_file(tmp_path, made("bert").bundle))


def test_an_engine_file_that_cannot_be_read_to_its_end_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Torn:
        def __init__(self, file: Any) -> None:
            self._file = file

        def read(self, count: int) -> bytes:
            if self._file.tell() > 40:
                raise OSError(5, "Input/output error")
            return bytes(self._file.read(min(count, 30)))

        def seek(self, offset: int, whence: int) -> int:
            return int(self._file.seek(offset, whence))

    kept = tensorrt_versions._file_reader
    monkeypatch.setattr(tensorrt_versions, "_file_reader", lambda trt: lambda file: kept(trt)(Torn(file)))
    with pytest.raises(EngineError, match=r"cannot load .*Input/output error"):
        RMTRuntime(engine_file(tmp_path, made("bert").bundle))


def test_an_engine_file_is_read_in_pieces(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_versions, "READ_BYTES", 7)
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle)) as runtime:
        runtime.run(random_document(runtime.spec, S, 0))


# What is not captured.


@pytest.mark.parametrize(
    ("flaw", "engine"),
    [("streamable_weights_size", "tensorrt"), ("streamable_weights_size", "tensorrt-rtx"), ("capturable", "tensorrt-rtx")],
)  # fmt: skip
def test_an_engine_that_cannot_be_captured_gives_the_same_step_by_step(
    flaw: str, engine: str, world: World, tmp_path: Path
) -> None:
    world.flaws[flaw] = 1 if flaw == "streamable_weights_size" else False
    tokens = made("gpt2").document(19 * S + 3)
    with RMTRuntime(engine_file(tmp_path, made("gpt2").bundle, engine)) as runtime:
        check_parity(steps_of(runtime, tokens, alignment="left"), reference("gpt2", len(tokens), "left"))
    assert (world.captured, world.launched) == (0, 0)
    assert world.enqueued == 20 + 2


def test_a_capture_that_fails_is_said_and_steps_are_enqueued_one_by_one(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.fail("begin_building", 2)
    tokens = made("bert").document(19 * S + 3)
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle)) as runtime:
        assert "enqueued one by one, not replayed from a CUDA graph" in caplog.text
        assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in caplog.text
        check_parity(steps_of(runtime, tokens, alignment="left"), reference("bert", len(tokens), "left"))
    assert world.launched == 0


def test_an_engine_without_intermediate_values_needs_no_memory_for_them(world: World, tmp_path: Path) -> None:
    world.flaws["activations"] = 0
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle)) as runtime:
        runtime.run(random_document(runtime.spec, S, 0))
    assert not world.calls["set_device_memory"]


# Packages.


@pytest.mark.parametrize("package", ["tensorrt_lean", "tensorrt_dispatch"])
def test_a_version_compatible_engine_runs_with_the_small_packages(package: str, tmp_path: Path) -> None:
    path = engine_file(tmp_path, made("bert").bundle, "tensorrt", version_compatible=True)
    tokens = made("bert").document(3 * S)
    with tensorrt_host(tmp_path / "cache", packages=(package,)), RMTRuntime(path) as runtime:
        check_parity(steps_of(runtime, tokens, alignment="left"), reference("bert", len(tokens), "left"))


# The kernels that TensorRT-RTX compiles.


def caches(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def open_and_run(path: Path) -> None:
    with RMTRuntime(path) as runtime:
        runtime.run([random_document(runtime.spec, 2 * S, seed) for seed in range(2)])


def test_compiled_kernels_are_kept_for_the_next_process(world: World, tmp_path: Path) -> None:
    path = engine_file(tmp_path, made("bert").bundle)
    open_and_run(path)
    (kept,) = caches(tmp_path / "cache")
    assert kept.parent == tmp_path / "cache" / "rmt-trt" / "tensorrt-rtx"
    assert kept.name.startswith("NVIDIA_Test-13.0-1.7.1.116-")
    assert kept.stat().st_mode & 0o077 == kept.stat().st_mode & 0o044  # nobody else writes it
    assert len(world.compiled) == 2  # of one document and of two
    world.compiled.clear()
    before = kept.stat().st_mtime_ns
    open_and_run(path)
    assert not world.compiled
    assert kept.stat().st_mtime_ns == before  # nothing was added
    open_and_run(engine_file(tmp_path, made("gpt2").bundle))
    assert len(caches(tmp_path / "cache")) == 2  # each engine has its own


def test_a_damaged_cache_is_ignored_and_replaced(world: World, tmp_path: Path) -> None:
    path = engine_file(tmp_path, made("bert").bundle)
    open_and_run(path)
    (kept,) = caches(tmp_path / "cache")
    whole = kept.read_bytes()
    for damage in (b"", b"\0" * 100, whole[5:]):
        kept.write_bytes(damage)
        open_and_run(path)
        assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_fails_no_run(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    open_and_run(engine_file(tmp_path, made("bert").bundle))
    assert caplog.text.count("compiled kernels are not kept for the next start") == 1


@pytest.mark.parametrize("given", ["", "not/absolute"])
def test_without_a_folder_of_its_own_the_cache_lies_in_the_home(
    given: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_and_run(engine_file(tmp_path, made("bert").bundle))
    assert caches(tmp_path / "home" / ".cache" / "rmt-trt" / "tensorrt-rtx")


def test_tensorrt_itself_keeps_no_kernels(world: World, tmp_path: Path) -> None:
    open_and_run(engine_file(tmp_path, made("bert").bundle, "tensorrt"))
    assert not caches(tmp_path / "cache")


# Threads, closing.


def test_one_thread_makes_all_calls_whoever_asks(tmp_path: Path) -> None:
    with (
        tensorrt_host(tmp_path / "cache") as world,
        RMTRuntime(engine_file(tmp_path, made("bert").bundle, "tensorrt")) as runtime,
    ):
        tokens = random_document(runtime.spec, 3 * S + 1, 3)
        wanted = runtime.run(tokens)
        with ThreadPoolExecutor(3) as callers:
            for out in callers.map(runtime.run, [tokens] * 6):
                assert np.array_equal(out.memory, wanted.memory)
        assert len(world.threads) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_everything_is_released_in_its_order_and_closing_twice_is_nothing(
    engine: str, world: World, tmp_path: Path
) -> None:
    bundle = engine_bundle(tmp_path, "gpt2", engine, heads=("all", "none"))
    with RMTRuntime(bundle, engine=engine) as runtime:
        runtime.run([random_document(runtime.spec, 2 * S + 3, seed) for seed in range(3)])
        inner = engine_of(runtime)
        world.released.clear()
    inner.close()
    order = [name for name in world.released if name != "memory"]
    # One engine on a bucket of 1, both on one of 4: each context behind its two graphs.
    assert order[: order.index("ICudaEngine")] == ["Graph", "Graph", "IExecutionContext"] * 3
    assert order[order.index("ICudaEngine") :] == ["ICudaEngine", "Runtime"] * 2 + ["stream"] * 2
    assert "memory" not in world.released[world.released.index("stream") :]
    assert not list(world.alive)


def test_states_outlive_the_engine(world: World, tmp_path: Path) -> None:
    with RMTRuntime(engine_file(tmp_path, made("bert").bundle)) as runtime:
        tokens = random_document(runtime.spec, 3 * S, 0)
        wanted = runtime.run(tokens).memory
        kept = runtime.run(tokens, on_device=True).memory
    assert np.array_equal(np.asarray(kept).reshape(wanted.shape), wanted)


# The order of work on the streams.


@pytest.mark.parametrize("seed", range(4))
def test_answers_do_not_depend_on_when_the_gpu_does_its_work(seed: int, tmp_path: Path) -> None:
    bundle = engine_bundle(tmp_path, "gpt2", "tensorrt-rtx", heads=("all", "none"))
    documents = [random_document(made("gpt2").spec, length, row) for row, length in enumerate((9 * S + 3, 1, 5 * S))]
    with RMTRuntime(bundle, engine="cpu", threads=1) as cpu:
        wanted = cpu.run(documents, alignment="left")
    with tensorrt_host(tmp_path / "cache", seed=seed), RMTRuntime(bundle, engine="tensorrt-rtx") as runtime:
        ways = [runtime.run(documents, alignment="left"), dict(runtime.run_many(documents, slots=2, alignment="left"))]
        for found in ways:
            for row in range(len(documents)):
                assert relative_error(found[row].memory, wanted[row].memory) <= TOLERANCE
                assert relative_error(found[row].logits, wanted[row].logits) <= TOLERANCE


@pytest.mark.parametrize(
    ("error", "seen", "message"),
    [
        (ZeroDivisionError("by zero"), EngineError, r"captured no CUDA graph\. The driver says: by zero"),
        (EngineError("the library's own words"), EngineError, "^the library's own words$"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ],
)
@pytest.mark.parametrize("spoils", [False, True])
def test_a_capture_has_ended_whatever_is_raised_in_it_and_that_is_what_is_said(
    spoils: bool, error: BaseException, seen: type[BaseException], message: str
) -> None:
    gpu = StrictGpu(0, World())

    def work() -> None:
        if spoils:
            with pytest.raises(EngineError, match="a capture is spoiled"):
                gpu.wait()
        raise error

    with pytest.raises(seen, match=message):
        gpu.captured(work)
    assert gpu.stream.capture is None
    gpu.wait()


def test_the_stand_in_takes_no_memory_that_is_gone() -> None:
    world = World()
    memory = watched(world, Memory(512))
    address = memory.handle
    assert world.place(address, 512)
    del memory
    with pytest.raises(Violation, match="do not lie in memory of the GPU"):
        world.place(address, 512)
