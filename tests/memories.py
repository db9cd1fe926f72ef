"""What the tests of rmt-analyze share: memories and documents by chance, and what attention does by name."""

from __future__ import annotations

import models
import numpy as np

from rmt_trt.analysis.layout import OPERATIONS as ALL_OPERATIONS
from rmt_trt.export.verify import random_document

M, D = 4, 16
OPERATIONS = {operation.name: operation for operation in ALL_OPERATIONS}


def random_memory(seed: int, shape: tuple[int, int] = (M, D)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def document_of(name: str, length: int, seed: int = 0) -> list[int]:
    """Ids for a model of the catalogue, none of which is dropped."""
    return random_document(models.model_config(name).spec(), length, seed).tolist()
