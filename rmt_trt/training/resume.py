"""The file that a stopped run goes on from: weights, optimizer, curriculum, step.

Nothing else decides a run: its random numbers follow from the seed and the step, and so do its documents. On a CPU it
therefore ends bit for bit as if it had never been stopped; on a GPU as far as a run there repeats itself, since some of
its kernels add in an order that varies.

Plain values and tensors, readable with `weights_only=True`; written whole or not at all, so that a run that dies while
saving keeps the one before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
PLAIN = ("options", "curriculum", "step", "max_segments", "sources")  # JSON values; the others hold tensors


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
    """The run that `save_run` wrote. Errors: FormatError, also when its text, tokenizer or backbone is no longer the same.

    The device may be of another kind than before.
    """
    value = _read(path)
    options = TrainOptions.from_json(value["options"])
    _check_size(path, options, value["model"])
    run = start(options, device)
    if not _same(value["sources"], run.sources):
        raise FormatError(
            f"{path} was trained on {_short(value['sources'])}; its options now name {_short(run.sources)}. Put the same "
            f"text, tokenizer and backbone back, or start a new run"
        )
    try:
        run.model.load_state_dict(value["model"])
        _load_moments(run.optimizer, value["optimizer"]["state"])
        run.curriculum = Curriculum(*(int(number) for number in value["curriculum"]))
        run.step = int(value["step"])
        run.model.config = replace(run.model.config, max_segments=int(value["max_segments"]))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as err:
        raise FormatError(f"{path} does not fit the run that its options describe: {err}") from err
    stages = options.stages
    known = 0 <= run.step <= options.steps and 0 <= run.curriculum.stage <= len(stages)
    if not known or run.model.config.max_segments not in stages:
        raise FormatError(
            f"{path} stands at step {run.step} of {options.steps}, stage {run.curriculum.stage} of {len(stages)} and "
            f"{run.model.config.max_segments} segments; it was changed since it was written"
        )
    return run


def _load_moments(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """AdamW's moments; all else of it follows from the options. Errors: what torch raises, ValueError."""
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        shapes = {tuple(moments[name].shape) for name in ("exp_avg", "exp_avg_sq")}
        if not isinstance(parameter, torch.Tensor) or shapes != {tuple(parameter.shape)}:
            raise ValueError(f"its optimizer holds moments {shapes} for {tuple(getattr(parameter, 'shape', ()))}")


def _same(then: object, now: Mapping[str, Any]) -> bool:
    """Whether all that a file says of its sources still holds."""
    return (
        isinstance(then, dict)
        and {"task", "backbone"} <= set(then)
        and all(now.get(name) == was for name, was in then.items())
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FormatError(f"{path} does not exist; there is no run to resume here. Start one without --resume")
    value = read_file(path)
    if value.get("format") != FORMAT or set(value) != FIELDS:
        raise FormatError(f"{path} is no file to resume training from; expected the resume.pt of an rmt-train run")
    if value["format_version"] != FORMAT_VERSION:
        raise FormatError(f"{path} has format version {value['format_version']!r}; expected {FORMAT_VERSION}")
    try:
        plain = json.loads(json.dumps({name: value[name] for name in PLAIN}))
    except (TypeError, ValueError, RecursionError) as err:
        raise FormatError(f"{path} holds more than plain values in {', '.join(PLAIN)} ({err}). It is damaged") from err
    return {**value, **plain}


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
