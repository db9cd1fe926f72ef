"""Mistakes put into the TensorRT engine's code on purpose: the test of the driver must see each of them.

A mistake is a change of the source. `drive` is that test: it passes without one, and fails with each for the reason that
stands beside it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from models import TOLERANCE, S, made
from tensorrt_stand_in import engine_bundle, tensorrt_host
from tensorrt_world import World

from rmt_trt import EngineError, RMTRuntime
from rmt_trt.export.verify import random_document, relative_error

BUCKETS, ROWS, VERSIONS, CONTEXTS, ENGINE = (
    "rmt_trt.runtime.buckets",
    "rmt_trt.runtime.device_rows",
    "rmt_trt.runtime.engines.tensorrt_versions",
    "rmt_trt.runtime.engines.tensorrt_contexts",
    "rmt_trt.runtime.engines.tensorrt",
)
# Each after those that it imports.
MODULES = (BUCKETS, ROWS, VERSIONS, "rmt_trt.runtime.engines.tensorrt_cache", CONTEXTS, ENGINE)
LENGTHS = (14 * S + 3, 1, 9 * S, 2 * S + 1)
PROFILE = 3  # no power of two
# Calls that fail once an engine is open, and which of them does: of those for every step a later one.
MUST_FAIL = {
    "deserialize_cuda_engine": 1, "create_execution_context": 1, "set_input_shape": 1, "set_tensor_address": 9,
    "execute_async_v3": 5,
}  # fmt: skip
DRIFT = "memory and logits are off"  # what `close_to` says of numbers that are not the reference's


@dataclass(frozen=True)
class Mistake:
    """In a module, `right` becomes `wrong`; the test then fails with words that match `seen`."""

    module: str
    right: str
    wrong: str
    seen: str


RELEASE = """\
                    for size in self._buckets:
                        _release_replays(self._buckets[size])
                    while self._loaded:
                        self._loaded.popitem()[1].release()
                    self._buckets.clear()
                    gpu.close()
"""
MISTAKES = {
    "ping and pong are swapped": Mistake(
        CONTEXTS, "bucket.sides[side], bucket.sides[1 - side], strict", "bucket.sides[1 - side], bucket.sides[side], strict",
        DRIFT,
    ),
    "both graphs go from A to B": Mistake(CONTEXTS, "partial(self.enqueue, side)", "partial(self.enqueue, 0)", DRIFT),
    "the same graph is replayed each time": Mistake(CONTEXTS, "self.graphs[side]", "self.graphs[0]", DRIFT),
    "what is written is what is read": Mistake(
        CONTEXTS, "int(source.handle), int(target.handle)", "int(source.handle), int(source.handle)",
        "'new_memory' lies where 'memory' is read from",
    ),
    "no plain run before a capture": Mistake(
        CONTEXTS, "            self.enqueue(side)\n        self.gpu.wait()\n", "            pass\n        self.gpu.wait()\n",
        "captured before it ran once",
    ),
    "no wait before a capture": Mistake(
        CONTEXTS, "            self.enqueue(side)\n        self.gpu.wait()\n", "            self.enqueue(side)\n",
        "captured while its first run may be under way",
    ),
    "a refused address is not seen": Mistake(
        CONTEXTS,
        """self.library.call(f"takes no address for '{name}'", self.context.set_tensor_address, name, address)""",
        "self.context.set_tensor_address(name, address)",
        "set_tensor_address failed unseen",
    ),
    "a step that was not enqueued is not seen": Mistake(
        CONTEXTS,
        'self.library.call("did not enqueue a step", self.context.execute_async_v3, int(self.stream.handle))',
        "self.context.execute_async_v3(int(self.stream.handle))",
        "execute_async_v3 failed unseen",
    ),
    "False is no failure": Mistake(VERSIONS, "value is None or value is False", "value is None", "failed unseen"),
    "None is no failure": Mistake(VERSIONS, "value is None or value is False", "value is False", "NoneType"),
    "the default stream": Mistake(CONTEXTS, "execute_async_v3, int(self.stream.handle)", "execute_async_v3, 0", "default stream"),
    "an input's shape is not set": Mistake(
        CONTEXTS, "shapes[SEGMENT] = (bucket.size, spec.segment_length)", "pass", "wants more than its inputs' shapes for segment"
    ),
    "the logits are not bound": Mistake(
        CONTEXTS, "return found | {name: int(buffer.handle) for name, (buffer, _) in outputs.items()}", "return found",
        r"address was not set of \['logits'\]",
    ),
    "no memory for intermediate values": Mistake(
        CONTEXTS, "        if self._workspace is not None:\n            address", "        if False:\n            address",
        "a context needs .* bytes of memory, and was given 0",
    ),
    "memory for intermediate values is renewed for each bucket": Mistake(
        CONTEXTS, "        if self._workspace is not None:\n            address",
        "        if self._workspace is not None:\n            self._workspace = self._gpu.allocate(self.memory.activations)\n"
        "            address",
        "a graph replays the address of memory that was freed",
    ),
    "the logits' memory grows with the buckets": Mistake(
        CONTEXTS, "        return {name: (self._gpu.allocate(LOGIT_BYTES * math.prod(shape)), shape) for name, shape in wanted}",
        "        made = {name: (self._gpu.allocate(LOGIT_BYTES * math.prod(shape)), shape) for name, shape in wanted}\n"
        "        older = self.__dict__.setdefault('older', [])\n"
        "        for one in older:\n"
        "            one.update({name: (made[name][0], shape) for name, (_, shape) in one.items()})\n"
        "        older.append(made)\n"
        "        return made",
        "a graph replays the address of memory that was freed",
    ),
    "kernels may come after the capture": Mistake(
        VERSIONS, "Strategy.EAGER", "Strategy.LAZY", "kernels that come later are not in a graph"
    ),
    "profilers are told details in every run": Mistake(
        VERSIONS, "context.nvtx_verbosity = verbosity.LAYER_NAMES_ONLY", "pass", "telling profilers the details"
    ),
    "a bucket is larger than the profile": Mistake(
        ENGINE, "min(1 << (batch - 1).bit_length(), self.max_batch)", "1 << (batch - 1).bit_length()", "is outside the profile"
    ),
    "padding is a token": Mistake(ROWS, "spec.segment_length), PAD, np.int64)", "spec.segment_length), 0, np.int64)", DRIFT),
    "the row of another token": Mistake(ROWS, "max(count - 1, 0)", "max(count - 2, 0)", DRIFT),
    "warm-up runs on a caller's states": Mistake(
        ENGINE, '            return self._through(bucket, self._replay(bucket, "none"), states, segments)',
        "            device_rows.enter(self._gpu, self._spec, bucket, states)\n"
        '            replay = self._replay(bucket, "none")\n'
        "            device_rows.advance(self._gpu, bucket, replay, segments)\n"
        "            return device_rows.leave(self._gpu, self._spec, bucket, states.batch, len(segments))",
        DRIFT,
    ),
    "states are a bucket's own memory": Mistake(
        BUCKETS, "    made = new_states(gpu, spec, batch)\n    for source, target",
        "    return States(batch, bucket.sides[steps % 2])\n    for source, target", DRIFT,
    ),
    "the memory comes from the engine with logits": Mistake(
        ENGINE, 'if head == "last" and "none" in self._files:', "if False:", "going on gives other numbers",
    ),
    "a call outside the engine's thread": Mistake(
        ENGINE, "    @on_worker\n    def steps", "    def steps", "used by another thread than the one that made it"
    ),
    "contexts go before their graphs": Mistake(
        CONTEXTS,
        "        for graph in self.graphs:\n            graph.close()\n        self.graphs = ()\n        self.context = None",
        "        self.context = None\n        for graph in self.graphs:\n            graph.close()\n        self.graphs = ()",
        "a context is released before what was captured of it",
    ),
    "contexts go while their work is under way": Mistake(
        CONTEXTS, "            self.gpu.wait()\n        for graph", "            pass\n        for graph",
        "a context is released while a step of it is under way",
    ),
    "engines go before their contexts": Mistake(
        ENGINE, "                        _release_replays(self._buckets[size])", "                        pass",
        "ICudaEngine is released before what was made of it",
    ),
    "runtimes go before their engines": Mistake(
        CONTEXTS, "        self._engine = None\n        self._runtime = None\n", "        self._runtime = None\n        self._engine = None\n",
        "Runtime is released before what was made of it",
    ),
    "streams go before the engines": Mistake(
        ENGINE, RELEASE, "                    gpu.close()\n" + RELEASE.replace("                    gpu.close()\n", ""),
        "a stream is closed before",
    ),
    "staged tokens are overwritten too early": Mistake(BUCKETS, "        stage.copied.sync()", "        pass", DRIFT),
    "tokens are staged over those that steps still read": Mistake(
        BUCKETS, "        gpu.copies.wait(stage.used)\n", "", DRIFT
    ),
    "steps do not wait for their tokens": Mistake(BUCKETS, "        gpu.stream.wait(stage.copied)\n", "", DRIFT),
}  # fmt: skip


@contextmanager
def made_in(mistake: Mistake, folder: Path) -> Iterator[None]:
    """While it is open, the engine's modules are copies, one of them with the mistake."""
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            source = inspect.getsource(importlib.import_module(name))
            if name == mistake.module:
                assert source.count(mistake.right) == 1, f"{name} no longer says: {mistake.right}"
                source = source.replace(mistake.right, mistake.wrong)
            path = folder / f"{name}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            parent, _, leaf = name.rpartition(".")
            patch.setattr(sys.modules[parent], leaf, module)
            spec.loader.exec_module(module)
        yield


@functools.cache
def wanted() -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """Documents, and the memory and logits that the CPU engine gives each."""
    documents = [random_document(made("gpt2").spec, length, row) for row, length in enumerate(LENGTHS)]
    with made("gpt2").open() as cpu:
        return documents, [(out.memory, out.logits) for out in cpu.run(documents, alignment="left")]


def close_to(found: list[tuple[np.ndarray, np.ndarray]], way: str) -> None:
    for row, (values, expected) in enumerate(zip(found, wanted()[1], strict=True)):
        errors = [relative_error(value, other) for value, other in zip(values, expected, strict=True)]
        assert max(errors) <= TOLERANCE, f"document {row}, {way}: memory and logits are off by {errors}"


def run_all_ways(runtime: RMTRuntime) -> None:
    """Alone, in batches, in slots, in two parts."""
    documents, _ = wanted()
    alone = [runtime.run(document, alignment="left") for document in documents]
    close_to([(out.memory, out.logits) for out in alone], "alone")
    together = runtime.run(documents, alignment="left")
    close_to([(out.memory, out.logits) for out in together], "in a batch")
    slots = dict(runtime.run_many(documents, slots=2, alignment="left"))
    close_to([(slots[row].memory, slots[row].logits) for row in range(len(documents))], "in slots")
    whole = alone[0]
    for cut in (S, 3 * S + 7):
        state = runtime.run(documents[0][:cut], alignment="left").state
        rest = runtime.run(documents[0][cut:], state, alignment="left")
        same = np.array_equal(rest.memory, whole.memory) and np.array_equal(rest.logits, whole.logits)
        assert same, f"going on gives other numbers after {cut} tokens"


def fails_aloud(world: World, runtime: RMTRuntime, call: str, number: int) -> None:
    world.fail(call, number)
    said = ""
    try:
        runtime.run([wanted()[0][0]] * 2)
    except EngineError as err:
        said = str(err)
    assert f"{call} was made to fail" in said, f"{call} failed unseen: {said}"


def drive(bundle: Path, folder: Path) -> None:
    """The test of the driver: numbers of the reference every way, in any order of the streams' work; nothing that the
    library would have suffered from; every failure of it seen.
    """
    with tensorrt_host(folder) as world, RMTRuntime(bundle, engine="tensorrt-rtx") as runtime:
        run_all_ways(runtime)
        world.check()
        assert world.launched > world.captured > 0, "nothing was captured"
    for call, number in MUST_FAIL.items():
        with tensorrt_host(folder) as world:
            world.flaws["capturable"] = False
            with RMTRuntime(bundle, engine="tensorrt-rtx") as runtime:
                fails_aloud(world, runtime, call, number)
    for seed in range(4):
        with tensorrt_host(folder, seed=seed) as world:
            world.fail("execute_async_v3", 2)
            with pytest.raises(EngineError, match="execute_async_v3 was made to fail"):
                RMTRuntime(bundle, engine="tensorrt-rtx")
        with tensorrt_host(folder, seed=seed), RMTRuntime(bundle, engine="tensorrt-rtx") as runtime:
            found = [runtime.run(document, alignment="left") for document in wanted()[0]]
            close_to([(out.memory, out.logits) for out in found], f"streams of seed {seed}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_bundle(tmp_path_factory.mktemp("bundle"), "gpt2", "tensorrt-rtx", ("all", "none"), PROFILE)


def outcome(bundle: Path, folder: Path) -> str:
    """What the test says; nothing where it passes."""
    try:
        drive(bundle, folder)
    except Exception as err:
        return f"{type(err).__name__}: {err}"
    return ""


def test_the_driver_passes_as_it_is(bundle: Path, tmp_path: Path) -> None:
    assert outcome(bundle, tmp_path) == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_seen(name: str, bundle: Path, tmp_path: Path) -> None:
    wanted()
    with made_in(MISTAKES[name], tmp_path):
        seen = outcome(bundle, tmp_path / "cache")
    assert re.search(MISTAKES[name].seen, seen), seen or "the mistake was not seen"
