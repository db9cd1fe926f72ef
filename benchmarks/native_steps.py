"""Whole steps with rmt-trt's own operators in several ways: the parts "step", "decoders" and "hopper" of `native_products`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rmt_trt.benchmarks.native_products import FLOAT, INT64, Bound, Machine, distance, product_settings, settings_since

CUBLASLT = 2  # of its algorithms are tried out: with more than one, no product is by a kernel of our own
Cases = Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]
INPUTS = {  # of each layer's products, by module
    "bert": {
        "qkv": "attention.self.query", "out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    },
    "gpt2": {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    "llama": {"qkv": "self_attn.q_proj", "out": "self_attn.o_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
}  # fmt: skip
LAYERS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}


class Step:
    """A preset with random weights, its fp32 step as reference, thresholds for FP8, and its graphs.

    batch: of the reference, the largest that is measured. layers: so many instead of the preset's, where these take long.
    """

    def __init__(self, machine: Machine, folder: Path, preset: str, batch: int, layers: int | None = None) -> None:
        torch = machine.torch
        from rmt_trt.benchmarks.presets import preset_config
        from rmt_trt.export.fused.graph import Weights
        from rmt_trt.export.fused.layers import backbone_of
        from rmt_trt.model.step import build_model, model_spec

        torch.manual_seed(0)
        self.machine, self.folder, self.preset, self.batch = machine, folder, preset, batch
        config = preset_config(preset)
        if layers is not None:
            config = replace(config, backbone={**config.backbone, "num_hidden_layers": layers})
        self.model = build_model(config).eval()
        self.spec = model_spec(self.model)
        self.backbone = backbone_of(self.model)
        self.weights = Weights(folder / f"{preset}.data", "fp16")
        self.memory = self.model.memory.detach()[None].clone()
        self.segments = torch.randint(1000, 28000, (batch, self.spec.segment_length))
        self.thresholds: dict[str, float] = {}
        self.exact = self._reference()
        self._sessions: dict[Any, Any] = {}

    def _reference(self) -> dict[int, Any]:
        """The memory after 1 and after 16 steps over the same segment of every document, in fp32 without TF32."""
        torch = self.machine.torch
        model: Any = copy.deepcopy(self.model).cuda()
        kind = self.model.config.backbone["model_type"]
        for number, layer in enumerate(model.backbone.get_submodule(LAYERS[kind])):
            for name, module in INPUTS[kind].items():
                layer.get_submodule(module).register_forward_pre_hook(self._seen(f"layer{number}.{name}"))
        memory, found = self.memory.expand(self.batch, -1, -1).cuda(), {}
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
        from rmt_trt.export.fused.decoder import decoder_step
        from rmt_trt.export.fused.encoder import encoder_step
        from rmt_trt.export.fused.graph import Graph

        graph = Graph(self.weights)
        write = encoder_step if self.spec.form == "encoder" else decoder_step
        write(graph, self.model.config, self.spec, self.backbone, "full", "none", separate, options)
        path = self.folder / "step.onnx"
        graph.save(path, {})
        self.weights.flush()
        return self.machine.session(str(path))


def bert_cases(step: Step) -> Cases:
    from rmt_trt.export.fused.native import Native

    low = step.thresholds
    mlp = _only(low, "up", "down")
    no = Native(qkv=False, out=False, up=False, down=False)
    some = _only(low, "qkv", "up", "down")
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
        ("fp8 mlp", Native(thresholds=mlp), (True, False)),
        ("fp8 mlp, others by ORT", replace(no, thresholds=mlp), (True, False)),
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
            for batch in (1, step.batch) if separate else (1,):
                labels = {"variant": name, "separate": separate, "batch": batch}
                yield labels, partial(step.measure, options, separate, batch)


def gpt2_cases(step: Step) -> Cases:
    from rmt_trt.export.fused.native import Native

    mlp = _only(step.thresholds, "up", "down")
    variants: list[tuple[str, Any, tuple[bool, ...]]] = [
        ("ONNX Runtime's products", None, (False, True)),
        ("gelu", Native(qkv=False, out=False, down=False), (False, True)),
        ("all fp16", Native(), (True,)),
        ("fp8", Native(thresholds=step.thresholds), (True,)),
        ("fp8 mlp", Native(thresholds=mlp), (True,)),
    ]
    for name, options, ways in variants:
        for separate in ways:
            for batch in (1, step.batch):
                labels = {"model": "gpt2-small", "variant": name, "separate": separate, "batch": batch}
                yield labels, partial(step.measure, options, separate, batch)


def llama_cases(step: Step) -> Cases:
    """Its layers alone cost: `layers` of 16 are measured."""
    from rmt_trt.export.fused.native import Native

    no, low = Native(qkv=False, out=False, up=False, down=False), step.thresholds
    mlp = _only(low, "up", "down")
    variants: list[tuple[str, Any]] = [
        ("ONNX Runtime's nodes", None),
        ("gate and up in one", replace(no, rotary="")),
        ("rotary, grouped", replace(no, gated=False, rotary="grouped")),
        ("rotary, repeated", replace(no, gated=False, rotary="repeated")),
        ("gate and up in one, rotary, grouped", replace(no, rotary="grouped")),
        ("gate and up in one, rotary, repeated", replace(no, rotary="repeated")),
        ("all fp16, rotary, grouped", Native(rotary="grouped")),
        ("all fp16, rotary, repeated", Native(rotary="repeated")),
        ("all fp16, rotary, repeated, 8 candidates", Native(rotary="repeated", candidates=8)),
        ("fp8", Native(thresholds=low, rotary="")),
        ("fp8, rotary, repeated", Native(thresholds=low, rotary="repeated")),
        ("fp8 mlp, rotary, repeated", Native(thresholds=mlp, rotary="repeated")),
    ]
    for name, options in variants:
        for batch in (1, step.batch):
            labels = {"model": "llama-1b", "layers": len(step.backbone.layers), "variant": name, "batch": batch}
            yield labels, partial(step.measure, options, False, batch)


def hopper_cases(step: Step) -> Cases:
    """With kernels for compute capability 9.0 and with cuBLASLt's alone, by documents stepped together."""
    from rmt_trt.export.fused.native import Native

    few, many = Native(qkv=False, out=False, down=False, candidates=CUBLASLT), Native(candidates=CUBLASLT)
    variants: list[tuple[str, Any, bool]] = [
        ("kernels for 9.0", Native(hopper=True), False),
        ("gelu", few, False),
        ("all fp16", many, True),
    ]
    for batch in (1, 2, 4, 8, 16):
        for name, options, separate in variants:
            labels = {"model": step.preset, "variant": name, "separate": separate, "batch": batch}
            yield labels, partial(step.measure, options, separate, batch)


def _only(thresholds: Mapping[str, float], *products: str) -> dict[str, float]:
    return {name: value for name, value in thresholds.items() if name.rpartition(".")[2] in products}
