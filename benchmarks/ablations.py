"""Which parts a small model needs: memory sizes, no curriculum, no memory (arXiv 2304.11062, section 5).

    python -m rmt_trt.benchmarks.ablations OUT [--memory 1,2,5,10,20] [--seeds 0,1] [--jobs 4] [--steps 600]

Each variant is one run of rmt-train with all else at its defaults: 4 layers, width 128, segments of 128 tokens,
synthetic memorize and detect. Then every model answers the same questions in PyTorch, at lengths that it was trained
on and beyond. Runs that are there are not made again, if their flags are the same. Writes ablations.json,
ablations.md and ablations.png.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rmt_trt.benchmarks.command_line import shown
from rmt_trt.benchmarks.tables import Section, markdown_table
from rmt_trt.commands.app import console, new_app, run_command
from rmt_trt.commands.bench import whole_numbers
from rmt_trt.errors import ContractError, EngineError, require
from rmt_trt.files import cannot_write, check_folder, write_file
from rmt_trt.training.questions import Question, make_questions

app = new_app()

CURRICULUM = (1, 2, 3, 4, 5, 7)
FIRST_SEED = 5_000_000  # beyond the seeds of training and of the example's own questions
CHANCE = 1 / 6
MAX_SEED, MAX_SEGMENTS, MAX_COUNT = (1 << 31) - 1, 1 << 20, 100_000
NOT_EXTRA = ("--form", "--text", "--backbone", "--resume")


@dataclass(frozen=True)
class Variant:
    """One way to train: its name in tables, and the flags of rmt-train that are its own."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    passed  stages of the curriculum that were passed, of `stages`
    steps   optimizer steps until the last one was, or None
    right   share of questions answered right, by number of segments
    """

    variant: str
    seed: int
    passed: int
    stages: int
    steps: int | None
    right: dict[int, float]


def variants(memory: Sequence[int]) -> list[Variant]:
    """The memory sizes with the curriculum, then what is left out."""
    steps = ",".join(str(stage) for stage in CURRICULUM)
    longest = str(CURRICULUM[-1])
    sizes = [Variant(f"M = {size}", ("--num-memory", str(size), "--stages", steps)) for size in memory]
    return [
        *sizes,
        Variant("M = 10, no curriculum, mixed lengths", ("--stages", longest)),
        Variant(f"M = 10, no curriculum, {longest} segments only", ("--stages", longest, "--no-mixed")),
        Variant("M = 0, curriculum", ("--num-memory", "0", "--stages", steps)),
    ]


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="Folder of the runs and of the results.")],
    memory: Annotated[str, typer.Option(help="Memory sizes, with commas.")] = "1,2,5,10,20",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas: each variant is trained with each.")] = "0",
    segments: Annotated[
        str, typer.Option(help="Numbers of segments that are asked about.")
    ] = "1,2,4,7,12,16,64,256,1024",
    count: Annotated[int, typer.Option(min=2, max=MAX_COUNT, help="Questions at each.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 600,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    extra: Annotated[str, typer.Option(help="More flags for every run, such as '--layers 1'.")] = "",
) -> None:
    """Trains every variant, asks every model, and writes one table and one plot."""
    from rmt_trt.commands.train import pick_device

    sizes = tuple(dict.fromkeys(whole_numbers("--memory", memory)))
    numbers = whole_numbers("--segments", segments)
    every_seed = tuple(dict.fromkeys(whole_numbers("--seeds", seeds)))
    for flag, given, least, most in (
        ("--memory", sizes, 0, 1024),
        ("--seeds", every_seed, 0, MAX_SEED),
        ("--segments", numbers, 1, MAX_SEGMENTS),
    ):
        if not given or not least <= min(given) <= max(given) <= most:
            raise ContractError(f"{flag} is {given}; expected one number or several, each from {least} to {most}")
    if own := [flag for flag in extra.split() if flag.partition("=")[0] in NOT_EXTRA]:
        raise ContractError(
            f"--extra holds {own[0]}; what is compared are classifiers of synthetic words, each trained from the start. "
            f"Leave it out"
        )
    where, screen = str(pick_device(device)), console()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(out, err) from err
    check_folder(out, "the ablations go")
    asked = [(one, seed) for seed in every_seed for one in variants(sizes)]

    def work(item: tuple[Variant, int]) -> Outcome:
        variant, seed = item
        folder = out / _folder(variant, seed)
        _train(folder, [*variant.flags, "--steps", str(steps), "--seed", str(seed), *extra.split()], where)
        outcome = measure(folder, variant.name, seed, numbers, count, where)
        screen.print(f"{variant.name}, seed {seed}: {_line(outcome)}", markup=False, highlight=False)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(work, asked))
    command = shown(sys.argv[1:], "python -m rmt_trt.benchmarks.ablations")
    write(out, outcomes, {"command": command, "device": _device(where), "steps": steps, "questions": count})


def _folder(variant: Variant, seed: int) -> str:
    kept = "".join(c if c.isalnum() else "-" for c in variant.name.lower())
    return f"{kept}-seed{seed}"


def _train(folder: Path, flags: list[str], device: str) -> None:
    """One run of rmt-train in a process of its own; one that ended is left, one that was broken off goes on.

    Errors: ContractError, where a run with other flags is; EngineError, when training fails.
    """
    begun, ended, asked = (folder / name for name in ("resume.pt", "ended", "flags.json"))
    said = json.dumps(flags).encode()
    if begun.exists() and not (asked.exists() and asked.read_bytes() == said):
        raise ContractError(f"{folder} holds a run with other flags than {' '.join(flags)!r}. Choose another folder")
    if ended.exists():
        return
    folder.mkdir(exist_ok=True)
    write_file(asked, said)
    rest = ["--resume"] if begun.exists() else flags
    command = [sys.executable, "-m", "rmt_trt.commands.train", str(folder), *rest, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False)
    if done.returncode:
        raise EngineError(f"training in {folder} failed: {(done.stderr or done.stdout).strip()[-400:]}")
    write_file(ended, b"")


def measure(folder: Path, name: str, seed: int, numbers: Sequence[int], count: int, device: str) -> Outcome:
    """Asks the model of a run `count` questions at each number of segments."""
    import torch

    from rmt_trt.training.recall import recall
    from rmt_trt.training.records import read_metrics
    from rmt_trt.training.resume import load_run

    run = load_run(folder / "resume.pt", torch.device(device))
    size = run.model.config.segment_length
    questions: list[Question] = []
    for number in numbers:
        questions += make_questions(number * size, count, FIRST_SEED + 1000 * number)
    right = {result.segments: result.right / result.questions for result in recall(run.model, questions)}
    rows = read_metrics(folder / "metrics.csv")
    stages = len(run.options.stages)
    # A row says at which stage it was measured: the last one below `stages` is that at which all were passed.
    below = [int(row["step"]) for row in rows if int(row["stage"]) < stages]
    steps = below[-1] if run.curriculum.finished(run.options) else None
    return Outcome(name, seed, run.curriculum.stage, stages, steps, right)


def write(out: Path, outcomes: Sequence[Outcome], head: dict[str, Any]) -> None:
    """ablations.json, ablations.md and, where matplotlib is there, ablations.png."""
    value = {**head, "runs": [asdict(outcome) for outcome in outcomes]}
    write_file(out / "ablations.json", (json.dumps(value, indent=1) + "\n").encode())
    numbers = list(outcomes[0].right)
    columns = ("variant", "seed", "stages passed", "after steps", *(str(number) for number in numbers))
    rows = [
        (
            one.variant,
            str(one.seed),
            f"{one.passed} of {one.stages}",
            "-" if one.steps is None else str(one.steps),
            *(f"{one.right[number]:.1%}" for number in numbers),
        )
        for one in outcomes
    ]
    note = f"Of {head['questions']} questions at each number of segments, in PyTorch; by chance {CHANCE:.1%}."
    section = Section("Right answers by number of segments", columns, rows, note)
    title = f"# Ablations\n\n`{head['command']}` on {head['device']}; {head['steps']} steps each.\n\n"
    text = title + "\n".join(markdown_table(section))
    write_file(out / "ablations.md", text.encode())
    try:
        draw(out / "ablations.png", outcomes)
    except EngineError as err:
        console().print(f"no plot: {err}")


def draw(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Share of right answers by number of segments, one line a variant: the mean over seeds, each seed a point."""
    matplotlib = require("matplotlib", "train", "plots")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in dict.fromkeys(one.variant for one in outcomes):
        of_name = [one for one in outcomes if one.variant == name]
        lengths = list(of_name[0].right)
        means = [100 * sum(one.right[length] for one in of_name) / len(of_name) for length in lengths]
        (line,) = axes.plot(lengths, means, "o--" if "curriculum" in name else ".-", label=name)
        for one in of_name if len(of_name) > 1 else ():
            axes.plot(lengths, [100 * one.right[length] for length in lengths], "_", color=line.get_color(), alpha=0.6)
    axes.axhline(100 * CHANCE, color="grey", linestyle=":", label="chance")
    axes.axvline(CURRICULUM[-1], color="grey", linewidth=0.8)
    axes.annotate("longest trained", (CURRICULUM[-1], 2), fontsize=8, rotation=90, ha="right", color="grey")
    axes.set_xscale("log")
    ticks = list(outcomes[0].right)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(
        xlabel="number of segments (of 128 tokens each), logarithmic",
        ylabel="questions answered right, %",
        ylim=(0, 103),
    )
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=8, loc="center right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(outcome: Outcome) -> str:
    shares = ", ".join(f"{number}: {share:.0%}" for number, share in outcome.right.items())
    return f"{outcome.passed} of {outcome.stages} stages; {shares}"


def _device(where: str) -> str:
    import torch

    name = torch.cuda.get_device_name(0) if where == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    run_command("ablations", app)
