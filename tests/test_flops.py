"""rmt-flops: its formulas against what PyTorch counts, the paper's two figures, its report, and what it refuses."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig, OPTForCausalLM

import rmt_trt.files
from rmt_trt.commands import flops
from rmt_trt.errors import ContractError
from rmt_trt.flops import COUNTINGS, MODELS, OPT, Counting, Cut, Sizes, full_attention, recurrent, times_fewer

PAPER, CUT = COUNTINGS["paper"], Cut(512)
PRODUCTS = replace(PAPER, softmax=0)  # what PyTorch counts
SMALL = Sizes("small", 2, models.WIDTH, 4, models.VOCAB)
PNG = b"\x89PNG\r\n\x1a\n"


def counted(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that a call computes, by PyTorch; unfused, as it knows no fused one of the CPU."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return int(counter.get_total_flops())


def opt(**changes: Any) -> OPTForCausalLM:
    """An OPT without values: shapes suffice."""
    config = OPTConfig(**changes)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return OPTForCausalLM(config).eval()


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "flops.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


# The formulas.


def test_full_attention_of_opt_125m_is_what_pytorch_counts():
    tokens = torch.zeros(1, 512, dtype=torch.int64, device="meta")
    model = opt()  # its defaults are the sizes of 125M
    assert full_attention(OPT["opt-125m"], 512, PRODUCTS).total == counted(lambda: model(tokens))


def test_a_narrower_embedding_is_projected_as_pytorch_projects_it():
    model = opt(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, ffn_dim=256, word_embed_proj_dim=16, vocab_size=96
    )
    tokens = torch.zeros(1, 50, dtype=torch.int64, device="meta")
    sizes = Sizes("narrow", 3, 64, 4, 96, embedding=16)
    assert full_attention(sizes, 50, PRODUCTS).total == counted(lambda: model(tokens))


@pytest.mark.parametrize(
    ("name", "backbone", "form"),
    [("gpt2", {}, "decoder"), ("bert", {"intermediate_size": 4 * models.WIDTH}, "encoder")],
)
def test_a_recurrence_is_what_pytorch_counts_of_our_own_step(name, backbone, form):
    step = models.build_model(models.model_config(name, backbone=backbone))
    memory, text = step.memory.detach()[None], torch.arange(2 * models.S + 7)[None] % 90 + 5

    def run() -> None:
        for segment in text.split(models.S, dim=1):  # two whole ones and one of 7 tokens
            step(memory, segment)

    # A classifier's head, which the formulas leave out: pooler and classes, in each of the three segments.
    head = 3 * 2 * models.WIDTH * (models.WIDTH + models.CLASSES) if form == "encoder" else 0
    found = recurrent(SMALL, text.shape[1], Cut(models.S, models.M, form), PRODUCTS)
    assert found.total == counted(run) - head


def test_softmax_is_the_only_term_that_counts_heads():
    one, four = (full_attention(replace(SMALL, heads=heads), 100, PAPER) for heads in (1, 4))
    assert four.total - one.total == four.softmax - one.softmax == 3 * one.softmax


def test_a_causal_count_leaves_out_the_masked_scores_alone():
    whole, lower = (full_attention(SMALL, 101, COUNTINGS[name]) for name in ("paper", "causal"))
    seen = sum(range(1, 102)) / 101**2
    assert (lower.attention, lower.softmax) == (round(whole.attention * seen), round(whole.softmax * seen))
    assert (lower.projections, lower.mlp, lower.logits) == (whole.projections, whole.mlp, whole.logits)


def test_a_text_of_one_segment_costs_the_same_both_ways_without_memory():
    assert times_fewer(OPT["opt-1.3b"], 512, CUT, PAPER) == 1


def test_cost_grows_linearly_with_segments_and_quadratically_without():
    sizes = OPT["opt-125m"]
    assert recurrent(sizes, 2**20, CUT, PAPER) == recurrent(sizes, 2**10, CUT, PAPER).times(2**10)
    long, twice = (full_attention(sizes, n, PAPER) for n in (2**20, 2**21))
    assert (twice.attention, twice.softmax) == (4 * long.attention, 4 * long.softmax)
    assert twice.mlp == 2 * long.mlp


@pytest.mark.parametrize("name", OPT)
def test_published_sizes_have_as_many_parameters_as_the_name_says(name):
    said = float(name.removeprefix("opt-")[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert OPT[name].parameters == pytest.approx(said, rel=0.065)  # 350M is 331M, positions and biases included


# The paper's figures.


def test_the_default_count_gives_both_figures_of_the_paper():
    found = [times_fewer(OPT[name], 4096 * 512, CUT, PAPER) for name in ("opt-125m", "opt-175b")]
    assert [round(ratio) for ratio in found] == [295, 29]


def test_no_other_combination_that_is_tried_gives_both():
    countings = [
        Counting("tried", "", softmax, logits, embedding, causal)
        for softmax, logits, embedding, causal in itertools.product((0, 1, 3, 5), *([(False, True)] * 3))
    ]
    # Memory beside 512 tokens, read and written or once; memory and special tokens within 512 positions; none.
    cuts = (CUT, Cut(512, 10), Cut(512, 5), Cut(492, 10), Cut(502, 5), Cut(499, 6))
    lengths = (2_000_000, 2_043_904, 2_048_000, 2_097_152)
    fitting = [
        (counting.softmax, counting.logits + counting.embedding, counting.causal, cut, tokens)
        for counting, cut, tokens in itertools.product(countings, cuts, lengths)
        if round(times_fewer(OPT["opt-125m"], tokens, cut, counting)) == 295
        and round(times_fewer(OPT["opt-175b"], tokens, cut, counting)) == 29
    ]
    # One product with the vocabulary, counted as the logits' or as the embedding's.
    assert fitting == [(3, 1, False, CUT, 2_097_152)] * 2


# The command.


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs rmt-flops in this process, in a folder of its own; what it printed and how it ended."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rmt-flops", *arguments])
        try:
            flops.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_report_holds_all_lengths_and_models_as_exact_numbers_as_text_and_as_a_plot(command):
    code, shown, err = command("-o", "made", "--model", "opt-175b,opt-125m", "--tokens", "1000,2_097_152")
    assert (code, err.split()) == (0, ["made/flops.json,", "made/flops.md,", "made/flops.png"])
    found = report(Path("made"))
    assert [(row["model"], row["tokens"], row["segments"]) for row in found["rows"]] == [
        ("opt-175b", 1000, 2), ("opt-175b", 2_097_152, 4096), ("opt-125m", 1000, 2), ("opt-125m", 2_097_152, 4096),
    ]  # fmt: skip
    for row in found["rows"]:
        for way in ("full", "rmt"):
            assert row[way].pop("total") == sum(row[way].values())
    text = Path("made/flops.md").read_text(encoding="utf-8")
    assert "rmt-flops -o made --model opt-175b,opt-125m --tokens 1000,2_097_152" in text
    assert "| 2,097,152 | 29.3 | 294.8 |" in text
    assert "| the paper says | 295 | 29 |" in text
    assert "The paper's figures" in shown
    assert Path("made/flops.png").read_bytes().startswith(PNG)


def test_a_model_of_ones_own_is_alone_unless_others_are_named(command):
    own = ("--layers", "4", "--width", "128", "--heads", "4", "--vocab", "300", "--tokens", "4096", "-o", ".")
    command(*own)
    assert [row["name"] for row in report(Path())["models"]] == ["custom"]
    command(*own, "--model", "opt-125m,OPT-125M")
    assert [row["name"] for row in report(Path())["models"]] == ["opt-125m", "custom"]
    assert "The paper's figures" not in Path("flops.md").read_text(encoding="utf-8")


def test_an_encoder_as_we_deploy_it_fills_512_positions_and_computes_no_logits(command):
    code, _, _ = command(
        "--model",
        "bert-base",
        "--form",
        "encoder",
        "--memory",
        "10",
        "--segment",
        "499",
        "--tokens",
        "2043904",
        "-o",
        ".",
    )
    found = report(Path())
    (row,) = found["rows"]
    assert (code, found["cut"]["positions"], row["segments"], row["rmt"]["logits"]) == (0, 512, 4096, 0)
    assert row["rmt"]["attention"] == 4096 * 12 * 4 * 512**2 * 768


def test_tables_need_no_matplotlib_and_leave_no_file(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, shown, err = command("--model", "opt-125m", "--count", "causal")
    assert (code, err, list(Path().iterdir())) == (0, "", [])
    assert "2,097,152" in shown


CUSTOM = "--layers 4 --width 128 --vocab 300"
REFUSED: dict[str, tuple[str, str]] = {
    "unknown model": ("--model opt-125m,gpt-5", "--model names 'gpt-5'; expected some of opt-125m, opt-350m"),
    "no model": ("--model ,", "--model names nothing; expected some of opt-125m"),
    "half a model": (
        "--layers 4",
        "a custom model lacks --width, --vocab; give --layers, --width and --vocab together",
    ),
    "heads alone": ("--heads 4", "a custom model lacks --layers, --width, --vocab"),
    "no layer": ("--layers 0 --width 128 --vocab 300", "layers is 0; expected a whole number from 1 to"),
    "no width": ("--layers 4 --width 0 --vocab 300", "width is 0; expected a whole number from 1 to"),
    "below nothing": ("--layers 4 --width 128 --vocab -1", "vocab is -1; expected a whole number from 1 to"),
    "huge layers": (
        f"--layers {10**30} --width 128 --vocab 300",
        f"layers is {10**30}; expected a whole number from 1",
    ),
    "huge width": (f"--layers 4 --width {2**40} --vocab 300", f"width is {2**40}; expected a whole number from 1 to"),
    "odd width": ("--layers 4 --width 100 --vocab 300", "--width is 100, no multiple of 64; say how many --heads"),
    "heads between": (f"{CUSTOM} --heads 5", "heads is 5, which does not divide a width of 128"),
    "no heads": (f"{CUSTOM} --heads 0", "heads is 0; expected a whole number from 1 to 128"),
    "no segment": ("--segment 0", "segment is 0; expected a whole number from 1 to"),
    "segment below": ("--segment -512", "segment is -512; expected a whole number from 1 to"),
    "huge segment": (f"--segment {10**12}", f"segment is {10**12}; expected a whole number from 1 to"),
    "memory below": ("--memory -1", "memory is -1; expected a whole number from 0 to"),
    "huge memory": (f"--memory {10**12}", f"memory is {10**12}; expected a whole number from 0 to"),
    "length 0": ("--tokens 0,512", "--tokens is 0; expected a whole number from 1 to"),
    "huge length": (f"--tokens {10**13}", f"--tokens is {10**13}; expected a whole number from 1 to"),
    "less than a segment": ("--tokens 511,1024", "--tokens holds 511, less than a segment of 512 tokens"),
    "a word": ("--tokens 512,long", "--tokens is '512,long'; expected whole numbers with commas"),
    "a fraction": ("--tokens 1e6", "--tokens is '1e6'; expected whole numbers with commas"),
    "endless digits": (f"--tokens {'9' * 5000}", "expected whole numbers with commas"),
    "no length": ("--tokens ,", "--tokens names 0 lengths; expected 1 to 100"),
    "too many": (f"--tokens {','.join(map(str, range(512, 700)))}", "--tokens names 188 lengths; expected 1 to 100"),
    "form": ("--form both", "form is 'both'; expected one of decoder, encoder"),
    "count": ("--count kaplan", "--count is 'kaplan'; expected one of paper, hoffmann, causal, layers"),
    "causal encoder": ("--form encoder --count causal", "--count causal is for decoders"),
    "a file": ("-o taken", "--out is taken, a file; expected a folder"),
    "within a file": ("-o taken/made", "cannot write taken/made: Not a directory"),
    "a name too long": (f"-o {'a' * 300}", "File name too long"),
    "a folder of that name": ("-o full", "full/flops.png is no regular file; it is not replaced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_and_nothing_is_written(name, command):
    arguments, message = REFUSED[name]
    Path("taken").write_text("mine", encoding="utf-8")
    Path("full/flops.png").mkdir(parents=True)
    code, shown, err = command(*arguments.split())
    assert (code, shown, err.count("\n")) == (1, "", 1), err
    assert err.startswith("rmt-flops: ")
    assert message in err
    assert len(err) < 600
    assert sorted(path.name for path in Path().rglob("*")) == ["flops.png", "full", "taken"]


def test_text_for_a_number_is_a_mistake_of_usage(command):
    code, _, err = command("--segment", "many")
    assert code == 2
    assert "Invalid value for '--segment'" in err


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(command, monkeypatch):
    monkeypatch.setattr(rmt_trt.files.os, "access", lambda *_: False)
    code, shown, err = command("-o", "made")
    assert (code, shown) == (1, "")
    assert "made cannot be written, where the report goes" in err


def test_a_plot_without_matplotlib_names_what_to_install(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, shown, err = command("-o", "made")
    assert (code, shown, err.count("\n"), Path("made").exists()) == (1, "", 1, False)
    assert re.search(r"needs the Python package 'matplotlib'.*pip install 'rmt-trt\[bench\]'", err)


@pytest.mark.parametrize("tokens", [0, -1, 10**13, 1.5, True])
def test_the_functions_refuse_a_length_that_is_none(tokens):
    for call in (full_attention, lambda sizes, n, count: recurrent(sizes, n, CUT, count)):
        with pytest.raises(ContractError, match=f"tokens is {re.escape(repr(tokens))}; expected a whole number from 1"):
            call(MODELS["bert-base"], tokens, PAPER)
