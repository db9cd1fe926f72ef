"""What a results file says, before it is believed: each value of the kind and within the bounds that rmt-eval writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

MOST = 1 << 62  # of what is counted: tokens, bytes
SECONDS = 1e12


def check_head(head: Mapping[str, Any]) -> None:
    """Looks at the values of a head that tables and plots show. Errors: ValueError, naming what is wrong; KeyError."""
    model, tasks = head["model"], head["tasks"]
    if not isinstance(model, dict) or not isinstance(tasks, dict):
        raise ValueError("'model' and 'tasks' are no tables")
    for name in ("name", "engine", "dtype"):
        _check(name, model[name], _text)
    _check("segment_length", model["segment_length"], _whole)
    labels = head["labels"]
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"'labels' is {labels!r:.60}")
    for name, about in tasks.items():
        _check(f"tasks, {name}", about, _table)


def check_row(value: Mapping[str, Any]) -> None:
    """Looks at what a row gives. Errors: ValueError, naming what is wrong; KeyError, for what each row has."""
    _check("task", value["task"], _text)
    _check("segments", value["segments"], _whole)
    for name, holds in _GIVEN.items():
        if name in value:
            _check(name, value[name], holds)


def _check(name: str, value: Any, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        raise ValueError(f"'{name}' is {value!r:.60}")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any, least: int = 1, most: int = MOST) -> bool:
    return type(value) is int and least <= value <= most


def _count(value: Any) -> bool:
    return _whole(value, 0)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= SECONDS


def _scalar(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) <= MOST)


def _table(value: Any) -> bool:
    """Names with plain values, or with lists of them."""
    return isinstance(value, dict) and all(
        all(map(_scalar, item)) if isinstance(item, list) else _scalar(item) for item in value.values()
    )


def _marks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(kinds, dict) and all(item is None or _count(item) for item in kinds.values())
        for kinds in value.values()
    )


_GIVEN: dict[str, Callable[[Any], bool]] = {
    "position": lambda value: value is None or _whole(value, 0, 100),
    "count": _count,
    "right": _count,
    "tokens": _count,
    "longest": _count,
    "seconds": _number,
    "slots": _count,
    "steps": _count,
    "idle_share": _number,
    "wrong": lambda value: isinstance(value, (list, tuple)) and all(map(_count, value)),
    "memory": _marks,
    "text": _table,
    "left_out": _text,
}
