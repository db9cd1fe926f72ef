"""The file that a stopped run goes on from: weights, optimizer, curriculum, step.

Nothing else decides a run: its random numbers follow from the seed and the step, its documents too. So that on a CPU it ends bit for bit as if it had never been stopped; on a GPU the same
holds as far as a run there repeats itself, since some of its kernels add in an order that varies.

Plain values and tensors, readable with `weights_only=True`; written whole or not at all, so that a run that dies while
saving keeps the one before.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rmt_trt.errors import FormatError
from rmt_trt.model.files import read_file, write_value
from rmt_trt.training.loop import Run, start
from rmt_trt.training.options import Curriculum, TrainOptions

FORMAT = "rmt-trt-training"
FORMAT_VERSION = 1
FIELDS = {"format", "format_version", "options", "model", "optimizer", "curriculum", "step", "max_segments", "sources"}


def save_run(path: Path, run: Run) -> None:
    """Writes a run at the step where it stands. Errors: FormatError, when it cannot be written."""
    value = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "options": run.options.to_json(),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "curriculum": [run.curriculum.stage, run.curriculum.reached],
        "step": run.step,
        "max_segments": run.model.config.max_segments,
        "sources": run.sources,
    }
    write_value(path, value)


def load_run(path: Path, device: torch.device) -> Run:
    """The run that `save_run` wrote. Errors: FormatError, also when its text or its backbone are no longer the same.

    The device may be of another kind than before.
    """
    value = _read(path)
    options = TrainOptions.from_json(value["options"])
    _check_size(path, options, value["model"])
    run = start(options, device)
    if run.sources != value["sources"]:
        raise FormatError(
            f"{path} was trained on {_short(value['sources'])}; its options now name {_short(run.sources)}. Put the same "
            f"text and backbone back, or start a new run"
        )
    try:
        run.model.load_state_dict(value["model"])
        run.optimizer.load_state_dict(value["optimizer"])
        run.curriculum = Curriculum(*(int(number) for number in value["curriculum"]))
        run.step = int(value["step"])
        run.model.config = replace(run.model.config, max_segments=int(value["max_segments"]))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as err:
        raise FormatError(f"{path} does not fit the run that its options describe: {err}") from err
    if not 0 <= run.step <= options.steps or not 0 <= run.curriculum.stage <= len(options.stages):
        raise FormatError(f"{path} stands at step {run.step} of {options.steps}; it was changed since it was written")
    return run


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FormatError(f"{path} does not exist; there is no run to resume here. Start one without --resume")
    value = read_file(path)
    if value.get("format") != FORMAT or set(value) != FIELDS:
        raise FormatError(f"{path} is no file to resume training from; expected the resume.pt of an rmt-train run")
    if value["format_version"] != FORMAT_VERSION:
        raise FormatError(f"{path} has format version {value['format_version']!r}; expected {FORMAT_VERSION}")
    return value


def _check_size(path: Path, options: TrainOptions, weights: object) -> None:
    """Compares the weights that the options ask for with those in the file, before a model of that size is built."""
    if not options.fresh:
        return
    tensors = [t for t in weights.values() if isinstance(t, torch.Tensor)] if isinstance(weights, dict) else []
    held = sum(tensor.numel() for tensor in tensors)
    least = 12 * options.layers * options.width**2
    if held < least:
        raise FormatError(f"{path} holds {held} weights; its options ask for more than {least}. The file is damaged")


def _short(sources: object) -> str:
    return str(sources)[:300]
