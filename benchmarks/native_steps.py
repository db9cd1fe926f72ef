"""Whole steps with rmt-trt's own operators in several ways: the part "step" of `native_products`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rmt_trt.benchmarks.native_products import FLOAT, INT64, Bound, Machine, distance, product_settings, settings_since


class Step:
    """BERT-base with random weights, its fp32 step as reference, thresholds for FP8, and its graphs."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        torch = machine.torch
        from rmt_trt.benchmarks.presets import preset_config
        from rmt_trt.export.fused.graph import Weights
        from rmt_trt.export.fused.layers import backbone_of
        from rmt_trt.model.step import build_model, model_spec

        torch.manual_seed(0)
        self.machine, self.folder = machine, folder
        self.model = build_model(preset_config("bert-base")).eval()
        self.spec = model_spec(self.model)
        self.backbone = backbone_of(self.model)
        self.weights = Weights(folder / "weights.data", "fp16")
        self.memory = self.model.memory.detach()[None].clone()
        self.segments = torch.randint(1000, 28000, (32, self.spec.segment_length))
        self.thresholds: dict[str, float] = {}
        self.exact = self._reference()
        self._sessions: dict[Any, Any] = {}

    def _reference(self) -> dict[int, Any]:
        """The memory after 1 and after 16 steps over the same segment, of 32 documents, in fp32 without TF32."""
        torch = self.machine.torch
        model: Any = copy.deepcopy(self.model).cuda()
        for number, layer in enumerate(model.backbone.bert.encoder.layer):
            inputs = {"qkv": layer.attention.self.query, "out": layer.attention.output.dense,
                      "up": layer.intermediate.dense, "down": layer.output.dense}  # fmt: skip
            for name, module in inputs.items():
                module.register_forward_pre_hook(self._seen(f"layer{number}.{name}"))
        memory, found = self.memory.expand(32, -1, -1).cuda(), {}
        with torch.no_grad():
            for count in range(1, 17):
                memory = model(memory, self.segments.cuda())[0]
                if count in (1, 16):
                    found[count] = memory.cpu()
        return found

    def _seen(self, name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, arguments: Any) -> None:
            self.thresholds[name] = max(self.thresholds.get(name, 0.0), float(arguments[0].abs().max()))

        return hook

    def measure(self, options: Any, separate: bool, batch: int) -> dict[str, Any]:
        torch = self.machine.torch
        key = (id(options), separate)
        if key not in self._sessions:
            self._sessions.clear()  # one at a time
            self._sessions[key] = self._session(options, separate)
        before = product_settings()
        session = self._sessions[key]
        shape = (batch, *self.memory.shape[1:])
        sides = [torch.zeros(shape, device="cuda") for _ in range(2)]
        tokens = self.segments[:batch].cuda()
        state = self.spec.states[0]
        torch.cuda.synchronize()
        there, back = (
            Bound(session, {state.input: (a, FLOAT), "segment": (tokens, INT64)}, {state.output: (b, FLOAT)})
            for a, b in (sides, sides[::-1])
        )
        for bound in (there, back):
            bound.run()
        torch.cuda.synchronize()
        errors = {}
        sides[0].copy_(self.memory.expand(batch, -1, -1))
        torch.cuda.synchronize()
        for count in range(1, 17):
            (there, back)[(count - 1) % 2].run()
            if count in self.exact:
                torch.cuda.synchronize()
                errors[f"error_{count}"] = distance(sides[count % 2].cpu(), self.exact[count][:batch])
        turns = itertools.cycle((there, back))
        spent = self.machine.microseconds(lambda: next(turns).run(), 200 if batch < 8 else 20, 5)
        return {"milliseconds": spent / 1000, **errors, "settings": settings_since(before)}

    def _session(self, options: Any, separate: bool) -> Any:
        from rmt_trt.export.fused.encoder import encoder_step
        from rmt_trt.export.fused.graph import Graph

        graph = Graph(self.weights)
        encoder_step(graph, self.model.config, self.spec, self.backbone, "full", "none", separate, options)
        path = self.folder / "step.onnx"
        graph.save(path, {})
        self.weights.flush()
        return self.machine.session(str(path))


def step_cases(step: Step) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    from rmt_trt.export.fused.native import Native

    low = step.thresholds

    def only(*products: str) -> dict[str, float]:
        return {name: value for name, value in low.items() if name.rpartition(".")[2] in products}

    no = Native(qkv=False, out=False, up=False, down=False)
    some = only("qkv", "up", "down")
    variants: list[tuple[str, Any, tuple[bool, ...]]] = [
        ("ONNX Runtime's products", None, (True, False)),
        ("gelu", Native(qkv=False, out=False, down=False), (False,)),
        ("all fp16", Native(), (True, False)),
        ("all fp16, 8 candidates", Native(candidates=8), (True,)),
        ("fp8", Native(thresholds=low), (True,)),
        ("fp8, packed", Native(thresholds=low, packed=True), (True,)),
        ("fp8, out in fp16", Native(thresholds=some), (True,)),
        ("fp8, out in fp16, packed", Native(thresholds=some, packed=True), (True,)),
        ("fp8, out in fp16 by ORT", Native(thresholds=some, out=False), (True,)),
        ("fp8 mlp", Native(thresholds=only("up", "down")), (True, False)),
        ("fp8 mlp, others by ORT", replace(no, thresholds=only("up", "down")), (True, False)),
        ("fp8, 8 candidates", Native(thresholds=low, candidates=8), (True,)),
        ("fp8, packed, 8 candidates", Native(thresholds=low, packed=True, candidates=8), (True,)),
        ("fp8, inner rounded apart", Native(thresholds=low, inner=False), (True,)),
        ("fp8, norms apart", Native(thresholds=low, norm=False), (True,)),
        ("fp8, gelu apart", Native(thresholds=low, tanh=False), (True,)),
        ("fp8, exact sums", Native(thresholds=low, fast=False), (True,)),
        ("fp8, packed, exact sums", Native(thresholds=low, packed=True, fast=False), (True,)),
    ]
    for name, options, ways in variants:
        for separate in ways:
            for batch in (1, 32) if separate else (1,):
                labels = {"variant": name, "separate": separate, "batch": batch}
                yield labels, partial(step.measure, options, separate, batch)
