"""What the operators behind kernels for compute capability 9.0 make of inputs, attributes and manifests that they cannot use.

On the CPU provider, which checks what the GPU's side checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hardware import require_native
from native_nodes import normal, outputs_of, run
from onnx import TensorProto, helper

from rmt_trt.bundle import GraphEntry
from rmt_trt.errors import FormatError
from rmt_trt.runtime import native

KINDS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
}
M, S, WORDS, D = 2, 3, 5, 8
FRAME = np.array([-1 - S, -2 - S, 4, -1, -2, -3], np.int64)


@pytest.fixture(autouse=True)
def _built() -> None:
    require_native()


def session_of(op: str, inputs: list[np.ndarray], outputs: list[str], **attributes: Any) -> list[Any]:
    """The outputs of one node whose inputs keep their types; an output without a name is not wanted."""
    names = [f"in{number}" for number in range(len(inputs))]
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs, domain=native.DOMAIN, **attributes)], "one",
        [helper.make_tensor_value_info(name, KINDS[value.dtype], None) for name, value in zip(names, inputs, strict=True)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name],
    )  # fmt: skip
    return outputs_of(graph, dict(zip(names, inputs, strict=True)))


def embedded(**changes: Any) -> list[Any]:
    given = {
        "memory": normal(1, M, D), "segment": np.array([[0, 1, 2]]), "frame": FRAME, "word": normal(WORDS, D, seed=1),
        "positions": normal(len(FRAME), D, seed=2), "gamma": normal(D, seed=3), "beta": normal(D, seed=4),
    }  # fmt: skip
    return session_of("Embed", [{**given, **changes}[name] for name in given], ["out", "rows"], epsilon=1e-5)


def test_tokens_and_frames_beyond_their_tables_take_the_last_or_the_first() -> None:
    """Rows of padding fill a batch up: nobody reads them, and nothing beyond a table is read."""
    extreme = np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max, -99, 99, -1, -4], np.int64)
    segment = np.array([[-1, 2**62, -(2**62)]])
    (plain, rows), (other, others) = embedded(), embedded(frame=extreme, segment=segment)
    assert np.isfinite(other).all()
    assert np.isfinite(others).all()
    assert plain.shape == other.shape
    memory, word, positions = normal(1, M, D), normal(WORDS, D, seed=1), normal(len(FRAME), D, seed=2)
    np.testing.assert_allclose(rows[0, :3], np.concatenate([memory[0], word[4:5]]) + positions[:3], rtol=1e-6)
    wanted = np.stack([memory[0, -1], word[-1], memory[0, -1], word[-1], word[0], memory[0, 0]]) + positions
    np.testing.assert_allclose(others[0], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"word": np.zeros((0, D), np.float32)}, {"memory": np.zeros((1, 0, D), np.float32)}, {"frame": FRAME[:0]},
     {"word": normal(WORDS, D + 8)}, {"segment": np.array([[0, 1, 2]] * 2)}, {"positions": normal(2, D)},
     {"memory": normal(M, D)}, {"gamma": normal(D + 1)}],
)  # fmt: skip
def test_first_rows_of_tables_that_do_not_fit_are_refused(changes: dict[str, np.ndarray]) -> None:
    with pytest.raises(Exception, match="memory, segment, frame and tables do not fit together"):
        embedded(**changes)


X = normal(2, 3, 8)


@pytest.mark.parametrize(
    ("skip", "attributes"),
    [(normal(2, 5, 8), {"at": 3}), (normal(2, 5, 8), {"at": -1}), (normal(2, 2, 8), {}), (normal(1, 3, 8), {}),
     (normal(2, 3, 16), {}), (X, {"first": 2, "last": 1}), (X, {"first": 0, "last": 4}), (normal(6, 8), {})],
)  # fmt: skip
def test_norms_of_rows_that_are_not_there_are_refused(skip: np.ndarray, attributes: dict[str, int]) -> None:
    with pytest.raises(Exception, match="norm's inputs and its rows do not fit together"):
        run("LinearSkipLayerNorm", X, normal(8, 8), normal(8), skip, normal(8), normal(8), **attributes)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (normal(7, 8), normal(8)),
        (normal(8, 16), normal(8)),
        (normal(8, 8), normal(1)),
        (normal(1, 8, 8), normal(8)),
        (normal(8, 8), normal(8, 1)),
    ],
)
def test_products_in_front_of_norms_that_do_not_fit_are_refused(weight: np.ndarray, bias: np.ndarray) -> None:
    with pytest.raises(Exception, match="product's input, weight and bias do not fit together"):
        run("LinearSkipLayerNorm", X, weight, bias, X, normal(8), normal(8))


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [({"at": 1.0}, "whole number has another type"), ({"last": "x"}, "whole number has another type"),
     ({"first": "x" * 99}, "whole number has another type"), ({"epsilon": 1}, "float32 has another type"),
     ({"epsilon": "x"}, "float32 has another type"), ({"epsilon": -1.0}, "an epsilon below 0"),
     ({"epsilon": float("nan")}, "an epsilon below 0"), ({"epsilon": float("inf")}, "no finite number"), ({"at": 2**40}, "more than 32 bits"),
     ({"activation": "relu"}, "other than 'none' and 'gelu'"), ({"activation": 1}, "other than 'none' and 'gelu'"),
     ({"activation": "gelu"}, "no activation"), ({"transposed": 1}, "no transposed weight"), ({"scale": 2.0}, "no scale")],
)  # fmt: skip
def test_attributes_that_make_no_sense_are_refused(attributes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        run("LinearSkipLayerNorm", X, normal(8, 8), normal(8), X, normal(8), normal(8), **attributes)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 3), (0, 3)])
def test_rows_are_carried_from_first_to_last(first: int, last: int) -> None:
    given = [X, normal(8, 8), normal(8), X, normal(8), normal(8)]
    out, carried = session_of("LinearSkipLayerNorm", given, ["out", "", "carried"], first=first, last=last)
    np.testing.assert_array_equal(carried, out[:, first:last])


@pytest.mark.parametrize("lengths", [[3, 0], [-7, 2**31 - 1]])
def test_attention_to_lengths_beyond_the_rows_ends_with_them(lengths: list[int]) -> None:
    x = normal(2, 4, 3 * 8)
    (found,) = session_of("PackedAttention", [x, np.array(lengths, np.int32)], ["out"], heads=2)
    clipped = np.clip(lengths, 0, 4).astype(np.int32)
    (wanted,) = session_of("PackedAttention", [x, clipped], ["out"], heads=2)
    np.testing.assert_array_equal(found, wanted)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "attributes", [{}, {"heads": 5}, {"heads": -1}, {"heads": 2, "rows": 5}, {"heads": 2, "rows": -1}]
)
def test_attention_with_heads_or_rows_that_do_not_fit_is_refused(attributes: dict[str, int]) -> None:
    with pytest.raises(Exception, match="attention's inputs, its heads and its rows do not fit together"):
        run("PackedAttention", normal(2, 4, 24), **attributes)


@pytest.mark.parametrize(("engine", "needs"), [("cuda", ["hopper"]), ("cpu", ["hopper", "native"])])
def test_a_need_for_hopper_comes_with_native_and_is_for_cuda(engine: str, needs: list[str]) -> None:
    with pytest.raises(FormatError, match="kernels for Hopper are rmt-trt's own operators for the engine 'cuda'"):
        GraphEntry("graphs/a.onnx", engine=engine, needs=tuple(needs))


def test_long_names_of_unknown_needs_leave_room_for_the_remedy() -> None:
    with pytest.raises(FormatError) as info:
        GraphEntry("graphs/a.onnx", needs=("x" * 10**6, *(f"y{number}" for number in range(10**4))))
    assert len(str(info.value)) < 600
    assert "and others" in str(info.value)
    assert "Update it" in str(info.value)
