"""The step's inputs as they are along a recurrence: the memory after one, ten, a thousand segments, not only the first.

A range measured on first segments alone misses what the memory becomes later on. These feeds are what a calibration
data reader, such as onnxruntime.quantization's, hands to the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmt_trt.contract import SEGMENT
from rmt_trt.errors import ContractError
from rmt_trt.runtime import RMTRuntime


@dataclass(frozen=True)
class Feed:
    """One step's inputs by graph name, batch 1, and where they were taken: document and segment, from 0."""

    inputs: dict[str, np.ndarray]
    document: int
    segment: int


def recurrent_feeds(runtime: RMTRuntime, documents: Iterable[Any], every: int = 1) -> Iterator[Feed]:
    """Drives each document through the runtime and yields the inputs of every `every`-th step, at constant memory.

    documents: what `RMTRuntime.run` takes, one at a time; cut with alignment "left". Errors: ContractError for
    `every` below 1, TokenError for a document that the model cannot read.
    """
    if every < 1:
        raise ContractError(f"every is {every}; expected a whole number of at least 1")
    names = [state.input for state in runtime.spec.states]
    for number, document in enumerate(documents):
        tokens = runtime.encode(document) if isinstance(document, str) else np.asarray(document)
        kept = tokens[~np.isin(tokens, runtime.spec.dropped_ids)]
        states = runtime.initial
        for piece in runtime.stream(kept, alignment="left", logits="none", memory=True):
            if piece.index % every == 0:
                inputs = {name: value[None] for name, value in zip(names, states, strict=True)}
                yield Feed(
                    {**inputs, SEGMENT: kept[None, piece.start : piece.stop].astype(np.int64)}, number, piece.index
                )
            states = piece.states
