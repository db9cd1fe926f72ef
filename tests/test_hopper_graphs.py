"""Graphs with kernels for compute capability 9.0: their twins on the CPU provider, and which backbones get them.

Which GPU runs them is in test_hopper_choice.py, what the kernels do in test_hopper_gpu.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnxruntime
import pytest
from hardware import require_native
from heads_of_64 import BACKBONES, wide
from models import CLASSES, VOCAB, M, S

from rmt_trt.export.fused import CannotFuse, FusedGraphs, Native, fused_graphs
from rmt_trt.export.graph_check import check_graphs
from rmt_trt.export.native_check import with_tanh_gelu
from rmt_trt.export.verify import model_reference, random_document, relative_error
from rmt_trt.model.recurrence import recurrence
from rmt_trt.model.step import RMTModel, model_spec
from rmt_trt.runtime import native

HEADS = {"encoder": ("none", "all"), "decoder": ("none", "last", "all", "loglik")}


@pytest.fixture(autouse=True)
def _built() -> None:
    require_native()


def written(model: RMTModel, folder: Path, **options: Any) -> FusedGraphs:
    return fused_graphs(model, model_spec(model), "fp32", folder, **{"grouped": True, "beside": True, **options})


def nodes_of(path: Path, op: str) -> list[Any]:
    return [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == op]


def attribute(node: Any, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(part) for part in node.attribute if part.name == name)


@pytest.mark.parametrize("nodes", [False, True], ids=["operators", "nodes"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_role_and_head_follows_the_recurrence(name: str, nodes: bool, tmp_path: Path) -> None:
    """Two documents together, one of which is padding alone after a while, the other with a short segment at its end."""
    model = wide(name)
    graphs = written(model, tmp_path, by_nodes=nodes)
    uses = {(entry.role, entry.head, entry.min_batch) for entry in graphs.hopper}
    assert uses == {(role, head, 1) for role in ("full", "step") for head in HEADS[model.config.form]}
    assert {entry.needs for entry in graphs.hopper} == {() if nodes else ("hopper", "native")}
    parts = [node for entry in graphs.hopper for node in onnx.load(tmp_path / entry.file).graph.node]
    ours = {node.op_type for node in parts if node.domain == native.DOMAIN}
    assert ours == (set() if nodes else {"Embed", "Linear", "LinearSkipLayerNorm", "PackedAttention"})
    assert graphs.hopper_fused["attention"] == 2
    initial = [model.memory.detach().numpy()]
    check = check_graphs(
        graphs.hopper, tmp_path, model_spec(model), initial, model_reference(with_tanh_gelu(model)), 20, 1e-4
    )
    assert 0 < check.largest <= 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [("bert", {"prefix_ids": ()}), ("bert", {"prefix_ids": (2, 3), "middle_ids": (), "num_memory": 1}),
     ("gpt2", {"num_memory": 1}), ("bert", {"changes": {"num_hidden_layers": 1}}), ("gpt2", {"changes": {"n_layer": 1}})],
)  # fmt: skip
def test_layouts_and_depths_of_other_kinds_follow_it_too(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = wide(name, **changes)
    initial = [model.memory.detach().numpy()]
    check = check_graphs(
        written(model, tmp_path).hopper,
        tmp_path,
        model_spec(model),
        initial,
        model_reference(with_tanh_gelu(model)),
        5,
        1e-4,
    )
    assert 0 < check.largest <= 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_rows_of_every_length_in_one_batch_are_each_what_they_are_alone(name: str, tmp_path: Path) -> None:
    model = with_tanh_gelu(wide(name))
    spec = model_spec(model)
    segment = np.stack([random_document(spec, S, seed) for seed in range(S + 1)])
    for count, row in enumerate(segment):
        row[count:] = -1
    given = {"memory": np.repeat(model.memory.detach().numpy()[None], S + 1, 0), "segment": segment}
    wanted = [next(recurrence(model, row[:count].tolist())) for count, row in enumerate(segment) if count]
    for entry in written(model, tmp_path).hopper:
        if entry.role != "step":
            continue
        options = onnxruntime.SessionOptions()
        native.register(options)
        session = onnxruntime.InferenceSession(tmp_path / entry.file, options, providers=["CPUExecutionProvider"])
        memory, *answers = session.run(None, given)
        np.testing.assert_array_equal(memory[0], given["memory"][0])
        for count, (states, logits) in enumerate(wanted, 1):
            assert relative_error(memory[count], states.numpy()) <= 1e-5
            if answers:
                found = answers[0][count]
                whole = found.shape == (S, VOCAB)
                right = logits.numpy() if found.shape in ((CLASSES,), (S, VOCAB)) else logits[-1].numpy()
                assert relative_error(found[:count] if whole else found, right) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_in_the_last_layer_attention_is_asked_for_the_rows_that_are_read(name: str, tmp_path: Path) -> None:
    model = wide(name)
    encoder = model.config.form == "encoder"
    for entry in written(model, tmp_path).hopper:
        first, last = nodes_of(tmp_path / entry.file, "PackedAttention")
        read_all = not encoder and (entry.role == "step" or entry.head in ("all", "loglik"))
        assert [attribute(node, "rows") for node in (first, last)] == [0, 0 if read_all else M + 1]
        assert {attribute(node, "causal") for node in (first, last)} == {int(not encoder)}
        assert {len(node.input) for node in (first, last)} == {2 if encoder and entry.role == "step" else 1}


@pytest.mark.parametrize(
    ("name", "kind", "node"),
    [("bert", {"hidden_act": "relu"}, "Relu"), ("gpt2", {"activation_function": "relu"}, "Relu"),
     ("gpt2", {"activation_function": "silu"}, "QuickGelu"), ("bert", {"hidden_act": "gelu_new"}, None)],
)  # fmt: skip
def test_an_activation_that_no_epilogue_has_is_a_node(
    name: str, kind: dict[str, Any], node: str | None, tmp_path: Path
) -> None:
    model = wide(name, kind)
    graphs, initial = written(model, tmp_path), [model.memory.detach().numpy()]
    products = nodes_of(tmp_path / graphs.hopper[0].file, "Linear")
    asked = [attribute(product, "activation").decode() for product in products]
    assert asked == (["none"] * 4 if node else ["none", "gelu"] * 2)
    assert node is None or len(nodes_of(tmp_path / graphs.hopper[0].file, node)) == 2
    check = check_graphs(graphs.hopper, tmp_path, model_spec(model), initial, model_reference(model), 5, 1e-4)
    assert 0 < check.largest <= 1e-5


def test_where_the_tanh_form_is_not_allowed_exact_gelu_is_a_node(tmp_path: Path) -> None:
    model = wide("bert")
    made = written(model, tmp_path, beside=False, native=Native(hopper=True, tanh=False)).entries
    initial = [model.memory.detach().numpy()]
    check = check_graphs(made, tmp_path, model_spec(model), initial, model_reference(model), 5, 1e-4)
    assert (check.largest <= 1e-5, len(nodes_of(tmp_path / made[0].file, "Gelu"))) == (True, 2)


OTHERS = {
    "heads of 32": lambda: wide("bert", {"num_attention_heads": 4}),
    "an inner width of 200": lambda: wide("gpt2", {"n_inner": 200}),
    "rotary positions": lambda: models.make_model("llama", backbone={"head_dim": 64}),
    "parallel layers": lambda: models.make_model("gpt_neox", width=128, backbone={"hidden_size": 128, "num_attention_heads": 2}),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_backbones_that_the_kernels_do_not_take_have_none(what: str, tmp_path: Path) -> None:
    model = OTHERS[what]()
    graphs = written(model, tmp_path)
    assert (graphs.hopper, graphs.hopper_fused, len(graphs.entries) > 0) == ((), {}, True)
    with pytest.raises(CannotFuse, match=r"kernels for compute capability 9\.0 take layers of heads of 64"):
        written(model, tmp_path, beside=False, native=Native(hopper=True))


def test_there_are_none_in_fp8(tmp_path: Path) -> None:
    low = Native(hopper=True, thresholds={"layer0.qkv": 8.0})
    with pytest.raises(CannotFuse, match="multiply in half precision, and not in FP8"):
        fused_graphs(wide("bert"), model_spec(wide("bert")), "fp8", tmp_path, native=low)


@pytest.mark.parametrize("name", BACKBONES)
def test_their_weights_are_in_the_file_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = wide(name), []
    for fits in (lambda backbone: False, lambda backbone: True):
        monkeypatch.setattr("rmt_trt.export.fused.fits", fits)
        graphs = written(model, tmp_path)
        sizes.append(((tmp_path / "cuda-fp32.data").stat().st_size, len(graphs.hopper) > 0))
    assert sizes == [(sizes[0][0], False), (sizes[0][0], True)]
