"""What the tests of calibration share: short options, and documents of small models."""

from __future__ import annotations

from models import made

from rmt_trt.calibration import CollectOptions, Source


def options(method: str = "minmax", draws: int = 2, seed: int = 0) -> CollectOptions:
    return CollectOptions(method, draws, seed, threads=1)


def sources(name: str, *lengths: int) -> list[Source]:
    """Documents of a model of the catalogue."""
    documents = [made(name).document(length, seed) for seed, length in enumerate(lengths)]
    return [Source(f"document {number}", lambda ids=ids: ids) for number, ids in enumerate(documents)]
