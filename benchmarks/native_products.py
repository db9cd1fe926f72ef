"""What rmt-trt's own operators give on this GPU: products alone, and steps of BERT-base, GPT-2 and Llama with and without.

    python -m rmt_trt.benchmarks.native_products [--out FOLDER] [--part products|decoders|step|hopper] [--seconds 65]

Each part runs in a process of its own and writes `native-PART.json`; what fails is printed with its message, and the next
one is measured. Everything is replayed from CUDA graphs that ONNX Runtime captured.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rmt_trt.errors import require
from rmt_trt.runtime import native

PARTS = ("products", "decoders", "step", "hopper")
# How products are asked of cuBLASLt, in the order of `Setting` in native/gpu.c. Those to FP8 take the first of the others
# that it accepts.
SETTINGS = ("plain", "no C", "C elsewhere", "all scales", "rounded apart")
WIDTH, INNER = 768, 3072
ROWS = (512, 16384)
PRODUCTS = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}
FLOAT, FLOAT16, FLOAT8, INT64 = 1, 10, 17, 7  # TensorProto.DataType
_graph_ids = itertools.count(1)


class Bound:
    """A session with inputs and outputs at fixed addresses, captured when it is first run."""

    def __init__(self, session: Any, inputs: Mapping[str, tuple[Any, int]], outputs: Mapping[str, tuple[Any, int]]):
        import onnxruntime as ort

        self._session, self._kept = session, (inputs, outputs)
        self._binding = session.io_binding()
        for name, (tensor, kind) in inputs.items():
            self._binding.bind_input(name, "cuda", 0, kind, tuple(tensor.shape), tensor.data_ptr())
        for name, (tensor, kind) in outputs.items():
            self._binding.bind_output(name, "cuda", 0, kind, tuple(tensor.shape), tensor.data_ptr())
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)))
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)


class Machine:
    """The GPU, the stream that everything runs on, and the time that is left."""

    def __init__(self, seconds: float) -> None:
        import onnxruntime as ort
        import torch

        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
        ort.set_default_logger_severity(3)
        self.ort: Any = ort
        self.torch: Any = torch
        self.stream = self.torch.cuda.Stream()
        self.until = time.monotonic() + seconds

    def session(self, model: bytes | str) -> Any:
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        native.register(options)
        provider = {
            "device_id": "0",
            "user_compute_stream": str(self.stream.cuda_stream),
            "enable_cuda_graph": "1",
            "use_tf32": "0",
        }
        made = self.ort.InferenceSession(model, options, providers=[("CUDAExecutionProvider", provider)])
        if made.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError(f"no CUDA provider: {made.get_providers()}")
        return made

    def microseconds(self, run: Callable[[], None], times: int, rounds: int = 5) -> float:
        """The median over rounds of a call's time on the device."""
        run()
        self.torch.cuda.synchronize()
        found = []
        for _ in range(rounds):
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(self.stream)
            for _ in range(times):
                run()
            end.record(self.stream)
            end.synchronize()
            found.append(1000 * start.elapsed_time(end) / times)
        return float(np.median(found))


def measured(
    machine: Machine,
    cases: Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]],
    path: Path,
    rows: list[dict[str, Any]],
) -> None:
    """Runs every case and keeps what came of it beside `rows`, after each."""
    for labels, case in cases:
        if time.monotonic() > machine.until:
            found: dict[str, Any] = {"error": "no time was left"}
        else:
            started = time.monotonic()
            try:
                found = case()
            except Exception as err:  # whatever a library raises: the next case may work
                found = {"error": f"{type(err).__name__}: {' '.join(str(err).split())[:600]}"}
            found["took"] = round(time.monotonic() - started, 2)
        rows.append({**labels, **found})
        print("  ".join(f"{key}={_shown(value)}" for key, value in rows[-1].items()), flush=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Products alone


def product_cases(machine: Machine) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    for rows in ROWS:
        for name, (k, n) in PRODUCTS.items():
            for kind in ("MatMul", "fp16", "fp16 8 candidates", "fp8", "fp8 8 candidates", "fp8 exact sums"):
                yield (
                    {"rows": rows, "product": name, "kind": kind, "gelu": name == "up"},
                    partial(product, machine, rows, k, n, kind, name == "up"),
                )
            for kind in ("fp8 to fp8", "fp8 to fp8 8 candidates", "fp8 to fp8 exact sums"):
                yield (
                    {"rows": rows, "product": name, "kind": kind, "gelu": name == "up"},
                    partial(product, machine, rows, k, n, kind, name == "up"),
                )
        for op in ("Quantize", "SkipLayerNormalization", "SkipLayerNormQuantize"):
            yield {"rows": rows, "op": op}, partial(elementwise, machine, rows, op)


def product(machine: Machine, rows: int, k: int, n: int, kind: str, gelu: bool) -> dict[str, Any]:
    """Time of one of several equal products with weights of their own, and the error of the first."""
    torch = machine.torch
    from onnx import helper, numpy_helper

    copies = 8 if rows < 4096 else 4
    low, out_low = kind.startswith("fp8"), kind.startswith("fp8 to fp8")
    torch.manual_seed(0)
    x, base = torch.randn(rows, k, device="cuda"), torch.randn(k, n) / k**0.5
    bias = torch.randn(n) / 4
    if low:
        x, base = (x * 64).to(torch.float8_e4m3fn), (base * 1024).to(torch.float8_e4m3fn)
        scale = 1 / (64 * 1024)
    else:
        x, base, scale = x.half(), base.half(), 1.0
    nodes, weights = [], []
    attributes: dict[str, Any] = {
        "domain": native.DOMAIN,
        "activation": "gelu" if gelu else "none",
        "transposed": int(low),
    }
    if low:
        attributes |= {"scale": scale, "fast": int("exact sums" not in kind)}
    if "candidates" in kind:
        attributes["candidates"] = 8
    inverse = numpy_helper.from_array(np.array([64], np.float32), "inverse")
    for number in range(copies):
        bits = base.view(torch.uint8 if low else torch.int16).roll(number, 0)
        bits = (bits.T if low else bits).contiguous()
        raw = bits.numpy().tobytes()
        weights.append(helper.make_tensor(f"w{number}", FLOAT8 if low else FLOAT16, bits.shape, raw, raw=True))
        if kind == "MatMul":
            nodes.append(helper.make_node("MatMul", ["x", f"w{number}"], [f"p{number}"]))
            op, domain = ("BiasGelu", "com.microsoft") if gelu else ("Add", "")
            nodes.append(helper.make_node(op, [f"p{number}", "b"], [f"y{number}"], domain=domain))
        elif out_low:
            given = ["x", f"w{number}", "b", "inverse"]
            nodes.append(helper.make_node("LinearQuantize", given, [f"y{number}"], **attributes))
        else:
            nodes.append(helper.make_node("Linear", ["x", f"w{number}", "b"], [f"y{number}"], **attributes))
    bias_tensor = helper.make_tensor("b", FLOAT16, (n,), bias.half().numpy().tobytes(), raw=True)
    kinds = (FLOAT8 if low else FLOAT16, FLOAT8 if out_low else FLOAT16)
    model = _model(nodes, {"x": (kinds[0], (rows, k))}, {f"y{i}": (kinds[1], (rows, n)) for i in range(copies)},
                   [*weights, bias_tensor, inverse])  # fmt: skip
    before, session = product_settings(), machine.session(model)
    dtype = torch.float8_e4m3fn if out_low else torch.float16
    outputs = {f"y{i}": (torch.zeros(rows, n, dtype=dtype, device="cuda"), kinds[1]) for i in range(copies)}
    torch.cuda.synchronize()
    bound = Bound(session, {"x": (x, kinds[0])}, outputs)
    spent = machine.microseconds(bound.run, 10) / copies
    torch.cuda.synchronize()
    exact = x.float() @ base.cuda().float() * scale + bias.half().cuda().float()
    found = outputs["y0"][0].float() / (64 if out_low else 1)
    result: dict[str, Any] = {"microseconds": spent, "teraflops": 2 * rows * k * n / spent / 1e6}
    if out_low:
        result["settings"] = settings_since(before)
    if not gelu:
        return result | {"error_l2": distance(found, exact)}
    functional = torch.nn.functional
    return result | {
        "error_l2": distance(found, functional.gelu(exact)),
        "error_l2_of_tanh": distance(found, functional.gelu(exact, approximate="tanh")),
    }


def elementwise(machine: Machine, rows: int, op: str) -> dict[str, Any]:
    """The same of the other operators."""
    torch = machine.torch
    from onnx import helper, numpy_helper

    copies = 16
    torch.manual_seed(0)
    x, skip = torch.randn(rows, WIDTH).half().cuda(), torch.randn(rows, WIDTH).half().cuda()
    nodes, outputs = [], {}
    half = {f"y{i}": (torch.zeros_like(x), FLOAT16) for i in range(copies)}
    low = {f"q{i}": (torch.zeros(rows, WIDTH, dtype=torch.float8_e4m3fn, device="cuda"), FLOAT8) for i in range(copies)}
    weights: list[Any] = [
        numpy_helper.from_array(np.full(WIDTH, value, np.float16), name) for name, value in (("g", 2), ("b", 1))
    ]
    for number in range(copies):
        eps = 1e-5 * (1 + number)  # so that no two nodes are alike
        if op == "Quantize":
            nodes.append(
                helper.make_node(op, ["x"], [f"q{number}"], domain=native.DOMAIN, inverse=100.0 + number * 1e-4)
            )
            outputs[f"q{number}"] = low[f"q{number}"]
            continue
        domain, made = ("com.microsoft", [f"y{number}"]) if op.endswith("ization") else (native.DOMAIN, [f"y{number}", f"q{number}"])  # fmt: skip
        more: dict[str, Any] = {} if op.endswith("ization") else {"inverse": 100.0}
        nodes.append(helper.make_node(op, ["x", "s", "g", "b"], made, domain=domain, epsilon=eps, **more))
        outputs |= {name: (half | low)[name] for name in made}
    inputs = {"x": (x, FLOAT16), "s": (skip, FLOAT16)}
    if op == "Quantize":
        del inputs["s"]
    shapes = {name: (kind, tuple(tensor.shape)) for name, (tensor, kind) in (inputs | outputs).items()}
    model = _model(nodes, {n: shapes[n] for n in inputs}, {n: shapes[n] for n in outputs}, weights)
    torch.cuda.synchronize()
    spent = machine.microseconds(Bound(machine.session(model), inputs, outputs).run, 10) / copies
    torch.cuda.synchronize()
    result = {"microseconds": spent}
    exact = x.float()
    if op != "Quantize":
        exact = torch.nn.functional.layer_norm((x.float() + skip.float()), (WIDTH,), eps=1e-5) * 2 + 1
        result["error_l2"] = distance(half["y0"][0].float(), exact)
    if "q0" in outputs:
        wanted = (exact * 100).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        result["error_of_fp8"] = distance(low["q0"][0].float(), wanted)
    return result


def _model(nodes: Any, inputs: Any, outputs: Any, weights: Any) -> bytes:
    from onnx import helper

    def values(named: Any) -> Any:
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in named.items()]

    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), weights)
    domains = {"": 20, "com.microsoft": 1, native.DOMAIN: 1}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return made


def product_settings() -> dict[str, int]:
    """How many products of one kind and shape this process has planned in each of SETTINGS."""
    counts = (ctypes.c_int64 * len(SETTINGS))()
    ctypes.CDLL(str(native.library())).rmt_product_settings(counts)
    return dict(zip(SETTINGS, counts, strict=True))


def settings_since(before: Mapping[str, int]) -> str:
    """How products were asked of cuBLASLt since then."""
    return ", ".join(name for name, count in product_settings().items() if count > before[name])


def distance(found: Any, exact: Any) -> float:
    return float((found - exact).norm() / exact.norm())


def run_part(part: str, out: Path, seconds: float) -> None:
    require("onnxruntime", "gpu", "the benchmark of products")
    machine = Machine(seconds)
    name = machine.torch.cuda.get_device_name()
    print(f"{part}: {name}, onnxruntime {machine.ort.__version__}, torch {machine.torch.__version__}", flush=True)
    path = out / f"native-{part}.json"
    if part == "products":
        measured(machine, product_cases(machine), path, [])
        return
    from rmt_trt.benchmarks import native_steps as steps

    kinds: dict[str, list[tuple[str, int, int | None, Any]]] = {
        "step": [("bert-base", 32, None, steps.bert_cases)],
        "decoders": [("llama-1b", 8, 4, steps.llama_cases), ("gpt2-small", 32, None, steps.gpt2_cases)],
        "hopper": [("bert-base", 16, None, steps.hopper_cases), ("gpt2-small", 16, None, steps.hopper_cases)],
    }
    rows: list[dict[str, Any]] = []
    for preset, batch, layers, cases in kinds[part]:
        with tempfile.TemporaryDirectory() as folder:
            step = steps.Step(machine, Path(folder), preset, batch, layers)
            print(f"{preset} is ready, {machine.until - time.monotonic():.0f} s are left", flush=True)
            measured(machine, cases(step), path, rows)
            step.weights.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures rmt-trt's own operators on this GPU.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=65, help="for each part")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        run_part(options.part, options.out, options.seconds)
        return
    command = [sys.executable, "-m", "rmt_trt.benchmarks.native_products", "--out", str(options.out)]
    for part in reversed(PARTS):
        try:
            subprocess.run(
                [*command, "--part", part, "--seconds", str(options.seconds - 15)], timeout=options.seconds + 10, check=False
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{part}: ended after {options.seconds + 10:.0f} s", flush=True)


if __name__ == "__main__":
    main()
