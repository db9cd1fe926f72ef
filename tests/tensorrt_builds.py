"""What the tests of TensorRT builds share: graphs by hand, copies of bundles, what a folder holds."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from shared import once
from steps import TWO_STATES, GatedStep

from rmt_trt.bundle import LOCK
from rmt_trt.export import ExportOptions, export_step_bundle
from rmt_trt.export.tensorrt import BuildOptions, flavours

RTX = flavours.FLAVOURS["tensorrt-rtx"]
# Level 0 builds as fast as it gets, and nothing here is about speed.
ADA = BuildOptions((89,), check_segments=0, optimization_level=0)
NODE = helper.make_node
MEAN = NODE("ReduceMean", ["new_memory", "axes"], ["mean"], keepdims=0)
HEAD = NODE("Slice", ["mean", "zero", "three", "one"], ["logits"])


@functools.cache
def gated() -> Path:
    """A bundle of a user's own step, made once per session, so nobody may change its files."""
    options = ExportOptions(segments=3)
    return once("gated.rmt", lambda path: export_step_bundle(GatedStep(), TWO_STATES, path, options=options))


def copy_of(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle, alone in a new folder, to add to."""
    return Path(shutil.copytree(bundle, folder / "work" / bundle.name))


def contents(path: Path) -> dict[str, bytes]:
    """Every file but the lock, which a writer leaves behind."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != LOCK)
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def graph(
    path: Path,
    *nodes: Any,
    batch: Any = "b",
    logits: str = "logits",
    kind: int = TensorProto.FLOAT,
    weights: dict[str, np.ndarray] | None = None,
    domains: tuple[str, ...] = (),
) -> Path:
    """A graph with the inputs and outputs of `steps.ONE_STATE`, or nearly; `nodes` are its own."""
    nodes = nodes or (NODE("Identity", ["memory"], ["new_memory"]), MEAN, NODE("Slice", [*HEAD.input], [logits]))
    constants = {"axes": [1], "zero": [0], "three": [3], "one": [1]}
    value = helper.make_tensor_value_info
    made_of = helper.make_graph(
        list(nodes), "step",
        [value("memory", kind, [batch, 1, 8]), value("segment", TensorProto.INT64, [batch, "s"])],
        [value("new_memory", kind, [batch, 1, 8]), value(logits, kind, [batch, 3])],
        [
            *(helper.make_tensor(name, TensorProto.INT64, [1], values) for name, values in constants.items()),
            *(numpy_helper.from_array(array, name) for name, array in (weights or {}).items()),
        ],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(made_of, opset_imports=opsets, ir_version=10), str(path))
    return path


def attention_graph(path: Path, kind: str, width: int) -> Path:
    """One head of attention of `width` over a few positions that are made of the memory, in "float32" or "float16"."""
    dtype = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[kind]
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal((8, 4 * width)).astype(kind) for name in ("wide query", "wide key", "wide value")
    }
    weights["narrow"] = rng.standard_normal((width, 8)).astype(kind)
    nodes = [NODE("Cast", ["memory"], ["inside"], to=dtype)]
    for name in ("query", "key", "value"):
        nodes += [
            NODE("MatMul", ["inside", f"wide {name}"], [f"flat {name}"]),
            NODE("Reshape", [f"flat {name}", "heads"], [name]),
        ]
    nodes += [
        NODE("Attention", ["query", "key", "value"], ["seen"], "look"),
        NODE("MatMul", ["seen", "narrow"], ["each"]),
        NODE("ReduceMean", ["each", "positions"], ["one of them"], keepdims=0),
        NODE("Cast", ["one of them"], ["new_memory"], to=TensorProto.FLOAT),
        MEAN, HEAD,
    ]  # fmt: skip
    shapes = {"heads": np.array([-1, 1, 4, width]), "positions": np.array([2])}
    return graph(path, *nodes, weights={**weights, **shapes})
