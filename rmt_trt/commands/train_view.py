"""A training run from where it stands to its end: what is shown, what is written, how it stops."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rmt_trt.commands.app import console
from rmt_trt.errors import EngineError, FormatError
from rmt_trt.files import sole_user
from rmt_trt.model.checkpoint import save_model
from rmt_trt.model.delta import save_delta
from rmt_trt.training.adapters import plain
from rmt_trt.training.loop import Run, train
from rmt_trt.training.questions import Question
from rmt_trt.training.recall import recall
from rmt_trt.training.records import add_metrics, line_of, start_metrics
from rmt_trt.training.resume import save_run

MODEL, DELTA, RESUME, METRICS, LOG = "model.pt", "delta.safetensors", "resume.pt", "metrics.csv", "train.log"
SAVE_SECONDS = 20.0

Say = Callable[[str], None]


def run_to_end(out: Path, run: Run, questions: dict[str, list[Question]], minutes: float | None) -> None:
    """Trains to the end, or for so many minutes, and measures recall; says so on the screen and in the log.

    Of several processes the first one writes and speaks. Errors: EngineError, when training diverges; FormatError, when the
    folder cannot be written or another run is at work in it.
    """
    leads = run.accelerator.is_main_process
    with sole_user(out, "rmt-train") if leads else contextlib.nullcontext():
        _run(out, run, questions, minutes, leads)


def _run(out: Path, run: Run, questions: dict[str, list[Question]], minutes: float | None, leads: bool) -> None:
    screen = console()

    def say(line: str) -> None:
        if leads:
            screen.print(line, markup=False)
            with (out / LOG).open("a", encoding="utf-8") as log:
                log.write(line + "\n")

    try:
        say(headline(run))
        if leads:
            _sweep(out)
            start_metrics(out / METRICS, run.step)
            save_run(out / RESUME, run)  # where a run stands that fails before its first evaluation
        # TF32: the weights need no more than that while they move; what is measured afterwards is full float32.
        with _matmul_precision("high"):
            ended = _steps(out, run, screen, say, minutes)
        if not ended:
            say(f"stopped after {minutes:g} minutes at step {run.step} of {run.options.steps}. Go on with --resume")
        elif leads:
            _finish(out, run, questions, say)
    except KeyboardInterrupt:
        saved = (out / RESUME).is_file()
        kept = (
            "--resume goes on from where the run was last saved" if saved else "Nothing was saved yet: start it again"
        )
        say(f"stopped at step {run.step}. {kept}")
        raise
    except torch.OutOfMemoryError as err:
        raise EngineError(
            f"the device has too little memory for this run ({str(err).splitlines()[0]}). Start it anew in another folder, in "
            f"more parts (--accumulate), with segments computed again (--checkpointing) or a smaller --batch"
        ) from err
    except EngineError as err:
        raise EngineError(f"{err}. {out / RESUME} is the run as it was when it was last saved, before that") from err
    except OSError as err:
        raise FormatError(f"cannot write to {out}: {err}. Free some space, then go on with --resume") from err


def _sweep(out: Path) -> None:
    """Removes what a run left half written that was killed; nobody else writes here now."""
    for name in (MODEL, DELTA, RESUME, METRICS):
        for left in out.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _steps(out: Path, run: Run, screen: Console, say: Say, minutes: float | None) -> bool:
    """Steps until the end (true) or until the time is over (false); saves at evaluations."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    began = saved = time.monotonic()
    leads = run.accelerator.is_main_process
    with Progress(*columns, console=screen, transient=True, disable=not (screen.is_terminal and leads)) as progress:
        task = progress.add_task("training", total=run.options.steps, completed=run.step, state="")
        for report in train(run):
            progress.update(task, completed=run.step)
            if report is None:
                continue
            say(line_of(report, len(run.options.stages)))
            over = minutes is not None and run.step < run.options.steps and time.monotonic() - began > 60 * minutes
            over = _agreed(run, over)
            if leads:
                state = f"{report.segments} segments, loss {report.loss:.3f}, accuracy {report.accuracy:.1%}"
                progress.update(task, state=state)
                add_metrics(out / METRICS, report)
                if over or time.monotonic() - saved >= SAVE_SECONDS or run.step == run.options.steps:
                    save_run(out / RESUME, run)
                    _save_model(out, run)
                    saved = time.monotonic()
            if over:
                return False
    return True


def _agreed(run: Run, over: bool) -> bool:
    """Whether the first process's time is over: all of them stop at the same step."""
    flag = torch.tensor(float(over and run.accelerator.is_main_process), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag, "sum") > 0)


def _finish(out: Path, run: Run, questions: dict[str, list[Question]], say: Say) -> None:
    """Writes the model and what was trained of it, and answers questions."""
    options, stages = run.options, len(run.options.stages)
    passed = "all" if run.curriculum.finished(options) else f"{run.curriculum.stage} of {stages}"
    if _save_model(out, run):
        say(f"stages passed: {passed}; {out / MODEL} written, {(out / MODEL).stat().st_size} bytes")
    else:
        say(f"stages passed: {passed}; a model without memory is for comparison, no {MODEL} is made of it")
    if (out / DELTA).is_file():
        say(f"{out / DELTA} holds what was trained, {(out / DELTA).stat().st_size} bytes")
    for path, group in questions.items():
        for result in recall(run.model, group):
            say(f"recall on {path} at {result.segments:5d} segments: {result.right} of {result.questions}")


def _save_model(out: Path, run: Run) -> bool:
    if not run.options.num_memory:
        return False
    save_model(out / MODEL, plain(run.model, run.options.lora_alpha), run.task.tokenizer)
    if run.base is not None and run.options.lora:
        save_delta(out / DELTA, run.model, run.base, run.options.lora_alpha)
    return True


def headline(run: Run) -> str:
    """What is trained, where, with which versions and options, in one line."""
    device = run.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    return (
        f"{'resumed at' if run.step else 'starting at'} step {run.step} of {run.options.steps} on "
        f"{run.accelerator.num_processes} x {name}; torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{parameters} parameters, {trained} trained; {run.options}"
    )
