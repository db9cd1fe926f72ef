"""What rmt-trt's own operators make of nothing, and of inputs and attributes that they cannot use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hardware import require_native
from native_nodes import FLOAT8, low, normal, run
from onnx import TensorProto


@pytest.fixture(autouse=True)
def _built() -> None:
    require_native()


def test_a_product_of_no_rows_is_empty() -> None:
    assert run("Linear", normal(0, 5), normal(5, 3), normal(3))[0].shape == (0, 3)
    assert run("Linear", normal(2, 0, 5), normal(5, 3), normal(3))[0].shape == (2, 0, 3)
    assert run("Quantize", normal(0, 4), outputs=(FLOAT8,))[0].shape == (0, 4)
    assert run("SiluMul", normal(2, 0))[0].shape == (2, 0)
    empty = run("Rotary", normal(1, 0, 12), normal(0, 2), normal(0, 2), outputs=HEADS, heads=1, kv_heads=1)
    assert [value.shape for value in empty] == [(1, 0, 4)] * 3


HEADS = (TensorProto.FLOAT,) * 3
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "widths": (lambda: run("Linear", normal(2, 4), normal(5, 3), normal(3)), "input, weight and bias do not fit together"),
    "a turned weight": (lambda: run("Linear", normal(2, 4), normal(4, 3), normal(3), transposed=1), "do not fit together"),
    "a bias of another width": (lambda: run("Linear", normal(2, 4), normal(4, 3), normal(4)), "do not fit together"),
    "a bias with two axes": (lambda: run("Linear", normal(2, 4), normal(4, 3), normal(1, 3)), "weight with two axes, a bias with one"),
    "a weight with one axis": (lambda: run("Linear", normal(2, 4), normal(4), normal(1)), "weight with two axes, a bias with one"),
    "a weight with three axes": (lambda: run("Linear", normal(2, 4), normal(4, 3, 1), normal(3)), "weight with two axes, a bias with one"),
    "nine axes": (lambda: run("Linear", normal(*[1] * 9), normal(1, 3), normal(3)), "no axis, or more than 8"),
    "a number": (lambda: run("Linear", np.array(1, np.float32), normal(1, 3), normal(3)), "no axis, or more than 8"),
    "an activation that it lacks": (
        lambda: run("Linear", normal(2, 4), normal(4, 3), normal(3), activation="relu"), "other than 'none' and 'gelu'",
    ),
    "an activation with a long name": (
        lambda: run("Linear", normal(2, 4), normal(4, 3), normal(3), activation="relu" * 20), "other than 'none' and 'gelu'",
    ),
    "an attribute of more than 32 bits": (
        lambda: run("Rotary", normal(1, 2, 12), normal(2, 2), normal(2, 2), outputs=HEADS, heads=(1 << 32) + 1, kv_heads=1),
        "more than 32 bits",
    ),
    "no heads": (lambda: run("Rotary", normal(1, 2, 12), normal(2, 2), normal(2, 2), outputs=HEADS), "rotary positions do not fit"),
    "heads of more than 32 bits": (
        lambda: run("Rotary", normal(1, 0, 6 << 31), normal(0, 1 << 31), normal(0, 1 << 31), outputs=HEADS, heads=1, kv_heads=1),
        "rotary positions do not fit",
    ),
    "an odd gate": (lambda: run("SiluMul", normal(2, 7)), "gated activation's input is odd"),
    "no inverse": (
        lambda: run(
            "LinearQuantize", low(normal(2, 4)), low(normal(3, 4)), normal(3), normal(0), outputs=(FLOAT8,), transposed=1
        ),
        "one number to round by",
    ),
    "a product over nothing": (lambda: run("Linear", normal(2, 0), normal(0, 3), normal(3)), "do not fit together"),
    "a norm of another width": (
        lambda: run(
            "SkipLayerNormQuantize", normal(2, 4), normal(2, 4), normal(5), normal(4), outputs=(TensorProto.FLOAT, FLOAT8)
        ),
        "norm's inputs do not fit together",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_errors_of_onnx_runtime(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(Exception, match=message):  # its exceptions share no base class of their own
        call()
