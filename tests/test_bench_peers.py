"""rmt-bench: the peers that ours is measured beside do what ours does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarked import lean_graph
from models import BACKBONES, make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rmt_trt.benchmarks import ort_peer, peers
from rmt_trt.benchmarks.full_attention import FullAttention
from rmt_trt.benchmarks.lean import LeanStep, exact_memory
from rmt_trt.benchmarks.limits import step_flops
from rmt_trt.benchmarks.plan import documents
from rmt_trt.benchmarks.presets import Prepared, preset_config
from rmt_trt.benchmarks.published import PublishedStep
from rmt_trt.export.verify import relative_error
from rmt_trt.model.backbone import build_backbone, position_capacity


@pytest.mark.parametrize("name", BACKBONES)
def test_the_lean_step_gives_the_memory_of_the_models_own_step(name):
    model = make_model(name)
    size = model.config.segment_length
    segments = documents(model.config.spec(), 2, 5 * size).reshape(2, 5, size).transpose(1, 0, 2)
    memory = model.memory.detach()[None].expand(2, -1, -1).contiguous()
    found = peers.eager(LeanStep(model, "fp32"), memory, torch.from_numpy(segments.copy()), "default")(5)
    assert relative_error(found.numpy(), exact_memory(model, segments, "cpu")) < 1e-5


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_the_published_step_gives_memory_and_logits_of_the_models_own_step(name):
    model = make_model(name)
    segment = torch.from_numpy(documents(model.config.spec(), 2, model.config.segment_length))
    published = PublishedStep(model, "fp32")
    wanted = found = model.memory.detach()[None].expand(2, -1, -1).contiguous()
    for _ in range(3):
        wanted, own = model(wanted, segment)
        found, logits = published(found, segment)
        assert relative_error(found.numpy(), wanted.numpy()) < 1e-5
        assert relative_error(logits.numpy(), own.numpy()) < 1e-5
    assert published.backbone.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_published_step_gives_the_backbone_a_mask_of_what_is_padding(name):
    model = make_model(name)
    config = model.config
    segment = torch.from_numpy(documents(config.spec(), 2, config.segment_length))
    published, masks = PublishedStep(model, "fp32"), []
    published.backbone.register_forward_pre_hook(
        lambda module, args, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    memory = model.memory.detach()[None].expand(2, -1, -1).contiguous()
    published(memory, segment)
    assert masks[0].shape == (2, config.positions)
    assert masks[0].all()
    if config.form == "encoder":
        segment[1, -2:] = config.pad_id
        published(memory, segment)
        behind = len(config.suffix_ids)
        assert (masks[1] == 0).nonzero().tolist() == [[1, config.positions - behind - left] for left in (2, 1)]


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2"])
def test_the_plain_export_in_onnx_runtime_gives_that_memory_too(name):
    model = make_model(name)
    size = model.config.segment_length
    segments = documents(model.config.spec(), 3, 5 * size).reshape(3, 5, size).transpose(1, 0, 2).copy()
    memory = model.memory.detach()[None].expand(3, -1, -1).contiguous()
    made_session = ort_peer.session(lean_graph(name), None, 1, "fp32")
    found = ort_peer.bound_loop(made_session, memory, torch.from_numpy(segments))
    for steps in (5, 5, 4, 4):  # each run begins anew
        assert relative_error(found(steps).numpy(), exact_memory(model, segments[:steps], "cpu")) < 1e-5


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_full_attention_is_the_backbones_own_and_reaches_beyond_its_table(name):
    this = Prepared(name, Path(), make_model(name), "random")
    spec = this.model.config.spec()
    full = FullAttention(this, "fp32", "cpu")
    tokens = torch.from_numpy(documents(spec, 1, 30))
    full.lengthen(30)
    wanted = this.model.backbone.base_model(
        input_ids=tokens, attention_mask=torch.zeros(1, 1, 1, 30) if full.encoder else None
    ).last_hidden_state
    own = this.model.backbone.get_output_embeddings()
    wanted = wanted[:, :1] if full.encoder else own(wanted[:, -1:])
    assert relative_error(full(tokens).numpy(), wanted.numpy()) < 1e-5
    full.lengthen(300)
    assert torch.isfinite(full(torch.from_numpy(documents(spec, 1, 300)))).all()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen2"])
def test_flops_of_a_step_are_those_that_pytorch_counts(name):
    model = make_model(name)
    config = model.config
    segment = torch.from_numpy(documents(config.spec(), 1, config.segment_length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        LeanStep(model, "fp32")(model.memory.detach()[None], segment)
    hidden = 0  # what a causal layer need not compute: PyTorch counts the whole square
    if config.form == "decoder":
        p = config.positions
        hidden = 2 * 4 * config.width * (p * p - p * (p + 1) // 2)
    assert step_flops(config) == counter.get_total_flops() - hidden


@pytest.mark.parametrize(("name", "millions"), [("bert-base", 108), ("gpt2-small", 124), ("llama-1b", 1100)])
def test_a_preset_is_the_model_that_it_is_named_for(name, millions):
    config = preset_config(name)
    capacity = position_capacity(config.backbone)
    assert capacity is None or config.positions <= capacity
    with torch.device("meta"):
        backbone = build_backbone(config.form, config.backbone)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
