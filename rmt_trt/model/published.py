"""Checkpoints of the published trainers, recognised by their keys alone.

Form E (`mem_token_ids`, `model.*`) and form D (`memory_cell.memory`, `memory_cell.model.*`) of
booydar/recurrent-memory-transformer, arXiv 2207.06881 and 2304.11062. What such a file does not say (the backbone's
config, the size of a segment, ...) comes from options, then from the config.json that lies with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rmt_trt.errors import FormatError
from rmt_trt.model.backbone import hf_config
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.files import names_of
from rmt_trt.model.lora import has_lora, merge_lora
from rmt_trt.model.settings import Settings

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SPECIAL_TOKENS = ("cls_token", "sep_token", "eos_token", "bos_token")
WORD_EMBEDDING = ".embeddings.word_embeddings.weight"
DECODER_EMBEDDINGS = ("transformer.wte.weight", "gpt_neox.embed_in.weight", "model.embed_tokens.weight")
# Constants that older transformers kept in the state dict; the models compute them now.
OLD_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|(attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq)$"
)
CLASSIFIERS = ("classifier.out_proj.weight", "classifier.weight")


@dataclass(frozen=True)
class Parts:
    """A published checkpoint taken apart. `backbone` has Hugging Face's keys, `special` the ids of form E."""

    form: str
    memory: torch.Tensor
    backbone: dict[str, torch.Tensor]
    special: dict[str, int]


def take_apart(tensors: Mapping[str, torch.Tensor]) -> Parts:
    """Recognises the form and sorts the tensors. Errors: FormatError, for a kind that is not supported, by name."""
    _refuse_other_kinds(tensors)
    if "mem_token_ids" in tensors:
        return _encoder_parts(tensors)
    if "memory_cell.memory" in tensors:
        return _decoder_parts(tensors)
    if any(key.endswith((WORD_EMBEDDING, *DECODER_EMBEDDINGS)) for key in tensors):
        raise FormatError(
            "a backbone without memory; expected an RMT checkpoint, with 'mem_token_ids' (form E) or "
            "'memory_cell.memory' (form D) in it"
        )
    raise FormatError(
        f"no known RMT checkpoint: its keys are {names_of(tensors)}. Expected 'mem_token_ids' and "
        f"'model.*' (form E), 'memory_cell.memory' and 'memory_cell.model.*' (form D), or a model.pt of rmt-trt"
    )


def assemble(parts: Parts, settings: Settings) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Config and weights (`memory`, `backbone.*`) of a recognised checkpoint. `settings` is complete for its form.

    Errors: FormatError when the tensors contradict each other or the settings, ContractError for settings out of
    bounds.
    """
    backbone = {key: tensor for key, tensor in parts.backbone.items() if not OLD_BUFFERS.search(key)}
    if has_lora(backbone):
        backbone = merge_lora(backbone, settings.lora_alpha or 0.0)
    odd = next((f"'{key}' is {t.dtype}" for key, t in backbone.items() if t.dtype not in FLOATS), None)
    if odd:
        raise FormatError(f"{odd}; expected floating-point weights. Quantized checkpoints are not supported")
    if parts.memory.ndim != 2 or parts.memory.dtype not in FLOATS:
        raise FormatError(f"the memory is {parts.memory.dtype} {tuple(parts.memory.shape)}; expected floats (M, d)")
    if settings.num_mem_tokens not in (None, len(parts.memory)):
        raise FormatError(
            f"the trainer's config.json says num_mem_tokens {settings.num_mem_tokens}; the file holds "
            f"{len(parts.memory)} memory vectors. Is it another run's config.json?"
        )
    make = _encoder_config if parts.form == "encoder" else _decoder_config
    config = make(parts, backbone, settings)
    return config, {"memory": parts.memory, **{f"backbone.{key}": tensor for key, tensor in backbone.items()}}


def _refuse_other_kinds(tensors: Mapping[str, torch.Tensor]) -> None:
    if any(re.search(r"(^|\.)W_m[qkvb](\.|$)", key) for key in tensors):
        raise FormatError(
            "an associative memory (ARMT, keys W_mq, W_mk, W_mv, W_mb), which is not supported; RMT checkpoints of "
            "forms E and D are"
        )
    if "memory_tokens" in tensors and "read_memory_emb" in tensors:
        raise FormatError(
            "a model of the package recurrent-memory-transformer-pytorch (keys memory_tokens, read_memory_emb), whose "
            "layers are its own; only Hugging Face backbones are supported"
        )
    stacks = [
        any(re.search(rf"(^|\.){side}\.(block|layers)\.", key) for key in tensors) for side in ("encoder", "decoder")
    ]
    if all(stacks):
        raise FormatError(
            "an encoder-decoder backbone (T5, BART, ...), which is not supported; encoder classifiers and causal "
            "language models are"
        )
    if "memory" in tensors and any(key.startswith("model.") for key in tensors):
        raise FormatError(
            "the older form RMTDecoderLMHeadMultiSeg ('memory' and 'model.*' at the top), which is not supported: it "
            "puts special tokens into its segments. Train with MemoryCell and RecurrentWrapper ('memory_cell.*')"
        )


def _encoder_parts(tensors: Mapping[str, torch.Tensor]) -> Parts:
    rest = {key: t for key, t in tensors.items() if not key.startswith("model.")}
    backbone = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    special = {}
    for name in SPECIAL_TOKENS:
        if name in rest:
            special[name] = _ids(name, rest.pop(name), 1)[0]
    memory_ids = _ids("mem_token_ids", rest.pop("mem_token_ids"))
    _refuse_unknown(rest)
    alias = backbone.pop("embeddings.weight", None)
    if alias is not None and not any(key.endswith(WORD_EMBEDDING) for key in backbone):
        bases = {key.split(".")[0] for key in backbone if ".embeddings." in key}
        backbone.update({f"{base}{WORD_EMBEDDING}": alias for base in bases})
    keys = [key for key in backbone if key.endswith(WORD_EMBEDDING)]
    if len(keys) != 1 or backbone[keys[0]].ndim != 2:
        raise FormatError(f"form E wants one word embedding, 'model.*{WORD_EMBEDDING}'; found {keys or 'none'}")
    table = backbone[keys[0]]
    if alias is not None and (alias.shape != table.shape or not torch.equal(alias, table)):
        raise FormatError("'model.embeddings.weight' differs from the word embedding that it is an alias of")
    rows = len(table)
    if memory_ids != list(range(rows - len(memory_ids), rows)) or len(memory_ids) == rows:
        raise FormatError(
            f"mem_token_ids are {memory_ids[:3]}... ({len(memory_ids)} ids); expected the last rows of the word "
            f"embedding, which has {rows}"
        )
    vocab = rows - len(memory_ids)
    backbone[keys[0]] = table[:vocab]
    outside = {name: token for name, token in special.items() if token >= vocab}
    if outside:
        raise FormatError(f"special tokens {outside} lie outside the text vocabulary of {vocab}")
    return Parts("encoder", table[vocab:], backbone, special)


def _decoder_parts(tensors: Mapping[str, torch.Tensor]) -> Parts:
    prefix = "memory_cell.model."
    backbone = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    _refuse_unknown({k: t for k, t in tensors.items() if not k.startswith(prefix) and k != "memory_cell.memory"})
    return Parts("decoder", tensors["memory_cell.memory"], backbone, {})


def _encoder_config(parts: Parts, backbone: dict[str, torch.Tensor], settings: Settings) -> ModelConfig:
    """Layout of form E. The published code asks the tokenizer how many special tokens it would add; here that is
    read off the buffers: 2 with cls and sep, none without either. One more sep stands behind the memory."""
    special = parts.special
    cls, sep = special.get("cls_token"), special.get("sep_token")
    if (cls is None) != (sep is None) or (cls is None and special):
        raise FormatError(
            f"special tokens {special}; expected cls_token and sep_token together, or no special token at all"
        )
    head = next((key for key in CLASSIFIERS if key in backbone), None)
    if head is None or backbone[head].ndim != 2:
        raise FormatError(f"no classification head: expected one of {', '.join('model.' + key for key in CLASSIFIERS)}")
    vocab, width = next(t for key, t in backbone.items() if key.endswith(WORD_EMBEDDING)).shape
    classes = len(backbone[head])
    plain = {key: v for key, v in settings.backbone.items() if key not in ("id2label", "label2id")}
    plain |= {"vocab_size": vocab, "num_labels": classes}
    pad = hf_config(parts.form, plain).pad_token_id
    marked = [token for token in (pad, *special.values()) if token is not None]
    around = () if sep is None else (sep,)
    length = settings.text_tokens(len(parts.memory) + (0 if cls is None else 3))
    return ModelConfig(
        form="encoder",
        backbone=plain,
        num_memory=len(parts.memory),
        segment_length=length,
        vocab_size=vocab,
        width=width,
        num_logits=classes,
        alignment=settings.alignment or "right",
        prefix_ids=() if cls is None else (cls,),
        middle_ids=around,
        suffix_ids=around,
        pad_id=pad if pad is not None and pad < vocab else 0,
        # An id that is listed twice cancels out in the published filter and stays in the text (RoBERTa).
        dropped_ids=tuple(token for token in marked if marked.count(token) == 1),
        id2label=settings.labels(classes),
        max_segments=settings.max_segments,
    )


def _decoder_config(parts: Parts, backbone: dict[str, torch.Tensor], settings: Settings) -> ModelConfig:
    if "embed_out.weight" in backbone:  # GPT-NeoX's head before transformers 5
        backbone["lm_head.weight"] = backbone.pop("embed_out.weight")
    table = next((backbone[key] for key in DECODER_EMBEDDINGS if key in backbone), None)
    if table is None or table.ndim != 2:
        raise FormatError(f"no word embedding: expected one of {', '.join(DECODER_EMBEDDINGS)} under memory_cell.model")
    head = backbone.get("lm_head.weight")
    tied = head is None or (head.shape == table.shape and torch.equal(head, table))
    vocab, width = table.shape
    return ModelConfig(
        form="decoder",
        backbone={**settings.backbone, "vocab_size": vocab, "tie_word_embeddings": tied},
        num_memory=len(parts.memory),
        segment_length=settings.segment_size or 0,
        vocab_size=vocab,
        width=width,
        num_logits=vocab if head is None else len(head),
        alignment=settings.alignment or "left",
        max_segments=settings.max_segments,
    )


def _ids(name: str, tensor: torch.Tensor, count: int | None = None) -> list[int]:
    if (
        tensor.dtype != torch.int64
        or tensor.ndim != 1
        or not 0 < len(tensor) <= 1 << 20
        or count not in (None, len(tensor))
    ):
        raise FormatError(f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}; expected int64 ({count or 'M'},)")
    return [int(value) for value in tensor]


def _refuse_unknown(tensors: Mapping[str, torch.Tensor]) -> None:
    if tensors:
        raise FormatError(
            f"unknown keys beside the backbone: {names_of(tensors)}. A variant of the published code that "
            f"is not supported"
        )
