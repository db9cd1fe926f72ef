"""rmt-train: a small Recurrent Memory Transformer on the synthetic memorize / detect-and-memorize task, from nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmt_trt.commands.app import Debug, Version, console, new_app, run_command
from rmt_trt.errors import ContractError, EngineError, FormatError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from rmt_trt.training.loop import Run
    from rmt_trt.training.options import TrainOptions
    from rmt_trt.training.questions import Question

MODEL, RESUME, METRICS, LOG = "model.pt", "resume.pt", "metrics.csv", "train.log"
SAVE_SECONDS = 20.0

app = new_app()


@app.command()
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="Folder for model.pt, metrics.csv, train.log and resume.pt.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT, with its own options.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    questions: Annotated[
        list[Path] | None, typer.Option(help="Measure recall on this questions file in the end; may be repeated.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of the backbone.")] = 4,
    width: Annotated[int, typer.Option(help="Width of the backbone and of the memory vectors.")] = 128,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    segment_length: Annotated[int, typer.Option(help="Text tokens in a full segment.")] = 128,
    num_memory: Annotated[int, typer.Option(help="Memory vectors.")] = 10,
    stages: Annotated[
        str, typer.Option(help="Curriculum: largest number of segments of each stage.")
    ] = "1,2,3,4,5,7,12",
    threshold: Annotated[float, typer.Option(help="Accuracy that passes a stage, 0 to 1.")] = 0.99,
    patience: Annotated[int, typer.Option(help="Evaluations in a row that must reach it.")] = 2,
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = 800,
    batch: Annotated[int, typer.Option(help="Documents in a step.")] = 256,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="Highest learning rate.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 50,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    bptt: Annotated[int, typer.Option(help="Last segments that gradients flow through; 0 means all.")] = 8,
    memory_noise: Annotated[float, typer.Option(help="Noise on the memory between segments, share of its size.")] = 0.1,
    eval_every: Annotated[int, typer.Option(help="Steps between two evaluations.")] = 25,
    eval_rows: Annotated[int, typer.Option(help="Documents in an evaluation.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of weights and documents.")] = 0,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Trains a classifier that reads documents of any length and answers where somebody went.

    A run that was stopped goes on with --resume, on a CPU bit for bit. The result, OUT/model.pt, is what rmt-export takes.
    """
    from rmt_trt.training.options import TrainOptions
    from rmt_trt.training.questions import load_questions

    asked = {str(path): load_questions(path) for path in questions or []}
    where = pick_device(device)
    options = None
    if resume:
        _refuse_changes(context)
    else:
        values = {field.name: context.params[field.name] for field in fields(TrainOptions)}
        options = TrainOptions(**{**values, "stages": _numbers(stages)})
    run = _open(out, options, where)
    _train(out, run, asked)


def pick_device(name: str) -> torch.device:
    """The device that `--device` names. Errors: ContractError, EngineError."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ContractError(f"--device is {name!r}; expected auto, cpu or cuda")
    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise EngineError(
            "--device cuda: PyTorch finds no CUDA device here. Train with --device cpu, or install a driver"
        )
    return torch.device("cuda" if usable and name != "cpu" else "cpu")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as err:
        raise ContractError(f"--stages is {text!r}; expected whole numbers with commas, such as 1,2,3,5,7") from err


def _refuse_changes(context: typer.Context) -> None:
    """With --resume the run's own options hold: a changed one would make another run of it."""
    free = ("out", "resume", "device", "questions", "debug", "version")
    given = [
        "--" + name.replace("_", "-")
        for name in context.params
        if name not in free and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise ContractError(f"--resume goes on with the run's own options; leave out {', '.join(given)}")


def _open(out: Path, options: TrainOptions | None, device: torch.device) -> Run:
    """A new run in a folder that holds none, or without options the run that the folder holds."""
    from rmt_trt.training.loop import start
    from rmt_trt.training.resume import load_run

    if options is None:
        return load_run(out / RESUME, device)
    if held := [name for name in (RESUME, MODEL) if (out / name).exists()]:
        raise FormatError(f"{out} holds {held[0]} of another run. Go on with it (--resume), or choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise FormatError(f"the folder {out} cannot be made: {err.strerror}. Choose another place") from err
    return start(options, device)


def _train(out: Path, run: Run, questions: dict[str, list[Question]]) -> None:
    """Trains to the end and measures recall; says so on the screen and in the log."""
    import torch

    from rmt_trt.training.recall import recall
    from rmt_trt.training.records import start_metrics

    screen = console()

    def say(line: str) -> None:
        screen.print(line, markup=False)
        with (out / LOG).open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    try:
        say(_headline(run))
        start_metrics(out / METRICS, run.step)
        # TF32: the weights need no more than that while they move; what is measured afterwards is full float32.
        torch.set_float32_matmul_precision("high")
        _steps(out, run, screen, say)
        torch.set_float32_matmul_precision("highest")
        stages = len(run.options.stages)
        passed = "all" if run.curriculum.finished(run.options) else f"{run.curriculum.stage} of {stages}"
        say(f"stages passed: {passed}; {out / MODEL} written, {(out / MODEL).stat().st_size} bytes")
        for path, group in questions.items():
            for result in recall(run.model, group):
                say(f"recall on {path} at {result.segments:5d} segments: {result.right} of {result.questions}")
    except KeyboardInterrupt:
        say("stopped. " + ("Go on with --resume" if (out / RESUME).exists() else "Nothing was saved yet"))
        raise
    except OSError as err:
        raise FormatError(f"cannot write to {out}: {err}. Free some space, then go on with --resume") from err


def _steps(out: Path, run: Run, screen: Console, say: Callable[[str], None]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rmt_trt.model.checkpoint import save_model
    from rmt_trt.training.loop import train
    from rmt_trt.training.records import add_metrics, line_of
    from rmt_trt.training.resume import save_run
    from rmt_trt.training.tasks.words import tokenizer_json

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    saved = time.monotonic()
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("training", total=run.options.steps, completed=run.step)
        for report in train(run):
            progress.update(task, completed=run.step)
            if report is None:
                continue
            say(line_of(report, len(run.options.stages)))
            add_metrics(out / METRICS, report)
            if time.monotonic() - saved >= SAVE_SECONDS or run.step == run.options.steps:
                save_model(out / MODEL, run.model, tokenizer_json())
                save_run(out / RESUME, run)
                saved = time.monotonic()
    save_model(out / MODEL, run.model, tokenizer_json())


def _headline(run: Run) -> str:
    import torch
    import transformers

    device = run.model.memory.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return (
        f"{'resumed at' if run.step else 'starting at'} step {run.step} of {run.options.steps} on {name}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {parameters} parameters; {run.options}"
    )


def main() -> None:
    """Console entry point."""
    run_command("rmt-train", app)
