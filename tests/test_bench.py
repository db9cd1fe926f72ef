"""rmt-bench: what it reports and how it fails. No figure that it measures is judged here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import BACKBONES, made, make_model
from shared import once
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from rmt_trt.benchmarks import compare, ort_peer, peers, plan
from rmt_trt.benchmarks.bench import Extra, run_benchmark
from rmt_trt.benchmarks.endurance import powers_of_two
from rmt_trt.benchmarks.fits import crossing, fit, interpolate
from rmt_trt.benchmarks.full_attention import FullAttention
from rmt_trt.benchmarks.kernels import by_name
from rmt_trt.benchmarks.lean import LeanStep, exact_memory
from rmt_trt.benchmarks.limits import step_flops
from rmt_trt.benchmarks.many import ManyOptions, lengths
from rmt_trt.benchmarks.plan import Plan, documents
from rmt_trt.benchmarks.presets import PRESETS, Prepared, prepare, preset_config
from rmt_trt.benchmarks.published import PublishedStep
from rmt_trt.benchmarks.ratios import best_peer, full_attention, ratios
from rmt_trt.benchmarks.report import markdown, sections
from rmt_trt.benchmarks.rows import Results, Row
from rmt_trt.benchmarks.timing import Effort, Timing, measure, measure_in_turn
from rmt_trt.commands.bench import app
from rmt_trt.errors import ContractError, EngineError, FormatError
from rmt_trt.export.verify import relative_error
from rmt_trt.model.backbone import build_backbone, position_capacity

NO_PEERS = Plan(
    engine="cpu", dtype="fp32", batches=(1, 2), tokens=(30, 90), peers=(), repeat=1, steps=4, threads=1, quick=True
)


PUBLISHED_EAGER, LEAN_EAGER = "PyTorch, model as published: eager", "lean PyTorch: eager"


def took(seconds: float) -> Timing:
    return Timing.of([seconds])


def prepared(name: str) -> Prepared:
    return Prepared(name, made(name).bundle, made(name).model, "random")


def plan_with(*names: str) -> Plan:
    return Plan(**{**vars(NO_PEERS), "peers": names})


def lean_graph(name: str) -> Path:
    """The lean step of a model of the catalogue in opset 20, as rmt-bench exports it and reuses it."""
    return once(
        f"{name}-lean-fp32-20.onnx",
        lambda path: ort_peer.export_lean(make_model(name), "fp32", 20, path.parent, name),
    )


def run(name: str, options: Plan, out: Path, **extra: object) -> Results:
    return run_benchmark(prepared(name), options, Extra(**extra), out / "out", out / "work", lambda text: None)


# What is computed from given numbers.


def test_a_ratio_is_the_peers_time_by_ours_of_the_same_batch():
    rows = [
        Row("step", "rmt-trt", 1, 100, 10, took(2.0)),
        Row("step", "rmt-trt", 8, 100, 10, took(4.0)),
        Row("step", "slow", 1, 100, 10, took(9.0)),
        Row("step", "slow", 8, 100, 5, took(10.0)),
        Row("step", "fast", 1, 100, 10, took(1.0)),
        Row("step", "broken", 8, failed="OSError: no compiler"),
        Row("step", "alone", 32, 100, 10, took(1.0)),
    ]
    found = {(one.name, one.batch): one.times for one in ratios(rows)}
    assert found == {("fast", 1): 0.5, ("slow", 1): 4.5, ("slow", 8): 5.0, ("broken", 8): None}
    assert [one.name for one in ratios(rows)] == ["fast", "slow", "slow", "broken"]
    assert best_peer(rows, 1).name == "fast"
    assert best_peer(rows, 32) is None


def test_a_ratio_prefers_what_ours_took_in_turn_with_the_peer():
    rows = [
        Row("step", "rmt-trt", 1, 100, 10, took(2.0)),
        Row("step", "slow", 1, 100, 10, took(9.0), {"rmt-trt_seconds": 3.0}),
    ]
    assert [(one.times, one.ours_seconds) for one in ratios(rows)] == [(3.0, 0.3)]


def test_a_row_knows_its_time_per_segment_and_its_throughput():
    row = Row("step", "rmt-trt", 4, 1000, 10, took(2.0))
    assert (row.per_segment, row.tokens_per_second) == (0.2, 2000.0)
    assert (Row("step", "x", failed="y").per_segment, Row("step", "x").tokens_per_second) == (None, None)


def test_a_timing_has_the_median_and_the_spread():
    timing = Timing.of([3.0, 1.0, 2.0])
    assert (timing.median, timing.low, timing.high, timing.repeats) == (2.0, 1.0, 3.0, 3)
    assert timing.low < timing.p10 < timing.p90 < timing.p99 < timing.high


def test_calls_take_turns_and_a_call_is_warm_before_it_is_timed():
    calls: list[str] = []
    timings = measure_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], Effort(3, 100.0))
    assert (calls, [t.repeats for t in timings]) == (["a", "b"] * 3, [3, 3])
    calls.clear()
    assert measure(lambda: calls.append("a"), Effort(2, 100.0), warm=lambda: calls.append("w")).repeats == 2
    assert calls == ["w", "a", "a"]


def test_a_slow_call_is_repeated_no_more_than_it_must_be():
    assert measure_in_turn([lambda: None], Effort(20, 0.0, at_least=3))[0].repeats == 3
    assert measure_in_turn([lambda: None], Effort(20, 0.0, at_least=1))[0].repeats == 1


def test_the_fit_extrapolates_a_known_quadratic():
    lengths = [4096, 8192, 16384, 32768]
    curve = fit(lengths, [0.01 + 2e-6 * n + 3e-11 * n * n for n in lengths])
    assert curve is not None
    for length in (10_000, 1_000_000, 10_000_000):
        assert curve(length) == pytest.approx(0.01 + 2e-6 * length + 3e-11 * length * length, rel=1e-6)


def test_the_fit_refuses_too_few_points_and_times_that_do_not_grow():
    assert fit([4096, 8192], [1.0, 2.0]) is None
    assert fit([4096, 8192, 16384], [3.0, 4.0, 4.5]) is None
    assert fit([10, 20], [1.0, 2.0], degree=1)(40) == pytest.approx(4.0)


def test_between_measured_lengths_times_are_interpolated_in_logarithms():
    between = interpolate([100, 400], [1.0, 16.0])
    assert between(200) == pytest.approx(4.0)


def test_the_crossing_of_a_line_and_a_parabola_is_found():
    assert crossing(lambda n: 100 * n, lambda n: n * n, 10, 1e6) == pytest.approx(100, rel=1e-6)
    assert crossing(lambda n: 1.0, lambda n: n, 10, 1e6) == pytest.approx(10)
    assert crossing(lambda n: n * n, lambda n: n, 10, 1e6) is None


def test_full_attention_is_measured_extrapolated_and_crossed():
    def full(n: int) -> float:
        return 1e-3 + 1e-6 * n + 1e-10 * n * n

    rows = [Row("full", "full attention", 1, n, 0, took(full(n))) for n in (4096, 8192, 16384, 32768)]
    rows += [Row("full", "full attention", 1, 65536, failed="out of device memory")]
    rows += [Row("length", "rmt-trt", 1, n, n // 512, took(0.01 + 3e-6 * n)) for n in (4096, 65536, 1 << 20)]
    found = full_attention(rows)
    assert found.at(8192) == (pytest.approx(full(8192)), False)
    assert found.at(2_000_000) == (pytest.approx(full(2_000_000)), True)
    assert found.crossing == pytest.approx(
        (2e-6 + (4e-12 + 4 * 1e-10 * 9e-3) ** 0.5) / 2e-10, rel=0.03
    )  # between two measured lengths


def test_kernels_are_summed_by_name():
    assert by_name([("a", 1.0), ("b", 5.0), ("a", 2.0)]) == [("b", 1, 5.0), ("a", 2, 3.0)]


def test_lengths_of_many_documents_lie_within_their_bounds_and_stay_the_same():
    found = lengths(ManyOptions(1000, 10, 1000, 32))
    assert (found.min() >= 10, found.max() <= 1000, len(found)) == (True, True, 1000)
    assert 80 < np.exp(np.mean(np.log(found))) < 125  # log-uniform: the geometric mean is 100
    assert np.array_equal(found, lengths(ManyOptions(1000, 10, 1000, 32)))


def test_drift_is_looked_at_after_powers_of_two_and_at_the_end():
    assert [powers_of_two(n) for n in (1, 8, 20)] == [[1], [1, 2, 4, 8], [1, 2, 4, 8, 16, 20]]


# The peers do what ours does.


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


# Whole runs on the CPU.


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_run_reports_ours_and_each_peer_at_each_size(name, tmp_path):
    (tmp_path / "work").mkdir()
    shutil.copy(lean_graph(name), tmp_path / "work")
    found = run(name, Plan(**{**vars(plan_with("published", "lean", "ort")), "quick": False}), tmp_path)
    steps = {(row.name, row.batch) for row in found.of("step")}
    both = ("rmt-trt", PUBLISHED_EAGER, LEAN_EAGER, "ONNX Runtime: opset 20", "ONNX Runtime: opset 23")
    assert steps == {(peer, b) for peer in both for b in (1, 2)} | {("ONNX Runtime: step.onnx in fp32", 1)}
    assert [row.tokens for row in found.of("length")] == [30, 90]
    assert [row.name for row in found.of("latency")] == ["one segment more", "1,000 tokens more"]
    assert all(not row.failed for row in found.rows), [row.failed for row in found.rows]
    assert all(row.values["error"] < 1e-4 for row in found.of("step"))

    written = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert [row["kind"] for row in written["rows"]] == [row.kind for row in found.rows]
    assert written["model"]["segment_length"] == made(name).spec.segment_length
    assert written["machine"]["versions"]["torch"] == torch.__version__
    text = (tmp_path / "out/results.md").read_text(encoding="utf-8")
    assert f"times as fast as {LEAN_EAGER} | 2 |" in text
    for group in ("PyTorch, model as published", "lean PyTorch", "ONNX Runtime"):
        assert f"times as fast as {group}, best variant | 2 |" in text
    assert "![time_by_length.svg](time_by_length.svg)" in text
    assert (tmp_path / "out/throughput_by_batch.svg").stat().st_size > 1000


def test_a_peer_that_fails_becomes_a_row_with_its_reason_and_the_run_goes_on(tmp_path, monkeypatch):
    def broken(*_: object) -> object:
        raise OSError("no compiler here\nlong advice")

    monkeypatch.setitem(peers.TORCH_PEERS, "graph", {"broken": broken})
    monkeypatch.setattr(plan, "CPU_PEERS", ("lean-graph", "lean-eager"))
    found = run("bert", plan_with("lean-graph", "lean-eager"), tmp_path)
    failed = [(row.name, row.batch, row.failed) for row in found.of("step") if row.failed]
    assert failed == [("lean PyTorch: broken", batch, "OSError: no compiler here") for batch in (1, 2)]
    assert found.of("step", LEAN_EAGER)[0].timing is not None
    assert "no compiler here" in (tmp_path / "out/results.md").read_text(encoding="utf-8")


def test_a_peer_whose_memory_is_wrong_is_no_peer(tmp_path, monkeypatch):
    def forgetful(step: LeanStep, memory: torch.Tensor, segments: torch.Tensor, mode: str) -> peers.Loop:
        return lambda count: step(memory, segments[count - 1])

    monkeypatch.setitem(peers.TORCH_PEERS, "eager", {"forgetful": forgetful})
    found = run("bert", plan_with("lean-eager"), tmp_path)
    wrong = found.of("step", "lean PyTorch: forgetful")
    assert [row.timing for row in wrong] == [None, None]
    assert all("is off by" in row.failed for row in wrong)


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setitem(peers.TORCH_PEERS, "eager", {"eager": interrupted})
    with pytest.raises(KeyboardInterrupt):
        run("bert", plan_with("lean-eager"), tmp_path)
    written = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert {"load", "step", "length", "latency"} <= {row["kind"] for row in written["rows"]}
    assert (tmp_path / "out/results.md").is_file()


def test_results_are_on_disk_after_each_measurement(tmp_path):
    results = Results(tmp_path, {"command": "x"})
    for count in (1, 2):
        results.add(Row("limit", "copy", values={"bytes_per_second": float("nan")}))
        written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        assert (len(written["rows"]), written["rows"][0]["values"]) == (count, {"bytes_per_second": None})


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_many_drift_and_growth_are_reported(name, tmp_path):
    extra = {
        "compare": False, "many": ManyOptions(6, 1, 4, 2), "drift": 8, "drift_dtypes": ("fp32", "bf16"), "growth": 900,
    }  # fmt: skip
    found = run(name, NO_PEERS, tmp_path, **extra)
    assert [row.name for row in found.of("many")] == ["full batches", "list", "iterator"]
    segments = int(lengths(extra["many"]).sum())
    for row in found.of("many")[1:]:
        assert (row.values["documents"], row.values["segments"]) == (6, segments)
        assert 0 <= row.values["idle_share"] < 1
    exact, refused = found.of("drift")
    assert [(e["segments"], e["memory"]) for e in exact.values["table"]] == [(1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0)]
    assert refused.failed.startswith("EngineError")
    (growth,) = found.of("growth")
    assert [entry["tokens"] for entry in growth.values["table"]] == [40, 45, 900]
    titles = [section.title for section in sections(found.head, found.rows)]
    assert titles == [
        "Latency",
        "Many documents",
        "Drift of the memory from fp32",
        "Growth",
        "What failed or was left out",
    ]


def test_ours_is_held_to_the_same_tolerance(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.Segments, "error", lambda self, memory, batch: 0.5)
    found = run("bert", NO_PEERS, tmp_path)
    assert all("is off by 5.0e-01" in row.failed for row in found.of("step", "rmt-trt"))
    assert ratios(found.rows) == []


def test_the_report_names_machine_versions_and_command():
    head = {
        "command": "rmt-bench x.rmt",
        "machine": {"gpu": {"name": "H1", "driver": "9", "cuda": "13"}, "rmt-trt": "1", "versions": {"torch": "2"}},
        "model": {"name": "x", "engine": "cuda", "dtype": "fp16", "weights": "random", "flops_per_segment": 1e9},
    }
    rows = [
        Row("limit", "matrix product fp16", values={"flops_per_second": 1e12}),
        Row("step", "rmt-trt", 2, 100, 10, took(0.1), {"error": 1e-3, "once_seconds": 2e-4}),
        Row("bare", "rmt-trt", 2, 100, 10, took(0.08)),
    ]
    text = markdown(head, rows)
    assert "H1, driver 9, CUDA 13; rmt-trt 1" in text
    assert "    rmt-bench x.rmt" in text
    assert "| 20.0% | 1.250 | 0.200 |" in text  # 2 x 1e9 operations in 10 ms of 1e12 a second; 10 ms by 8 ms


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tpu"}, "--engine is 'tpu'; expected one of cpu, cuda"),
        ({"dtype": "fp8"}, "--dtype is 'fp8'; expected one of fp32, fp16, bf16"),
        ({"peers": ("jax",)}, "--peers names 'jax'; expected some of published, lean, published-eager"),
        ({"engine": "cpu", "peers": ("lean-compile",)}, "'lean-compile', which needs a GPU"),
        ({"compile_mode": "fast"}, "--compile-mode is 'fast'; expected one of default, max-autotune"),
        ({"engine": "cpu", "peers": ("full",)}, "'full', which needs a GPU"),
        ({"batches": (0,)}, "--batch is '0'; expected whole numbers from 1 on"),
        ({"tokens": ()}, "--tokens is ''"),
        ({"repeat": 0}, "--repeat is 0; expected a number above 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ContractError, match=message):
        Plan(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.pt", "--engine", "cpu", "--batch", "1,two"], "--batch is '1,two'; expected whole numbers with commas"),
        (["x.pt", "--engine", "cpu", "--many-segments", "5"], "expected two whole numbers, such as 10,1000"),
        (["x.pt", "--engine", "cpu", "--many", "--many-segments", "5,2"], "the smaller first"),
        (["--engine", "cpu"], "give either a bundle or checkpoint to measure, or --preset"),
        (["x.pt", "--engine", "cpu", "--preset", "example"], "give either"),
        (["--engine", "cpu", "--preset", "bert-huge"], "--preset is 'bert-huge'; expected one of bert-base"),
        (["--preset", "bert-large"], "--preset is 'bert-large'; expected one of bert-base"),
        (["--preset", "example", "--engine", "cpu", "--drift-dtypes", "evil"], "--drift-dtypes names 'evil'"),
        (["x.pt", "--engine", "cpu", "--drift", "--segments", "1"], "--segments is 1"),
    ],
)
def test_bad_options_give_one_clear_error(arguments, message, tmp_path):
    where = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(app, [*arguments, *where])
    assert isinstance(done.exception, ContractError), done.exception
    assert message in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--out", "--suite"])
def test_a_file_where_a_folder_is_wanted_stays_as_it_is(flag, tmp_path):
    place = tmp_path / "here"
    place.write_text("mine")
    arguments = ["--preset", "example", "--engine", "cpu"] if flag == "--out" else []
    done = CliRunner().invoke(app, [*arguments, flag, str(place), "--work", str(tmp_path / "work")])
    assert isinstance(done.exception, ContractError)
    assert f"{flag} is {place}, a file; expected a folder" in str(done.exception)
    assert place.read_text() == "mine"


def test_a_machine_without_the_gpu_is_told_so_before_anything_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["--preset", "bert-base", "--work", str(tmp_path / "work")])
    assert isinstance(done.exception, EngineError)
    assert "sees 0 here. Measure on the CPU with --engine cpu" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_the_engines_graphs_says_how_to_add_them(tmp_path):
    bundle = made("bert").bundle
    with pytest.raises(FormatError, match=f"Add them with: rmt-export {bundle} --engine cuda --dtype fp16"):
        prepare(bundle, None, tmp_path, "cuda", ("fp16",), lambda text: None)


def test_a_checkpoint_is_exported_once_and_its_bundle_reused(tmp_path):
    said: list[str] = []
    first = prepare(made("bert").checkpoint, None, tmp_path, "cpu", ("fp32",), said.append)
    again = prepare(made("bert").checkpoint, None, tmp_path, "cpu", ("fp32",), said.append)
    assert first.bundle == again.bundle == tmp_path / "bert.rmt"
    assert said[-1] == f"{tmp_path / 'bert.rmt'} is reused"


def test_every_preset_can_be_asked_for_by_the_command():
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert all(name in shown for name in (*PRESETS, "example"))
