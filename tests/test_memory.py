"""Constant memory: what a run holds at its peak does not grow with the document, whatever the source of tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rmt_trt import StateSpec, StepSpec
from rmt_trt.export import export_step
from rmt_trt.runtime.tokens import Document

SHORT, LONG = 20_000, 2_000_000
ALLOWED_MB = 10
SEGMENT, VOCAB = 512, 96


class Averaging(nn.Module):
    """The cheapest step there is: a state that is a running mean of what was read, and logits out of it."""

    def __init__(self, language: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB if language else 2)
        self.language = language

    def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        valid = (segment >= 0)[:, :, None]
        text = self.embed(segment.clamp(min=0)) * valid
        mean = text.sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
        new = torch.where(valid[:, :1], 0.5 * memory + mean, memory)
        return new, self.head(text + new if self.language else new[:, 0])


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One exported step of each kind of logits."""
    folder = tmp_path_factory.mktemp("memory")
    made = {}
    for kind, logits in (("classifier", 2), ("lm", VOCAB)):
        torch.manual_seed(0)
        spec = StepSpec("custom", (StateSpec(shape=(1, 8)),), SEGMENT, VOCAB, kind, logits)
        made[kind] = folder / f"{kind}.onnx"
        export_step(Averaging(kind == "lm"), spec, made[kind], {"memory": np.zeros((1, 8))})
    return made


# The peak resident memory of a fresh process, in KiB, from /proc: the ru_maxrss of a process that was just started is
# that of the process that started it, since the kernel carries it over. The length alone differs between two runs.
CHILD = """
import itertools, re, sys
import numpy as np
from rmt_trt import RMTRuntime
graph, source, logits, length, path, keep = sys.argv[1:]
length = int(length)
tokens = {
    "ints": lambda: (i % 96 for i in range(length)),
    "pieces": lambda: (np.arange(start, min(start + 700, length)) % 96 for start in range(0, length, 700)),
    "memmap": lambda: np.memmap(path, np.int64, "r", shape=(length,)),
    "many": lambda: None,
}[source]()
alignment = "right" if source == "memmap" else "left"
with RMTRuntime(graph, engine="cpu", threads=1) as runtime:
    if source == "many":  # documents of 1 to 4 segments, without end but for the tokens in all
        sizes = (1 + 701 * number % 2048 for number in itertools.count())
        documents = ((np.arange(size) % 96) for size in sizes)
        done = 0
        for _, out in runtime.run_many(documents, slots=8, alignment="right"):
            done += out.tokens
            if done >= length:
                break
    else:
        # In blocks where nothing is kept of a segment, by segment where rows are handed over.
        blocks = keep == "keep" or logits == "last"
        out = runtime.run(tokens, logits=logits, alignment=alignment, on_piece=None if blocks else lambda piece: None)
        assert out.tokens == length, out.tokens
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_mb(graph: Path, source: str, logits: str, length: int, keep: str = "drop") -> float:
    """Peak resident memory of a process that runs one document, in MB."""
    memmap = graph.parent / f"{length}.bin"
    if source == "memmap" and not memmap.exists():
        (np.arange(length) % VOCAB).astype(np.int64).tofile(memmap)
    command = [sys.executable, "-c", CHILD, str(graph), source, logits, str(length), str(memmap), keep]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=graph.parent)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024 / 1e6


@pytest.mark.parametrize(
    ("kind", "source", "logits"),
    [
        ("classifier", "ints", "last"),
        ("classifier", "memmap", "last"),
        ("classifier", "many", "last"),
        ("lm", "many", "last"),
        ("lm", "pieces", "last"),
        ("lm", "pieces", "all"),
        ("lm", "memmap", "loglik"),
    ],
)
def test_peak_memory_at_two_million_tokens_is_that_at_twenty_thousand(
    graphs: dict[str, Path], kind: str, source: str, logits: str
) -> None:
    short, long = (peak_mb(graphs[kind], source, logits, length) for length in (SHORT, LONG))
    seen = f"{kind}, {source}, {logits}: {short:.1f} MB at {SHORT} tokens, {long:.1f} MB at {LONG}"
    print(seen)
    assert long - short <= ALLOWED_MB, seen


def test_a_run_that_keeps_a_value_per_token_is_seen_to_grow(graphs: dict[str, Path]) -> None:
    short, long = (peak_mb(graphs["lm"], "pieces", "loglik", length, keep="keep") for length in (SHORT, LONG))
    assert long - short > ALLOWED_MB, f"{short:.1f} MB at {SHORT} tokens, {long:.1f} MB at {LONG}"


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_pages_of_a_memmap_that_are_given_back_hold_what_they_held(tmp_path: Path, mode: str) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 200_000)
    ids.tofile(tmp_path / "ids.bin")
    mapped = np.memmap(tmp_path / "ids.bin", np.int64, mode)
    if mode != "r":
        mapped[::1000] = ids[::1000] = 7  # with mode "c", these are nowhere but in the pages
    spec = StepSpec("custom", (StateSpec(shape=(1, 8)),), SEGMENT, VOCAB, "classifier", 2)
    for view, wanted in ((mapped, ids), (mapped[4097:-3], ids[4097:-3]), (np.asarray(mapped)[::3], ids[::3])):
        document = Document(view, spec, "the document")
        assert document.count() == len(wanted)
        assert np.array_equal(document.read(len(wanted)), wanted)
        assert np.array_equal(mapped, ids)
