"""A model out of its bundle: the same weights bit by bit, or a message that says what is needed instead."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import models
import numpy as np
import onnx
import pytest
import torch
from models import made, split_bundle
from spoil import alter, put
from steps import ONE_STATE, Plain

from rmt_trt import ContractError, FormatError
from rmt_trt.bundle import INITIAL, STEP, Bundle
from rmt_trt.export import ExportOptions, export_model, export_step_bundle, model_from_bundle
from rmt_trt.export.recover import WEIGHTS_KEY, places_of
from rmt_trt.model.checkpoint import LoadOptions, load_model
from rmt_trt.model.step import RMTModel


def assert_same(found: RMTModel, wanted: RMTModel) -> None:
    """The same names and the same bits: a comparison of values would let -0.0 pass for 0.0."""
    assert found.config == wanted.config
    before, after = wanted.state_dict(), found.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.int32), tensor.view(torch.int32)), name
    assert not found.training


@pytest.mark.parametrize("name", models.BACKBONES)
def test_every_backbone_comes_back_bit_by_bit(name: str) -> None:
    assert_same(model_from_bundle(Bundle(made(name).bundle)), made(name).model)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_tied_weights_come_back_tied(name: str) -> None:
    backbone: Any = model_from_bundle(Bundle(made(name).bundle)).backbone
    assert backbone.get_input_embeddings().weight is backbone.get_output_embeddings().weight


@pytest.mark.parametrize("kind", checkpoints.CONFIGS)
def test_a_published_checkpoint_with_biases_comes_back(kind: str, tmp_path: Path) -> None:
    source = checkpoints.source(kind)
    file = checkpoints.write(tmp_path / "checkpoint", source.state, ".bin")
    size = {"input_size": checkpoints.INPUT_SIZE} if source.encoder else {"segment_size": checkpoints.SEGMENT}
    model = load_model(file, LoadOptions(config=checkpoints.write_config(tmp_path / "config", source), **size))
    export_model(model, tmp_path / "model.rmt", ExportOptions(segments=2))
    assert_same(model_from_bundle(Bundle(tmp_path / "model.rmt")), model.model)


def test_merged_lora_comes_back(tmp_path: Path) -> None:
    source = checkpoints.source("llama")
    adapted = "memory_cell.model.base_model.model."
    state = {name.replace("memory_cell.model.", adapted): value for name, value in source.state.items()}
    stem = f"{adapted}model.layers.0.self_attn.q_proj"
    state[f"{stem}.lora_A.default.weight"], state[f"{stem}.lora_B.default.weight"] = (
        torch.randn(2, 32),
        torch.randn(32, 2),
    )
    file = checkpoints.write(tmp_path / "checkpoint", state, ".bin")
    config = checkpoints.write_config(tmp_path / "config", source)
    model = load_model(file, LoadOptions(config=config, segment_size=checkpoints.SEGMENT, lora_alpha=4.0))
    export_model(model, tmp_path / "model.rmt", ExportOptions(segments=2))
    assert_same(model_from_bundle(Bundle(tmp_path / "model.rmt")), model.model)


class Tensor:
    """What the exporter keeps of an initializer, as far as it is read."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value

    def numpy(self) -> np.ndarray:
        return self.value


def test_places_tell_equal_values_of_other_bits_apart_and_leave_out_what_is_lost() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    state = {
        "memory": torch.ones(2), "own": matrix, "turned": matrix.T.contiguous(), "zero": torch.zeros(4),
        "minus": -torch.zeros(4), "gone": torch.arange(4.0), "square": torch.eye(3),
    }  # fmt: skip
    graph = {"own": Tensor(matrix.numpy()), "other": Tensor(np.zeros(5, np.float32)), "ids": Tensor(np.arange(3))}
    places = json.loads(places_of(state, graph))
    assert places == {
        "own": {"tensor": "own"},
        "turned": {"tensor": "own", "transposed": True},
        "zero": {"value": 0.0, "length": 4},
        "minus": {"value": -0.0, "length": 4},
    }
    assert (str(places["zero"]["value"]), str(places["minus"]["value"])) == ("0.0", "-0.0")


def test_a_path_will_do_for_a_bundle() -> None:
    assert_same(model_from_bundle(str(made("gpt2").bundle)), made("gpt2").model)
    with pytest.raises(ContractError, match="the path is None; expected the path of a file or folder"):
        model_from_bundle(None)  # type: ignore[arg-type]


def test_a_step_of_ones_own_has_no_model_to_give(tmp_path: Path) -> None:
    export_step_bundle(Plain(), ONE_STATE, tmp_path / "plain.rmt", options=ExportOptions(segments=2))
    with pytest.raises(FormatError, match=r"plain\.rmt holds a step of the user's own, whose PyTorch module"):
        model_from_bundle(Bundle(tmp_path / "plain.rmt"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """GPT-2's bundle, to be spoiled."""
    return Path(shutil.copytree(made("gpt2").bundle, tmp_path / "model.rmt"))


def change_graph(bundle: Path, change: Callable[[Any, dict[str, Any]], None]) -> None:
    """Alters step.onnx, its hash put right: change(model, places) may alter either."""
    model = onnx.load(str(bundle / STEP), load_external_data=False)
    entry = next(entry for entry in model.metadata_props if entry.key == WEIGHTS_KEY)
    places = json.loads(entry.value)
    change(model, places)
    if entry.value:
        entry.value = json.dumps(places)
    put(bundle, STEP, model.SerializeToString())


MATRIX = "backbone.transformer.h.0.mlp.c_fc.weight"
BIAS = "backbone.transformer.h.0.mlp.c_fc.bias"


def scale(model: Any, places: dict[str, Any]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == places[MATRIX]["tensor"])
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * 1.01).astype(np.float32).tobytes()


def shorten(model: Any, places: dict[str, Any]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == places[MATRIX]["tensor"])
    tensor.raw_data = tensor.raw_data[:-4]


def retype(model: Any, places: dict[str, Any]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == places[MATRIX]["tensor"])
    tensor.data_type = onnx.TensorProto.INT32


def reshape(*dims: int) -> Callable[[Any, dict[str, Any]], None]:
    def change(model: Any, places: dict[str, Any]) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == places[MATRIX]["tensor"])
        tensor.dims[:] = dims
        if 0 in dims:
            tensor.ClearField("raw_data")

    return change


def turn_a_cube(model: Any, places: dict[str, Any]) -> None:
    reshape(1, 32, 128)(model, places)
    places[MATRIX]["transposed"] = True


def forget(model: Any, places: dict[str, Any]) -> None:
    del model.metadata_props[[entry.key for entry in model.metadata_props].index(WEIGHTS_KEY)]


NEEDED = "Give the checkpoint that it was exported from (--model model.pt)"
SPOILED: dict[str, tuple[Callable[[Any, dict[str, Any]], object], str]] = {
    "weights": (scale, f"gives other weights than its fingerprint was taken of. {NEEDED}"),
    "an older graph": (forget, f"does not say where its weights stand: an older rmt-trt wrote it. {NEEDED}"),
    "bytes": (shorten, f"has not the 16384 bytes of its shape. {NEEDED}"),
    "type": (retype, "is no float32 tensor of shape"),
    "no values in 2**62 rows": (reshape(0, 2**62), "is no float32 tensor of shape (0, 4611686018427387904)"),
    "more values than memory": (reshape(2**32, 2**32), "has not the 73786976294838206464 bytes of its shape"),
    "a shape below": (reshape(-32, -128), "is no float32 tensor of shape (-32, -128)"),
    "a cube transposed": (turn_a_cube, "transposed, which is no matrix: its shape is (1, 32, 128)"),
    "a tensor that is not there": (lambda m, p: p.update({MATRIX: {"tensor": "x"}}), f"stands in 'x', which it lacks. {NEEDED}"),
    "another tensor": (lambda m, p: p.update({MATRIX: p[BIAS]}), "does not hold the model that its manifest describes"),
    "a weight missing": (lambda m, p: p.pop(MATRIX), "1 missing: transformer.h.0.mlp.c_fc.weight"),
    "a weight too many": (lambda m, p: p.update({"backbone.evil": p[MATRIX]}), "1 unknown: evil"),
    "a place that is a list": (lambda m, p: p.update({MATRIX: [1]}), "does not say where tensors stand"),
    "a place with more": (lambda m, p: p.update({MATRIX: {"tensor": "x", "run": "sh"}}), "does not say where tensors stand"),
    "a length of text": (lambda m, p: p.update({BIAS: {"value": 0.0, "length": "9"}}), "does not say where tensors stand"),
    "a length below": (lambda m, p: p.update({BIAS: {"value": 0.0, "length": -1}}), "does not say where tensors stand"),
    "a length absurd": (lambda m, p: p.update({BIAS: {"value": 0.0, "length": 1 << 31}}), "claims 2147"),
    "one matrix for a thousand": (
        lambda m, p: p.update({f"backbone.transformer.h.{i}.mlp.c_fc.weight": p[MATRIX] for i in range(1000)}),
        "weights and holds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_graph_that_does_not_give_its_model_says_so(bundle: Path, name: str) -> None:
    change, message = SPOILED[name]
    change_graph(bundle, change)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=re.escape(message)) as info:
        model_from_bundle(Bundle(bundle))
    assert str(bundle) in str(info.value)


@pytest.mark.parametrize("text", ["", "hello", "[]", "[" * 100_000])
def test_places_that_are_no_json_object(bundle: Path, text: str) -> None:
    model = onnx.load(str(bundle / STEP))
    next(entry for entry in model.metadata_props if entry.key == WEIGHTS_KEY).value = text
    put(bundle, STEP, model.SerializeToString())
    with pytest.raises(FormatError, match=rf"'{WEIGHTS_KEY}' (is not valid JSON|does not say where tensors stand)"):
        model_from_bundle(Bundle(bundle))


def test_what_is_no_graph_though_its_hash_is_right(bundle: Path) -> None:
    put(bundle, STEP, b"hello there\n")
    with pytest.raises(FormatError, match=r"step\.onnx is no readable ONNX graph"):
        model_from_bundle(Bundle(bundle))


def test_a_manifest_that_describes_another_model(bundle: Path) -> None:
    alter(bundle, lambda m: m["model"].update(segment_length=19))
    with pytest.raises(FormatError, match=r"its step spec and its model config disagree"):
        model_from_bundle(Bundle(bundle))
    alter(bundle, lambda m: m["model"].update(segment_length=20, backbone={"model_type": "gpt2", "n_layer": 10**9}))
    with pytest.raises(FormatError, match=r"n_layer is 1000000000; expected a whole number from 1 to"):
        model_from_bundle(Bundle(bundle))


def test_another_initial_state_is_another_model(bundle: Path) -> None:
    data = bytearray((bundle / INITIAL).read_bytes())
    data[-1] ^= 1
    put(bundle, INITIAL, bytes(data))
    with pytest.raises(FormatError, match="gives other weights than its fingerprint was taken of"):
        model_from_bundle(Bundle(bundle))


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """GPT-2 with its weights in a file beside the graph, to be spoiled."""
    return Path(shutil.copytree(split_bundle(), tmp_path / "split.rmt"))


def test_weights_beside_the_graph_come_back(split: Path) -> None:
    assert_same(model_from_bundle(Bundle(split)), made("gpt2").model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("location", "../m.pt"),
        ("location", "/etc/passwd"),
        ("offset", "-4"),
        ("offset", str(1 << 40)),
        ("offset", "x"),
        ("length", "4"),
        ("length", str(1 << 60)),
    ],
)
def test_weights_are_read_from_the_bundles_own_files_alone(split: Path, key: str, value: str) -> None:
    def move(model: Any, places: dict[str, Any]) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == places[MATRIX]["tensor"])
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    change_graph(split, move)
    with pytest.raises(FormatError, match=r"does not stand where the graph says\. Copy the bundle again"):
        model_from_bundle(Bundle(split))
