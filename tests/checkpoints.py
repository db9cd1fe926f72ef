"""Published checkpoints in small: Hugging Face models with the state dicts that the trainers would have written,
and their recurrence done directly with the source model, segment by segment, as published."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

M, VOCAB, LABELS, INPUT_SIZE, SEGMENT = 3, 60, 5, 24, 10

_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
}
_ROTARY = {**_ENCODER, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_ENCODER, "pad_token_id": 0},
    "roberta": {**_ENCODER, "pad_token_id": 1},
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "gpt_neox": {**_ENCODER, "rotary_pct": 0.25, "tie_word_embeddings": False},
    "llama": {
        **_ROTARY,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2": {**_ROTARY, "use_sliding_window": False, "rope_theta": 1000000.0, "tie_word_embeddings": True},
    # Relatives of the above, which are read and run by the same code.
    "xlm-roberta": {**_ENCODER, "pad_token_id": 1},
    "camembert": {**_ENCODER, "pad_token_id": 1},
    "electra": {**_ENCODER, "embedding_size": 32, "pad_token_id": 0},
    "mistral": {**_ROTARY, "sliding_window": None, "rope_theta": 10000.0, "tie_word_embeddings": False},
    "qwen3": {**_ROTARY, "head_dim": 8, "use_sliding_window": False, "tie_word_embeddings": True},
}
ENCODERS, DECODERS = ("bert", "roberta", "distilbert"), ("gpt2", "gpt_neox", "llama", "qwen2")
MORE_ENCODERS, MORE_DECODERS = ("xlm-roberta", "camembert", "electra"), ("mistral", "qwen3")
_BERT, _ROBERTA = {"cls_token": 51, "sep_token": 52}, {"cls_token": 0, "sep_token": 2, "eos_token": 2, "bos_token": 0}
SPECIAL = dict.fromkeys(("bert", "distilbert", "electra"), _BERT) | dict.fromkeys(
    ("roberta", "xlm-roberta", "camembert"), _ROBERTA
)


@dataclass
class Source:
    """A source model and what the published wrapper holds beside it. Form E's backbone has VOCAB + M rows."""

    kind: str
    backbone: Any
    memory: torch.Tensor
    state: dict[str, torch.Tensor]

    @property
    def encoder(self) -> bool:
        return self.kind in (*ENCODERS, *MORE_ENCODERS)

    @property
    def config(self) -> dict[str, Any]:
        return {**CONFIGS[self.kind], "model_type": self.kind}


def source(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Source:
    """A random model of a kind; weights are scaled so that what the memory holds changes the answer."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    encoder = kind in (*ENCODERS, *MORE_ENCODERS)
    if encoder:
        config.num_labels, config.vocab_size = LABELS, VOCAB + M
        backbone = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    else:
        backbone = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in backbone.parameters():
            scale = 0.1 if tensor.ndim == 1 else 0.4 if encoder else 0.25  # beyond, decoders turn chaotic
            tensor.copy_(torch.randn_like(tensor) * scale + (tensor.ndim == 1))
    backbone = backbone.to(dtype)
    state = {key: tensor.detach().clone() for key, tensor in backbone.state_dict().items()}
    if not encoder:
        memory = torch.randn(M, 32, dtype=dtype)
        if kind == "gpt_neox":  # the head's name before transformers 5, under which checkpoints were published
            state["embed_out.weight"] = state.pop("lm_head.weight")
        published = {f"memory_cell.model.{key}": tensor for key, tensor in state.items()}
        return Source(kind, backbone.float(), memory.float(), {"memory_cell.memory": memory, **published})
    published = {name: torch.tensor([token]) for name, token in SPECIAL[kind].items()}
    published["mem_token_ids"] = torch.arange(VOCAB, VOCAB + M)
    published |= {f"model.{key}": tensor for key, tensor in state.items()}
    words = next(tensor for key, tensor in state.items() if key.endswith("word_embeddings.weight"))
    return Source(kind, backbone.float(), words[VOCAB:].float(), {**published, "model.embeddings.weight": words})


@torch.no_grad()
def published_run(made: Source, segments: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Memory (M, d) and logits after every segment, as the published wrappers compute them."""
    made.backbone.set_attn_implementation("eager")
    step = _encoder_segment if made.encoder else _decoder_segment
    memory, results = made.memory, []
    for text in segments:
        memory, logits = step(made, memory, text)
        results.append((memory, logits))
    return results


def _encoder_segment(made: Source, memory: torch.Tensor, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    cls, sep = ([made.state[name].item()] if name in made.state else [] for name in ("cls_token", "sep_token"))
    pad = CONFIGS[made.kind]["pad_token_id"]
    ids = [*cls, *range(VOCAB, VOCAB + M), *sep, *text, *sep]
    ids = torch.tensor([ids + [pad] * (INPUT_SIZE - len(ids))])
    embeddings = made.backbone.get_input_embeddings()(ids)
    place = slice(len(cls), len(cls) + M)
    embeddings[:, place] = memory
    mask = torch.ones_like(ids)
    mask[ids == pad] = 0
    extra = {} if made.kind == "distilbert" else {"token_type_ids": torch.zeros_like(ids)}
    out = made.backbone(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True, **extra)
    return out.hidden_states[-1][0, place], out.logits[0]


def _decoder_segment(made: Source, memory: torch.Tensor, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = made.backbone.get_input_embeddings()(torch.tensor([text]))
    both = torch.cat([memory[None], embeddings, memory[None]], dim=1)
    out = made.backbone(inputs_embeds=both, output_hidden_states=True)
    return out.hidden_states[-1][0, -M:], out.logits[0, M:-M]


def write(folder: Path, state: dict[str, torch.Tensor], container: str) -> Path:
    """The state dict in a container: ".pth" (under model_state_dict), ".bin", ".safetensors", "sharded",
    "sharded-bin"; returns what `load_model` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    if container == ".pth":
        torch.save({"model_state_dict": state, "iteration": 7}, folder / "model_best.pth")
        return folder / "model_best.pth"
    if container == ".bin":
        torch.save(state, folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
    # safetensors takes each tensor once: the alias of the word embedding is left out, as the trainers do.
    plain = {key: tensor.contiguous().clone() for key, tensor in state.items() if key != "model.embeddings.weight"}
    if container == ".safetensors":
        save_file(plain, folder / "model.safetensors")
        return folder / "model.safetensors"
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    if container == "sharded-bin":
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    places = {key: names[i % 2] for i, key in enumerate(plain)}
    for name in names:
        part = {key: tensor for key, tensor in plain.items() if places[key] == name}
        save_file(part, folder / name) if name.endswith(".safetensors") else torch.save(part, folder / name)
    index = folder / ("pytorch_model.bin.index.json" if container == "sharded-bin" else "model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def write_config(folder: Path, made: Source, **more: object) -> Path:
    """The backbone's config.json in a folder of its own; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**made.config, **more}))
    return folder
