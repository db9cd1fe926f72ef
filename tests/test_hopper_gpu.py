"""Kernels for compute capability 9.0 on such a GPU: each operator against PyTorch, and whole models along the recurrence.

`RMT_REQUIRE=hopper pytest -m gpu` fails where there is none.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu import open_cuda, require_hopper, with_graphs
from gpu_node import GpuGraph, GpuNode, check_near, normal
from heads_of_64 import HEADS, WIDTH, wide
from onnx import helper
from shared import once

from rmt_trt import RMTRuntime
from rmt_trt.export import ExportOptions, export_model
from rmt_trt.export.verify import TOLERANCES, random_document, relative_error
from rmt_trt.model.checkpoint import LoadedModel
from rmt_trt.model.recurrence import recurrence
from rmt_trt.model.step import RMTModel, model_spec
from rmt_trt.runtime import native
from rmt_trt.runtime.engines.cuda import CudaEngine

pytestmark = pytest.mark.gpu
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MOST_PARTS = 4  # of k


@pytest.fixture(autouse=True)
def _gpu() -> None:
    require_hopper()


@contextmanager
def one(folder: Path, op: str, inputs: list[torch.dtype], dtype: torch.dtype, **options: Any) -> Iterator[GpuNode]:
    node = GpuNode(folder, op, inputs, dtype, **options)
    try:
        yield node
    finally:
        node.close()


ROWS = (1, 11, 64, 300, 512, 519, 1000)
SIZES = (
    (64, 8),
    (64, 64),
    (128, 72),
    (192, 128),
    (320, 1000),
    (768, 768),
    (768, 2304),
    (768, 3072),
    (3072, 768),
    (4096, 64),
)


def products_started() -> np.ndarray:
    """How many products this process has started by kernels of our own: by the size of their tiles, and by parts of k from 1."""
    counts = np.zeros(64, np.int64)
    count = ctypes.CDLL(str(native.library())).rmt_hopper_products(counts.ctypes.data_as(ctypes.c_void_p), len(counts))
    return counts[:count].reshape(-1, MOST_PARTS)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_has_its_bias_and_tanh_gelu(dtype: str, activation: str, tmp_path: Path) -> None:
    half = HALVES[dtype]
    before = products_started()  # and the library stays loaded, with its counts, when the session is gone
    with one(tmp_path, "Linear", [half] * 3, half, activation=activation) as product:
        for k, n in SIZES:
            weight, bias = normal(k, n, dtype=half, scale=k**-0.5, seed=1), normal(n, dtype=half, seed=2)
            for m in ROWS:
                x = normal(m, k, dtype=half, seed=m)
                (found,) = product(x, weight, bias, shape=(m, n))
                wanted = x.float() @ weight.float() + bias.float()
                if activation == "gelu":
                    wanted = torch.nn.functional.gelu(wanted, approximate="tanh")
                check_near(found, wanted, f"{m} rows, {k} to {n}")
    started = products_started() - before
    assert (started[:, 0] > 0).all(), f"tiles of some size were never taken: {started}"
    assert not started[:, 1:].any()


def attended(qkv: torch.Tensor, heads: int, causal: bool, rows: int, lengths: torch.Tensor | None) -> torch.Tensor:
    """(batch, rows, h s) float32: each document by itself, from what its length leaves."""
    batch, length, width = qkv.shape
    found = []
    for number in range(batch):
        query, key, value = qkv[number].float().view(length, 3, heads, width // 3 // heads).permute(1, 2, 0, 3)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        place = torch.arange(length, device=qkv.device)
        hidden = place[None] > place[:, None] if causal else torch.zeros_like(scores[0], dtype=torch.bool)
        if lengths is not None:
            hidden = hidden | (place >= lengths[number])[None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)  # of no keys nothing
        found.append((weights @ value).transpose(0, 1).flatten(1))
    whole = torch.stack(found)
    return whole if not rows else whole[:, -rows:] if causal else whole[:, :rows]


LENGTHS = (1, 43, 63, 64, 65, 128, 509, 512, 1000)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("heads", "rows"), [(1, 0), (2, 11), (12, 1), (12, 43)])
@pytest.mark.parametrize("dtype", HALVES)
def test_attention_over_packed_rows(
    dtype: str, heads: int, rows: int, causal: bool, masked: bool, tmp_path: Path
) -> None:
    half = HALVES[dtype]
    inputs = [half, torch.int32] if masked else [half]
    with one(tmp_path, "PackedAttention", inputs, half, heads=heads, causal=int(causal), rows=rows) as attention:
        for length in LENGTHS:
            for batch in (1, 3):
                if rows > length:
                    continue
                qkv = normal(batch, length, 3 * 64 * heads, dtype=half, seed=length)
                some = [length, length // 3, 0][:batch]
                lengths = torch.tensor(some, dtype=torch.int32, device="cuda") if masked else None
                given = (qkv, lengths) if lengths is not None else (qkv,)
                (found,) = attention(*given, shape=(batch, rows or length, 64 * heads))
                check_near(found, attended(qkv, heads, causal, rows, lengths), f"{batch} documents of {length} rows")


@pytest.mark.parametrize("outputs", [1, 2, 3], ids=["norm", "norm and sum", "norm, sum and carried"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_norm_of_a_product_and_a_residual(dtype: str, outputs: int, tmp_path: Path) -> None:
    """Of rows that meet some of others' rows; those that are carried are float32 of what is handed on."""
    half = HALVES[dtype]
    last = torch.float32 if outputs == 3 else None
    before = products_started()
    for rows, others, at, span in (
        (1, 1, 0, (0, 1)),
        (11, 509, 0, (0, 10)),
        (17, 544, 527, (1, 17)),
        (519, 519, 0, (500, 519)),
    ):
        options = {"epsilon": 1e-3, "at": at, "first": span[0], "last": span[1]}
        with one(
            tmp_path, "LinearSkipLayerNorm", [half] * 6, half, outputs=outputs, last_dtype=last, **options
        ) as node:
            for k, width in (
                (64, 8),
                (192, 64),
                (72, 128),
                (768, 768),
                (3072, 768),
                (1024, 1024),
                (4096, 1024),
                (128, 2048),
                (704, 768),
                (2048, 512),
                (1344, 72),
                (3008, 136),
            ):
                for batch in (1, 3):
                    x = normal(batch, rows, k, dtype=half, seed=0)
                    weight, bias = (
                        normal(k, width, dtype=half, scale=k**-0.5, seed=4),
                        normal(width, dtype=half, seed=5),
                    )
                    skip = normal(batch, others, width, dtype=half, seed=1)
                    gamma, beta = (normal(width, dtype=half, seed=seed) for seed in (2, 3))
                    carried = (batch, span[1] - span[0], width) if outputs == 3 else None
                    given = (x, weight, bias, skip, gamma, beta)
                    found = node(*given, shape=(batch, rows, width), last=carried)
                    both = x.float() @ weight.float() + bias.float() + skip[:, at : at + rows].float()
                    wanted = torch.nn.functional.layer_norm(both, (width,), gamma.float(), beta.float(), 1e-3)
                    for made, right in zip(found, (wanted, both), strict=False):
                        check_near(made, right, f"{rows} rows, {k} to {width}")
                    if outputs == 3:
                        assert torch.equal(found[2], found[0][:, span[0] : span[1]].float())
    started = (products_started() - before).sum(0)
    assert (started > 0).all(), f"products in some number of parts of k were never made: {started}"


@pytest.mark.parametrize("dtype", HALVES)
def test_parts_of_a_product_may_be_larger_than_halves_are(dtype: str, tmp_path: Path) -> None:
    half = HALVES[dtype]
    rows, k, width = 11, 768, 768
    signs = torch.ones(k, 1, device="cuda")
    signs[k // 2 :] = -1
    weight = (200 * signs).expand(k, width).to(half)  # halves of 76,800, whose sum is 0
    x, none = torch.ones(1, rows, k, dtype=half, device="cuda"), torch.zeros(width, dtype=half, device="cuda")
    skip, gamma = normal(1, rows, width, dtype=half), normal(width, dtype=half, seed=1)
    before = products_started()
    with one(tmp_path, "LinearSkipLayerNorm", [half] * 6, half, outputs=2) as node:
        found, sums = node(x, weight.contiguous(), none, skip, gamma, none, shape=(1, rows, width))
    assert (products_started() - before)[:, 1:].any()
    assert torch.equal(sums, skip)
    check_near(found, torch.nn.functional.layer_norm(skip.float(), (width,), gamma.float()), "a sum of 0")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_norm_waits_for_a_residual_that_the_node_in_front_has_made(dtype: str, tmp_path: Path) -> None:
    """Its kernel reads the residual before its own product, which is short, has ended. Each replay has other values, so that
    those of the one before are wrong."""
    half = HALVES[dtype]
    rows, wide, short, width = 1500, 768, 64, 768
    kinds = [half] * 10
    nodes = [
        helper.make_node("LinearSkipLayerNorm", [f"in{i}" for i in (0, 1, 2, 3, 4, 5)], ["made"], domain=native.DOMAIN),
        helper.make_node("LinearSkipLayerNorm", ["in6", "in7", "in8", "made", "in4", "in9"], ["out"], domain=native.DOMAIN, at=rows - 11),
    ]  # fmt: skip
    ranks = [3, 2, 1, 3, 1, 1, 3, 2, 1, 1]
    graph = GpuGraph(tmp_path, nodes, list(zip(kinds, ranks, strict=True)), [(half, 3)])
    gamma, nothing = torch.ones(width, dtype=half, device="cuda"), torch.zeros(width, dtype=half, device="cuda")
    x, skip = normal(1, rows, wide, dtype=half), normal(1, rows, width, dtype=half, seed=1)
    weight, narrow = normal(wide, width, dtype=half, scale=wide**-0.5), normal(short, width, dtype=half, scale=0.1)
    below = normal(1, 11, short, dtype=half, seed=2)
    try:
        # The second node's rows are few, and meet the last of the first one's.
        run = graph.bound([x, weight, nothing, skip, gamma, nothing, below, narrow, nothing, nothing], [(1, 11, width)])
        for seed in range(20):
            run.given[0].copy_(normal(1, rows, wide, dtype=half, seed=seed))
            (found,) = run()
            first = run.given[0].float() @ weight.float() + skip.float()
            made = torch.nn.functional.layer_norm(first, (width,)).to(half).float()
            both = below.float() @ narrow.float() + made[:, -11:]
            check_near(found, torch.nn.functional.layer_norm(both, (width,)), f"replay {seed}")
    finally:
        graph.close()


@pytest.mark.parametrize("total", [False, True], ids=["norm", "norm and rows"])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_first_rows_are_tokens_and_memory_where_the_frame_says(dtype: str, total: bool, tmp_path: Path) -> None:
    half, whole = HALVES[dtype], torch.float32
    inputs = [whole, torch.int64, torch.int64, *[half] * 4]
    with one(tmp_path, "Embed", inputs, half, outputs=1 + total, epsilon=1e-3) as embed:
        for width in (64, 128, 768, 2048):
            for batch, memory_rows, size in ((1, 1, 1), (2, 3, 37), (3, 10, 499)):
                words, text = normal(50, width, dtype=half), [-1 - place for place in range(size)]
                held = [-1 - size - row for row in range(memory_rows)]
                frame = torch.tensor([7, *held, 49, *text, 0, *held], device="cuda")
                memory = normal(batch, memory_rows, width, dtype=whole, seed=1)
                segment = torch.arange(batch * size, device="cuda").view(batch, size) * 17 % 50
                positions = normal(len(frame), width, dtype=half, seed=2)
                gamma, beta = (normal(width, dtype=half, seed=seed) for seed in (3, 4))
                given = (memory, segment, frame, words, positions, gamma, beta)
                found = embed(*given, shape=(batch, len(frame), width))
                carried, table = memory.to(half).float(), words.float()
                fixed = [table[token].expand(batch, 1, width) for token in (7, 49, 0)]
                rows = torch.cat([fixed[0], carried, fixed[1], table[segment], fixed[2], carried], dim=1)
                rows = rows + positions.float()
                wanted = torch.nn.functional.layer_norm(rows, (width,), gamma.float(), beta.float(), 1e-3)
                for made, right in zip(found, (wanted, rows), strict=False):
                    check_near(made, right, f"{batch} segments of {size}, {width} wide")


# Whole models. Weights scaled by their width, so that what a layer hands on is as large in each.
LARGE = 768
SHAPES: dict[str, dict[str, Any]] = {
    "odd": {"width": WIDTH, "num_memory": 3, "segment_length": 37},
    "real": {"width": LARGE, "num_memory": 10, "segment_length": 499},
}
LAYERS = 3
SCALES = {"bert": 5.0, "gpt2": 2.5}  # with which forgetting the memory changes an answer by more than rounding does


def model_of(name: str, shape: str) -> RMTModel:
    sizes = SHAPES[shape]
    width, positions = sizes["width"], sizes["segment_length"] + 2 * sizes["num_memory"] + 3
    heads, inner = HEADS * width // WIDTH, 4 * width
    changes = {
        "bert": {
            "hidden_size": width, "num_attention_heads": heads, "intermediate_size": inner,
            "num_hidden_layers": LAYERS, "max_position_embeddings": positions,
        },
        "gpt2": {"n_embd": width, "n_head": heads, "n_inner": inner, "n_layer": LAYERS, "n_positions": positions},
    }[name]  # fmt: skip
    return wide(name, changes, scale=SCALES[name] * (WIDTH / width) ** 0.5, **sizes)


@functools.cache
def bundle_of(name: str, shape: str, dtype: str) -> Path:
    def export(path: Path) -> None:
        model = model_of(name, shape)
        export_model(LoadedModel(model, model_spec(model), None), path, ExportOptions(segments=2))

    return with_graphs(once(f"{name}-{shape}-64.rmt", export), f"{name}-{shape}-64-{dtype}.rmt", dtype)


def documents(model: RMTModel, count: int) -> list[np.ndarray]:
    """Of unequal lengths, most with a short segment at their end."""
    size = model.config.segment_length
    lengths = (2 * size + size // 3, 3 * size, size + 1, 1, 2 * size - 1)
    return [random_document(model_spec(model), length, seed) for seed, length in enumerate(lengths[:count])]


@functools.cache
def wanted_of(name: str, shape: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(memory, logits) after a document, by the recurrence in PyTorch."""
    model = model_of(name, shape)
    *_, (memory, logits) = recurrence(model, documents(model, 5)[number].tolist(), model_spec(model).alignment)
    return memory.numpy(), logits.numpy()[-1] if logits.ndim == 2 else logits.numpy()


def forgotten(name: str, shape: str) -> np.ndarray:
    """The logits of the first document's last segment, read without what was before it."""
    model = model_of(name, shape)
    tokens = documents(model, 1)[0]
    size = model.config.segment_length
    last = len(tokens) % size if model_spec(model).alignment == "left" else size
    ((_, logits),) = recurrence(model, tokens[-last:].tolist(), "left")
    return logits.numpy()[-1] if logits.ndim == 2 else logits.numpy()


def check_run(runtime: RMTRuntime, name: str, shape: str, dtype: str, count: int) -> list[bytes]:
    """Runs so many documents together, and gives their memories' bits."""
    found = runtime.run(documents(model_of(name, shape), count))
    for number, result in enumerate(found):
        memory, logits = wanted_of(name, shape, number)
        assert relative_error(result.memory, memory) <= TOLERANCES[dtype], (count, number)
        given = result.logits if result.logits.shape == logits.shape else result.logits[-1]
        assert relative_error(given, logits) <= TOLERANCES[dtype], (count, number)
    return [result.memory.tobytes() for result in found]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_models_follow_the_recurrence(name: str, shape: str, dtype: str) -> None:
    assert relative_error(forgotten(name, shape), wanted_of(name, shape, 0)[1]) > TOLERANCES[dtype]
    with open_cuda(bundle_of(name, shape, dtype), dtype) as runtime:
        engine = runtime._engine
        assert isinstance(engine, CudaEngine)
        assert "kernels for this GPU" in engine.products
        for count in (1, 2, 5):
            assert check_run(runtime, name, shape, dtype, count) == check_run(runtime, name, shape, dtype, count)
        used = {Path(engine._graphs[key].file).name for key, _ in engine._sessions}
        # Of five documents the engine takes a bucket of eight, for which encoders have other graphs.
        assert all("-hopper-" in file or file.endswith("-from-8.onnx") for file in used)
        assert {role for role in ("full", "step") if any(f"-hopper-{role}-" in file for file in used)} == {
            "full",
            "step",
        }


@pytest.mark.parametrize("dtype", HALVES)
def test_a_language_model_gives_all_rows_and_their_scores_and_goes_on_from_a_state(dtype: str) -> None:
    model = model_of("gpt2", "odd")
    size = model.config.segment_length
    tokens = random_document(model_spec(model), 3 * size + 5, 6)
    rows = torch.cat([logits for _, logits in recurrence(model, tokens.tolist(), "left")])
    scores = torch.log_softmax(rows.double(), dim=1)[:-1].gather(1, torch.from_numpy(tokens)[1:, None])[:, 0]
    with open_cuda(bundle_of("gpt2", "odd", dtype), dtype) as runtime:
        found = runtime.run(tokens, logits="all", alignment="left").logits
        assert relative_error(found, rows.numpy()) <= TOLERANCES[dtype]
        scored = runtime.run(tokens, logits="loglik", alignment="left")
        assert np.isnan(scored.loglik[0])  # nothing stands in front of the first token
        assert relative_error(scored.loglik[1:], scores.numpy()) <= TOLERANCES[dtype]
        assert scored.loglik_sum == pytest.approx(scored.loglik[1:].sum(), rel=1e-9)

        whole = runtime.run(tokens, alignment="left")
        first = runtime.run(tokens[:size], logits="none", alignment="left")
        second = runtime.run(tokens[size:], state=first.state, alignment="left")
        assert second.memory.tobytes() == whole.memory.tobytes()
        assert second.logits.tobytes() == whole.logits.tobytes()
        assert relative_error(second.logits.reshape(-1), rows[-1].numpy()) <= TOLERANCES[dtype]
        engine = runtime._engine
        assert isinstance(engine, CudaEngine)
        heads = {key[1]: Path(engine._graphs[key].file).name for key, _ in engine._sessions}
        assert {"all", "loglik", "last", "none"} == set(heads)
        assert all("-hopper-" in file for file in heads.values()), heads
