"""What of TensorRT a look inside an engine needs, over the stand-in of its library: the inspector and the profiler.

They say what a test has put into `World.flaws`: "information", the inspector's text; "times", a function of the number
of a timed step that gives (layer, milliseconds).
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorrt_library import ICudaEngine, IExecutionContext, Owned
from tensorrt_stand_in import tensorrt_host
from tensorrt_world import Step, World

from rmt_trt.runtime import machine

# Every name that stands here, by class.
INSPECTED: dict[str, tuple[str, ...]] = {
    "EngineInspector": ("execution_context", "get_engine_information"),
    "IProfiler": ("report_layer_time",),
    "ICudaEngine": ("create_engine_inspector", "get_tensor_format", "get_tensor_format_desc"),
    "IExecutionContext": ("profiler", "enqueue_emits_profile", "report_to_profiler"),
    "LayerInformationFormat": ("ONELINE", "JSON"),
    "TensorFormat": ("LINEAR", "HWC8"),
}


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class TensorFormat(enum.Enum):
    LINEAR, HWC8 = range(2)


class IProfiler:
    def __init__(self) -> None:
        self.made = True

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class EngineInspector(Owned):
    kind = "EngineInspector"

    def __init__(self, world: World, engine: ICudaEngine) -> None:
        super().__init__(world, engine)
        self._engine, self._context = engine, None

    @property
    def execution_context(self) -> Any:
        return self._context

    @execution_context.setter
    def execution_context(self, context: Any) -> None:
        self._mine()
        if self._world.fails("execution_context") or context._engine() is not self._engine:
            self._world.say("ERROR", "stand-in: the context was not made by the engine")
            return
        self._context = context

    def get_engine_information(self, kind: LayerInformationFormat) -> Any:
        self._mine()
        assert kind is LayerInformationFormat.JSON
        if self._world.fails("get_engine_information"):
            return None
        if self._context is None or self._context.infer_shapes():
            self._world.refuse("formats are not known before shapes are")
        told = self._world.flaws["information"]
        return told if isinstance(told, str) else json.dumps(told)

    def __del__(self) -> None:
        self._gone()


def _create_engine_inspector(engine: Any) -> Any:
    engine._mine()
    return None if engine._world.fails("create_engine_inspector") else EngineInspector(engine._world, engine)


def _report_to_profiler(context: Any) -> bool:
    context._mine()
    world = context._world
    if world.fails("report_to_profiler"):
        return False
    if context.profiler is None or context._timed is None:
        world.say("ERROR", "stand-in: there is no profiler, or no step was enqueued for it")
        return False
    stream, synced = context._timed
    if stream.synced <= synced:
        world.refuse("times are asked for while the step may be under way")
    context._timed = None
    _tell(context)
    return True


def _tell(context: Any) -> None:
    world = context._world
    assert context.profiler.made, "a profiler whose base was not initialised"
    world.calls["timed steps"] += 1
    for name, milliseconds in world.flaws["times"](world.calls["timed steps"]):
        context.profiler.report_layer_time(name, milliseconds)


_enqueue = IExecutionContext.execute_async_v3


def _execute_async_v3(context: Any, stream_handle: int) -> bool:
    done = _enqueue(context, stream_handle)
    stream = context._world.stream(stream_handle)
    if done and context.profiler is not None and stream.capture is None:
        if context.enqueue_emits_profile:
            _tell(context)
        else:
            context._timed = (stream, stream.synced)
    return done


_run = Step._run


def _recorded(step: Any, arrays: Any, scratch: Any) -> None:
    step._world.flaws.setdefault("segments", []).append(arrays["segment"].copy())
    _run(step, arrays, scratch)


@contextmanager
def inspected_host(
    cache: Path, packages: tuple[str, ...] = ("tensorrt", "tensorrt_rtx"), **flaws: Any
) -> Iterator[World]:
    """`tensorrt_host` with an inspector and a profiler, which the small runtimes lack as in reality."""
    with tensorrt_host(cache, packages=packages) as world, pytest.MonkeyPatch.context() as patch:
        world.flaws.update(flaws)
        for name in packages:
            module = machine.module(name, "", "")
            kinds = [LayerInformationFormat, TensorFormat, IProfiler]
            for kind in kinds if name == "tensorrt_lean" else [*kinds, EngineInspector]:
                patch.setattr(module, kind.__name__, kind, raising=False)
        members: dict[Any, dict[str, Any]] = {
            ICudaEngine: {
                "create_engine_inspector": _create_engine_inspector,
                "get_tensor_format": lambda engine, name: TensorFormat.LINEAR,
                "get_tensor_format_desc": lambda engine, name: f"Row major linear format ({name})",
            },
            IExecutionContext: {
                "profiler": None, "enqueue_emits_profile": True, "_timed": None,
                "report_to_profiler": _report_to_profiler, "execute_async_v3": _execute_async_v3,
            },
            Step: {"_run": _recorded},
        }  # fmt: skip
        for kind, names in members.items():
            for member, value in names.items():
                patch.setattr(kind, member, value, raising=False)
        yield world
