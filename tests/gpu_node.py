"""Some of rmt-trt's own operators by themselves on a GPU, among memory that is full of NaN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper

from rmt_trt.runtime import cuda, native
from rmt_trt.runtime.engines.cuda import open_session

KINDS = {
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float32: TensorProto.FLOAT,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}
AXES = {
    "Linear": [2, 2, 1],
    "PackedAttention": [3, 1],
    "LinearSkipLayerNorm": [3, 2, 1, 3, 1, 1],
    "Embed": [3, 2, 1, 2, 2, 1, 1],
}  # of the inputs; an output has as many as the first
GUARD = 1 << 16  # values of NaN on either side of a tensor
Values = tuple[torch.dtype, int]  # of a tensor: their type, and how many axes it has


class GuardedTensor:
    """A tensor on the GPU, aligned to 256 bytes, between two guards of NaN: who reads beyond it computes NaN, who writes
    there is seen."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        size = int(torch.Size(shape).numel())
        self._all = torch.full(
            (size + 2 * GUARD,), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device="cuda"
        )
        self.value = self._all[GUARD : GUARD + size].view(shape)

    def untouched(self) -> bool:
        end = GUARD + self.value.numel()
        return bool(self._all[:GUARD].isnan().all()) and bool(self._all[end:].isnan().all())


class GpuGraph:
    """A session of nodes whose inputs are "in0", "in1", ... and whose outputs "out0", ..., or "out" where it is one."""

    def __init__(
        self, folder: Path, nodes: Sequence[NodeProto], inputs: Sequence[Values], outputs: Sequence[Values]
    ) -> None:
        self._kinds = [kind for kind, _ in outputs]
        self._inputs = [f"in{number}" for number in range(len(inputs))]
        self._outputs = [f"out{number}" for number in range(len(outputs))] if len(outputs) > 1 else ["out"]
        graph = helper.make_graph(
            nodes, "some", _described(self._inputs, inputs), _described(self._outputs, outputs)
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(native.DOMAIN, 1)]
        path = folder / f"{'-'.join(node.op_type for node in nodes)}.onnx"
        path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
        self._calls = 0
        self._gpu = cuda.Gpu(0)
        with self._gpu.current():
            self._session = open_session(path, self._gpu, True, {})

    def bound(self, inputs: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> Bound:
        """The graph on copies of these inputs, captured as a CUDA graph when it is first run; shapes: of the outputs."""
        given = [GuardedTensor(value.shape, value.dtype) for value in inputs]
        for guarded, value in zip(given, inputs, strict=True):
            guarded.value.copy_(value)
        made = [GuardedTensor(axes, kind) for axes, kind in zip(shapes, self._kinds, strict=True)]
        binding = self._session.io_binding()
        for name, guarded in zip(self._inputs, given, strict=True):
            value = guarded.value
            binding.bind_input(name, "cuda", 0, KINDS[value.dtype], tuple(value.shape), value.data_ptr())
        for name, guarded in zip(self._outputs, made, strict=True):
            kind, axes = KINDS[guarded.value.dtype], tuple(guarded.value.shape)
            binding.bind_output(name, "cuda", 0, kind, axes, guarded.value.data_ptr())
        self._calls += 1
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._calls))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def run() -> None:
            with self._gpu.current():
                self._session.run_with_iobinding(binding, options)
                self._gpu.wait()

        return Bound(given, made, run)

    def close(self) -> None:
        with self._gpu.current():
            del self._session
            self._gpu.close()


def _described(names: Sequence[str], values: Sequence[Values]) -> list[Any]:
    return [
        helper.make_tensor_value_info(name, KINDS[kind], [f"{name}.{axis}" for axis in range(axes)])
        for name, (kind, axes) in zip(names, values, strict=True)
    ]


class Bound:
    """A graph on its memory. given: its inputs, which may be written between two calls."""

    def __init__(self, given: list[GuardedTensor], made: list[GuardedTensor], run: Any) -> None:
        self.given, self._made, self._run = [guarded.value for guarded in given], made, run
        self._held = given

    def __call__(self) -> list[torch.Tensor]:
        """The outputs. Nothing may be written beside them, nor places left out."""
        for guarded in self._made:
            guarded.value.fill_(float("nan"))
        torch.cuda.synchronize()
        self._run()
        assert all(guarded.untouched() for guarded in self._made), "it writes beside its output"
        found = [guarded.value.clone() for guarded in self._made]
        assert not any(value.isnan().any() for value in found), "it leaves places out, or reads beside its inputs"
        return found


class GpuNode(GpuGraph):
    """A session of one node.

    outputs: how many it has, in `dtype`; `last_dtype` is another of the last one. Inputs are of the kinds that `inputs`
    names."""

    def __init__(
        self,
        folder: Path,
        op: str,
        inputs: Sequence[torch.dtype],
        dtype: torch.dtype,
        outputs: int = 1,
        last_dtype: torch.dtype | None = None,
        **attributes: Any,
    ) -> None:
        ranks = AXES[op]
        given = [f"in{number}" for number in range(len(inputs))]
        made = [f"out{number}" for number in range(outputs)] if outputs > 1 else ["out"]
        kinds = [*[dtype] * (outputs - 1), last_dtype or dtype]
        node = helper.make_node(op, given, made, domain=native.DOMAIN, **attributes)
        super().__init__(
            folder, [node], list(zip(inputs, ranks, strict=False)), [(kind, ranks[0]) for kind in kinds]
        )  # fmt: skip

    def __call__(
        self, *inputs: torch.Tensor, shape: Sequence[int], last: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """The outputs, each of `shape`, the last one of `last` where that is another. They are computed three times, by the
        run that is captured and by two replays, which must give the same bits."""
        run = self.bound(inputs, [*[shape] * (len(self._kinds) - 1), last or shape])
        found = [run() for _ in range(3)]
        for again in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True)), "a replay gives other bits"
        return found[0]


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def check_near(found: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    """Every value within a few roundings of its own size, or of the values' usual size."""
    step = torch.finfo(found.dtype).eps
    limit = 4 * step * (wanted.abs() + wanted.square().mean().sqrt())
    worst = float(((found.float() - wanted).abs() / limit).max())
    assert worst <= 1, f"{where}: an error of {worst:.2f} times what is allowed"
