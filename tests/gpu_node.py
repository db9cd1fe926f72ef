"""One of rmt-trt's own operators by itself on a GPU, among memory that is full of NaN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto, helper

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


class GpuNode:
    """A session of one node, captured as a CUDA graph for every call's sizes.

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
        self._kinds = [*[dtype] * (outputs - 1), last_dtype or dtype]
        self._names = [f"in{number}" for number in range(len(inputs))], [f"out{number}" for number in range(outputs)]
        ranks = AXES[op]
        node = helper.make_node(op, *self._names, domain=native.DOMAIN, **attributes)
        graph = helper.make_graph(
            [node], "one",
            [helper.make_tensor_value_info(name, KINDS[kind], [f"{name}.{axis}" for axis in range(rank)])
             for name, kind, rank in zip(self._names[0], inputs, ranks, strict=False)],
            [helper.make_tensor_value_info(name, KINDS[kind], [f"{name}.{axis}" for axis in range(ranks[0])])
             for name, kind in zip(self._names[1], self._kinds, strict=True)],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(native.DOMAIN, 1)]
        path = folder / f"{op}.onnx"
        path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
        self._calls = 0
        self._gpu = cuda.Gpu(0)
        with self._gpu.current():
            self._session = open_session(path, self._gpu, True, {})

    def __call__(
        self, *inputs: torch.Tensor, shape: Sequence[int], last: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """The outputs, each of `shape`, the last one of `last` where that is another. They are computed three times, by the run that is captured and by two replays, which
        must give the same bits and write nothing beside them."""
        given = [GuardedTensor(value.shape, value.dtype) for value in inputs]
        for guarded, value in zip(given, inputs, strict=True):
            guarded.value.copy_(value)
        shapes = [*[shape] * (len(self._kinds) - 1), last or shape]
        made = [GuardedTensor(axes, kind) for axes, kind in zip(shapes, self._kinds, strict=True)]
        binding = self._session.io_binding()
        for name, guarded in zip(self._names[0], given, strict=True):
            value = guarded.value
            binding.bind_input(name, "cuda", 0, KINDS[value.dtype], tuple(value.shape), value.data_ptr())
        for name, guarded in zip(self._names[1], made, strict=True):
            kind, axes = KINDS[guarded.value.dtype], tuple(guarded.value.shape)
            binding.bind_output(name, "cuda", 0, kind, axes, guarded.value.data_ptr())
        self._calls += 1
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._calls))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        found = []
        for _ in range(3):
            for guarded in made:
                guarded.value.fill_(float("nan"))
            torch.cuda.synchronize()
            with self._gpu.current():
                self._session.run_with_iobinding(binding, options)
                self._gpu.wait()
            assert all(guarded.untouched() for guarded in made), "it writes beside its output"
            found.append([guarded.value.clone() for guarded in made])
        assert not any(value.isnan().any() for value in found[0]), "it leaves places out, or reads beside its inputs"
        for again in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True)), "a replay gives other bits"
        return found[0]

    def close(self) -> None:
        with self._gpu.current():
            del self._session
            self._gpu.close()


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def check_near(found: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    """Every value within a few roundings of its own size, or of the values' usual size."""
    step = torch.finfo(found.dtype).eps
    limit = 4 * step * (wanted.abs() + wanted.square().mean().sqrt())
    worst = float(((found.float() - wanted).abs() / limit).max())
    assert worst <= 1, f"{where}: an error of {worst:.2f} times what is allowed"
