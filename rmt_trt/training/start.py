"""The model of a training run, from its options: fresh or pretrained, form E or D, with adapters or without."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rmt_trt.errors import ContractError
from rmt_trt.files import read_bounded
from rmt_trt.model.backbone import build_backbone, hf_config, position_capacity
from rmt_trt.model.config import ModelConfig
from rmt_trt.model.pretrained import MAX_TOKENIZER_BYTES, Base, backbone_of, load_base, special_ids
from rmt_trt.model.step import DecoderStep, EncoderStep, RMTModel, build_model
from rmt_trt.training.adapters import add_lora
from rmt_trt.training.options import FRESH_SEGMENT, TrainOptions
from rmt_trt.training.tasks import open_task
from rmt_trt.training.tasks.task import Task

ROTARY_SEGMENT = 512  # text tokens in a segment of a pretrained backbone whose positions have no end
MAX_BATCH_TOKENS = 1 << 27  # of a step: 1 GiB, and they are made some steps ahead
# What is read of a pretrained backbone's config, by the names of its kinds; files may leave them to their defaults.
SIZES = ("vocab_size", "hidden_size", "n_embd", "dim", "max_position_embeddings", "n_positions", "pad_token_id")
DROPOUTS = ("dropout", "dropout_prob", "pdrop")


def open_options(options: TrainOptions) -> tuple[Task, Base | None]:
    """The task and the pretrained backbone that options name. Errors: ContractError, FormatError."""
    base = None if options.fresh else _complete(load_base(options.backbone), options.form)
    tokenizer = base.tokenizer if base else None
    if options.tokenizer:
        tokenizer = read_bounded(Path(options.tokenizer), MAX_TOKENIZER_BYTES, "a tokenizer.json").decode(
            "utf-8", "replace"
        )
    if options.text and tokenizer is None:
        raise ContractError(f"backbone {options.backbone!r} has no tokenizer.json; give one (--tokenizer)")
    text = Path(options.text) if options.text else None
    return open_task(options.task, text, tokenizer, options.part), base


def _complete(base: Base, form: str) -> Base:
    """The base with the sizes and dropouts that its config leaves to their defaults. Errors: ContractError, FormatError."""
    every = hf_config(form, base.config).to_dict()
    defaults = {name: value for name, value in every.items() if name in SIZES or name.endswith(DROPOUTS)}
    return replace(base, config={**defaults, **base.config})


def start_model(options: TrainOptions, task: Task, base: Base | None) -> RMTModel:
    """The model at step 0, on the CPU; what is not pretrained is drawn from the seed. Errors: ContractError, FormatError."""
    torch.manual_seed(options.seed)
    config = fresh_config(options, task) if base is None else base_config(options, task, base)
    if config.segment_length < task.min_length:
        raise ContractError(
            f"segments of {config.segment_length} tokens are shorter than the shortest document of this task, "
            f"{task.min_length} tokens; choose longer ones (--segment-length)"
        )
    if (tokens := options.batch * options.stages[-1] * config.segment_length) > MAX_BATCH_TOKENS:
        raise ContractError(
            f"a batch of {options.batch} documents of up to {options.stages[-1]} segments of {config.segment_length} tokens has "
            f"{tokens} tokens; at most {MAX_BATCH_TOKENS} are made at a time. Choose a smaller batch (--batch)"
        )
    if base is not None:
        _check_capacity(config)
        if task.vocab_size > config.vocab_size:
            raise ContractError(
                f"the tokenizer has {task.vocab_size} tokens; backbone {options.backbone!r} embeds {config.vocab_size}. Give "
                f"the tokenizer that it was trained with"
            )
        body, drawn = backbone_of(base, options.form, config.backbone)
        spread = body.get_input_embeddings().weight.detach().float().std()  # type: ignore[operator]
        memory = torch.randn(options.num_memory, config.width) * spread
        model = (EncoderStep if options.form == "encoder" else DecoderStep)(config, body, memory)
        if options.lora:
            add_lora(model, options.lora, options.lora_alpha, drawn)
        return model
    if options.num_memory:
        return build_model(config)
    step = EncoderStep if options.form == "encoder" else DecoderStep  # without memory: no spec allows such a step
    return step(config, build_backbone(options.form, config.backbone), torch.empty(0, config.width))


def fresh_config(options: TrainOptions, task: Task) -> ModelConfig:
    """A small BERT (form E) or GPT-2 (form D) for the vocabulary of a task."""
    base = Base({"vocab_size": task.vocab_size}, {}, task.tokenizer, "a fresh backbone", "")
    config = _config(options, task, base, options.segment_length or FRESH_SEGMENT, options.width)
    # BERT's 0.02 belongs to a width of 768; at 128 attention starts so flat that learning takes several times longer.
    spread = round(0.7 / math.sqrt(options.width), 4)
    common = {"vocab_size": task.vocab_size, "initializer_range": spread}
    if options.form == "decoder":
        sizes: dict[str, Any] = {
            "model_type": "gpt2",
            "n_embd": options.width,
            "n_layer": options.layers,
            "n_head": options.heads,
            "n_positions": config.positions,
            "resid_pdrop": options.dropout,
            "embd_pdrop": options.dropout,
            "attn_pdrop": options.dropout,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        return replace(config, backbone={**sizes, **common})
    sizes = {
        "model_type": "bert",
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": 4 * options.width,
        "max_position_embeddings": config.positions,
        "hidden_dropout_prob": options.dropout,
        "attention_probs_dropout_prob": options.dropout,
        "pad_token_id": config.pad_id,
        "num_labels": len(task.labels),
    }
    return replace(config, backbone={**sizes, **common})


def base_config(options: TrainOptions, task: Task, base: Base) -> ModelConfig:
    """The config of a pretrained backbone with memory; segments fill its positions unless options say otherwise."""
    width = int(base.config.get("hidden_size", base.config.get("n_embd", base.config.get("dim", 0))))
    config = _config(options, task, base, 1, width)
    capacity = position_capacity(base.config)
    room = ROTARY_SEGMENT if capacity is None else capacity - config.positions + 1
    length = options.segment_length or max(room, 1)
    return replace(config, segment_length=length, backbone={**base.config, **_changes(options, task, base)})


def _config(options: TrainOptions, task: Task, base: Base, segment_length: int, width: int) -> ModelConfig:
    common: dict[str, Any] = {
        "form": options.form,
        "backbone": {},
        "num_memory": options.num_memory,
        "segment_length": segment_length,
        "vocab_size": int(base.config["vocab_size"]),
        "width": width,
        "max_segments": options.stages[0],
    }
    if options.form == "decoder":
        return ModelConfig(num_logits=common["vocab_size"], alignment="left", **common)
    first, last, pad = special_ids(base.tokenizer or "{}", base.origin)
    if not 0 <= min(first, last, pad) <= max(first, last, pad) < common["vocab_size"]:
        raise ContractError(
            f"the tokenizer of {base.origin} gives its special tokens the ids {first}, {last} and {pad}; the model embeds ids "
            f"below {common['vocab_size']}. Give the tokenizer that it was trained with"
        )
    return ModelConfig(
        num_logits=len(task.labels),
        alignment="right",
        prefix_ids=(first,),
        middle_ids=(last,),
        suffix_ids=(last,),
        pad_id=pad,
        dropped_ids=(pad, first, last),
        id2label=task.labels,
        **common,
    )


def _changes(options: TrainOptions, task: Task, base: Base) -> dict[str, Any]:
    """Config values of this use: labels by class, one dropout for all."""
    drops = {name: options.dropout for name in base.config if name.endswith(DROPOUTS)}
    if options.form == "decoder":
        return drops
    names = {str(index): label for index, label in enumerate(task.labels)}
    return {
        **drops,
        "num_labels": len(task.labels),
        "id2label": names,
        "label2id": {v: int(k) for k, v in names.items()},
    }


def _check_capacity(config: ModelConfig) -> None:
    capacity = position_capacity(config.backbone)
    if capacity is not None and config.positions > capacity:
        raise ContractError(
            f"a segment of {config.segment_length} tokens takes {config.positions} positions with its memory and special "
            f"tokens; the backbone's table holds {capacity}. Choose shorter segments (--segment-length) or less memory"
        )
