"""The models that are measured: presets with random weights, the example, or the user's own; and their bundles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmt_trt.errors import ContractError, FormatError

if TYPE_CHECKING:
    from rmt_trt.model.checkpoint import LoadedModel
    from rmt_trt.model.config import ModelConfig
    from rmt_trt.model.step import RMTModel

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/memorize/model.pt"
EXPORT_SEGMENTS = 3  # random weights: the export's own check need not be long

# Form, M, S and backbone of each preset. BERT-base: input size 512 = 499 text tokens, 10 memory vectors, 3 specials.
PRESETS: dict[str, dict[str, Any]] = {
    "bert-base": {
        "form": "encoder", "num_memory": 10, "segment_length": 499, "vocab_size": 28996, "width": 768, "num_logits": 6,
        "prefix_ids": (101,), "middle_ids": (102,), "suffix_ids": (102,), "dropped_ids": (0, 101, 102),
        "backbone": {
            "model_type": "bert", "vocab_size": 28996, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512, "num_labels": 6,
        },
    },
    "gpt2-small": {
        "form": "decoder", "num_memory": 16, "segment_length": 512, "vocab_size": 50257, "width": 768,
        "num_logits": 50257,
        "backbone": {
            "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        },
    },
    "llama-1b": {
        "form": "decoder", "num_memory": 16, "segment_length": 1024, "vocab_size": 32000, "width": 2048,
        "num_logits": 32000,
        "backbone": {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
            "max_position_embeddings": 8192, "tie_word_embeddings": False,
        },
    },
}  # fmt: skip
PRESET_NAMES = (*PRESETS, "example")


@dataclass(frozen=True)
class Prepared:
    """A bundle to run, and the PyTorch model that it was exported from, which the peers run."""

    name: str
    bundle: Path
    model: RMTModel
    weights: str


def preset_config(name: str) -> ModelConfig:
    """Errors: ContractError for a name that is no preset."""
    from rmt_trt.model.config import ModelConfig

    if name not in PRESETS:
        raise ContractError(f"--preset is {name!r}; expected one of {', '.join(PRESET_NAMES)}")
    return ModelConfig(**PRESETS[name])


def prepare(
    source: Path | None,
    preset: str | None,
    work: Path,
    engine: str,
    dtypes: tuple[str, ...],
    say: Callable[[str], None],
) -> Prepared:
    """The bundle with the graphs of `engine` in `dtypes`, and its model.

    A bundle of the user's is taken as it is: it must hold the first of the dtypes. Of a checkpoint or a preset, one is
    exported into `work` and reused.
    Errors: ContractError when neither or both are given; FormatError for a bundle without the graphs.
    """
    if (source is None) == (preset is None):
        raise ContractError("give either a bundle or checkpoint to measure, or --preset " + "|".join(PRESET_NAMES))
    if source is not None and source.is_dir() and (source / "manifest.json").exists():
        return _own_bundle(source, engine, dtypes[0])
    if preset == "example":
        source = EXAMPLE
    if preset not in (None, "example"):
        preset_config(str(preset))
    name = str(preset) if preset is not None else Path(str(source)).stem
    say(f"{name}: reading or building the model")
    loaded = _load(source) if source is not None else _random_model(name)
    bundle = work / f"{name}.rmt"
    if source is None and engine != "cpu":
        _engine_bundle(loaded, bundle, engine, dtypes, say)
        return Prepared(name, bundle, loaded.model, "random, seed 0")
    _export(loaded, bundle, source, say)
    for dtype in dtypes if engine != "cpu" else ():
        if not has_graphs(bundle, engine, dtype):
            say(f"{name}: making the graphs for engine {engine} in {dtype}")
            _add_graphs(bundle, engine, dtype, loaded)
    return Prepared(name, bundle, loaded.model, "trained" if source is not None else "random, seed 0")


def has_graphs(bundle: Path, engine: str, dtype: str) -> bool:
    """Whether a bundle holds graphs made for an engine and dtype."""
    from rmt_trt.bundle import Bundle

    return any(graph.engine == engine and graph.dtype == dtype for graph in Bundle(bundle).manifest.graphs)


def _add_graphs(bundle: Path, engine: str, dtype: str, loaded: LoadedModel) -> None:
    """Adds them with a short check: what is measured is compared with the fp32 step again, at every batch size."""
    from rmt_trt.export import EngineOptions, add_engine_graphs

    options = EngineOptions(check_segments=EXPORT_SEGMENTS, segments=EXPORT_SEGMENTS)
    add_engine_graphs(bundle, engine=engine, dtype=dtype, model=loaded.model, options=options)


def _engine_bundle(
    loaded: LoadedModel, bundle: Path, engine: str, dtypes: tuple[str, ...], say: Callable[[str], None]
) -> None:
    """A bundle of random weights with an engine's graphs alone: nobody serves it, so `step.onnx`, which takes minutes of a
    large model, is left out. What is measured is compared with the fp32 step in PyTorch at every batch size."""
    from rmt_trt import initial_state
    from rmt_trt.bundle import INITIAL, Bundle, Manifest, made_by, new_bundle, write_manifest
    from rmt_trt.export.fused import fused_graphs

    fits = bundle.is_dir() and Bundle(bundle).spec.fingerprint == loaded.spec.fingerprint
    if fits and all(has_graphs(bundle, engine, dtype) for dtype in dtypes):
        say(f"{bundle} is reused")
        return
    say(f"{bundle}: making the graphs for engine {engine} in {', '.join(dtypes)}")
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with new_bundle(bundle, overwrite=bundle.exists()) as folder:
        entries = []
        for dtype in dtypes:
            made = fused_graphs(loaded.model, loaded.spec, dtype, folder, beside=dtype != "fp32")
            entries += [*made.entries, *made.native, *made.hopper]
        values = {"memory": loaded.model.memory.detach().numpy()}
        (folder / INITIAL).write_bytes(initial_state.to_bytes(values, loaded.spec))
        config = loaded.model.config.to_json()
        write_manifest(folder, Manifest(loaded.spec, tuple(entries), {}, made_by(), model=config))


def _own_bundle(path: Path, engine: str, dtype: str) -> Prepared:
    from rmt_trt.bundle import Bundle

    if engine != "cpu" and not has_graphs(path, engine, dtype):
        raise FormatError(
            f"{path} holds no {dtype} graphs for engine '{engine}'. Add them with: rmt-export {path} --engine {engine} "
            f"--dtype {dtype}"
        )
    bundle = Bundle(path)
    beside = path.resolve().parent / str(bundle.manifest.source.get("file") or "none")
    if beside.suffix == ".pt" and beside.is_file():
        loaded = _load(beside)
        if loaded.spec.fingerprint == bundle.spec.fingerprint:
            return Prepared(path.stem, path, loaded.model, "trained")
    from rmt_trt.export.recover import model_from_bundle

    return Prepared(path.stem, path, model_from_bundle(bundle), "trained")


def _load(path: Path) -> LoadedModel:
    from rmt_trt.model.checkpoint import load_model

    return load_model(path)


def _random_model(name: str) -> LoadedModel:
    import torch

    from rmt_trt.model.checkpoint import LoadedModel
    from rmt_trt.model.step import build_model, model_spec

    torch.manual_seed(0)
    model = build_model(preset_config(name))
    return LoadedModel(model, model_spec(model), None)


def _export(loaded: LoadedModel, bundle: Path, source: Path | None, say: Callable[[str], None]) -> None:
    """Exports into `bundle` unless it holds these weights already."""
    from rmt_trt.bundle import Bundle
    from rmt_trt.export import ExportOptions, export_model

    if bundle.is_dir() and Bundle(bundle).spec.fingerprint == loaded.spec.fingerprint:
        say(f"{bundle} is reused")
        return
    say(f"exporting {bundle}")
    bundle.parent.mkdir(parents=True, exist_ok=True)
    export_model(loaded, bundle, ExportOptions(segments=EXPORT_SEGMENTS, overwrite=bundle.exists()), source=source)
