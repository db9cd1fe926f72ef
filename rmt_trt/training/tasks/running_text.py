"""A tokenizer as it reads running text: sentences get the ids that they have behind another one.

Many tokenizers give a word other ids at the very start of a text than behind a blank ("Daniel", " Daniel"). Sentences
are encoded one by one and put together later; hence each is encoded behind a full stop, whose ids are cut off again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rmt_trt.errors import ContractError, FormatError, require

BEFORE = "."


class RunningText:
    """A tokenizer.json, ready to encode sentences.

    json        the text of the tokenizer.json
    vocab_size  ids are below it
    full_stop   the id of "." behind a word
    special     ids of the special tokens but that for unknown words: none may stand in a text
    """

    def __init__(self, tokenizer_json: str) -> None:
        """Errors: FormatError, for what is no tokenizer.json; ContractError; EngineError, without tokenizers."""
        library = require("tokenizers", "text", "a task over a text")
        try:
            self._tokenizer = library.Tokenizer.from_str(tokenizer_json)
        except Exception as err:  # the library raises nothing narrower
            raise FormatError(
                f"the tokenizer cannot be read ({err}); expected the text of a tokenizer.json as the tokenizers library writes it"
            ) from err
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json = tokenizer_json
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.special = self._special(json.loads(tokenizer_json))
        before, end, whole = (self._raw([text])[0] for text in (BEFORE, f"{BEFORE} The end.", f"{BEFORE} The end"))
        self._skip = len(before)
        if not before or end[: self._skip] != before or end[:-1] != whole:
            raise ContractError("the tokenizer does not keep full stops apart from words; expected one that does")
        self.full_stop: int = end[-1]

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """The ids of each sentence as it stands behind another one; no special tokens are added."""
        return [ids[self._skip :] for ids in self._raw([f"{BEFORE} {sentence}" for sentence in sentences])]

    def decode(self, ids: np.ndarray) -> str:
        """Ids -> text."""
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text

    def name_of(self, token: int) -> str:
        """The token of an id."""
        return str(self._tokenizer.id_to_token(token))

    def _raw(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        except Exception as err:
            raise FormatError(f"the tokenizer fails on a text ({err}); expected one that reads any") from err

    def _special(self, value: dict[str, Any]) -> frozenset[int]:
        model = value.get("model") or {}
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:  # Unigram names it by its place
            unknown = model["vocab"][model["unk_id"]][0]
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, said in added.items() if said.special and said.content != unknown)
