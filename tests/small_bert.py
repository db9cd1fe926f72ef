"""A pretrained BERT small enough for tests, as Hugging Face saves it, with a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from texts import EXCERPT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel

TELLING = "Daniel John Mary Sandra bathroom bedroom garden hallway kitchen office went moved travelled journeyed back to the Where is"


def small_bert(folder: Path, pooler: bool = True, **changes: Any) -> Path:
    """Writes config.json, model.safetensors and tokenizer.json: one layer, 32 wide, 40 positions. Returns the folder."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        [*EXCERPT.read_text().splitlines(), TELLING],
        trainers.WordLevelTrainer(special_tokens=special, show_progress=False),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(3)
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 40, "hidden_dropout_prob": 0.1,
    }  # fmt: skip
    BertModel(BertConfig(**{**sizes, **changes}), add_pooling_layer=pooler).save_pretrained(folder)
    return folder
