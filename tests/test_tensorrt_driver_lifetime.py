"""What the TensorRT engine's own code keeps and gives back: compiled kernels, threads, all that a library gave."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from models import S, made
from tensorrt_stand_in import engine_bundle, engine_file, engine_of, tensorrt_host
from tensorrt_world import World

from rmt_trt import RMTRuntime
from rmt_trt.export.verify import random_document

ENGINES = ("tensorrt", "tensorrt-rtx")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with tensorrt_host(tmp_path / "cache") as found:
        yield found


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
