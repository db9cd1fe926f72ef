"""What the tests of rmt-eval share: results that were measured of no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmt_trt.evaluation.rows import FORMAT, Results, Row
from rmt_trt.training.tasks.words import PLACES

SIZE = 128  # tokens of a segment of the example
LARGEST_PLOT = 150_000  # bytes


def head_of(**model: Any) -> dict[str, Any]:
    known = {"name": "m.rmt", "fingerprint": "f", "engine": "cpu", "dtype": "fp32", "segment_length": SIZE}
    return {
        "format": FORMAT, "model": known | model, "tasks": {"detect": {"task": "detect", "words": 333}},
        "labels": list(PLACES), "seed": 0,
    }  # fmt: skip


def results_of(folder: Path, task: str = "detect", positions: tuple[int, ...] = (), **model: Any) -> Results:
    """Plausible rows."""
    lengths = [(segments, None) for segments in (1, 4, 16, 64)] + [(64, place) for place in positions]
    rows = [
        Row(task, segments, place, 40, 40 - i, 40 * segments * SIZE, segments * SIZE, 1.0, 8, text={"repeats": segments / 3})
        for i, (segments, place) in enumerate(lengths)
    ]  # fmt: skip
    return Results(folder, head_of(**model), rows)
