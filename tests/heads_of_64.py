"""Small models with heads of 64, which attention's kernels for compute capability 9.0 take."""

from __future__ import annotations

from typing import Any

from models import make_model

from rmt_trt.model.step import RMTModel

WIDTH, HEADS = 128, 2
_BERT = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 192}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _BERT),
    "roberta": ("roberta", _BERT),
    "electra": ("bert", {**_BERT, "model_type": "electra", "embedding_size": WIDTH}),
    "distilbert": ("distilbert", {"dim": WIDTH, "n_heads": HEADS, "hidden_dim": 192}),
    "gpt2": ("gpt2", {"n_embd": WIDTH, "n_head": HEADS, "n_inner": 192}),
}
# As of `gpu.SCALE`: rounding errors of half precision stay below what a test can tell from a fault.
SCALE = 2.5


def wide(name: str, changes: dict[str, Any] | None = None, **options: Any) -> RMTModel:
    """A random model. changes: of its backbone. options: of `make_model`, in place of what stands here."""
    kind, backbone = BACKBONES[name]
    return make_model(kind, **{"scale": SCALE, "width": WIDTH, "backbone": {**backbone, **(changes or {})}, **options})
