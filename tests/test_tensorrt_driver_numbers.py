"""The TensorRT engine's own code on a strict stand-in for its libraries and a GPU: its numbers.

What every engine must do is in test_conformance.py, where the stand-in takes part; what happens when this code has
mistakes is in test_tensorrt_mistakes.py.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_library
import tensorrt_rtx
import torch
from models import TOLERANCE, S, check_parity, made, reference, steps_of
from stand_in import Memory
from steps import LENGTH, TWO_STATES, GatedStep
from tensorrt_library import ACTIVATIONS, OFFERED, WEIGHTS
from tensorrt_stand_in import engine_bundle, engine_file, engine_of, tensorrt_host
from tensorrt_world import Violation, World, watched

from rmt_trt import RMTRuntime
from rmt_trt.export import ExportOptions, export_step_bundle
from rmt_trt.export.verify import engine_reference, random_document, relative_error, verify

ENGINES = ("tensorrt", "tensorrt-rtx")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with tensorrt_host(tmp_path / "cache") as found:
        yield found


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


def test_the_stand_in_takes_no_memory_that_is_gone() -> None:
    world = World()
    memory = watched(world, Memory(512))
    address = memory.handle
    assert world.place(address, 512)
    del memory
    with pytest.raises(Violation, match="do not lie in memory of the GPU"):
        world.place(address, 512)


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
