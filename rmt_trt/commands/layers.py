"""What rmt-info shows of the inside of a TensorRT engine: tensors, layers and what was fused into them, and their times."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

import rmt_trt
from rmt_trt.commands.app import printable
from rmt_trt.commands.engines_table import gpu_facts
from rmt_trt.contract import DTYPES, Head
from rmt_trt.engine_check import HEADS
from rmt_trt.engine_record import EngineRecord
from rmt_trt.errors import ContractError, EngineError
from rmt_trt.files import check_target, write_file
from rmt_trt.runtime.engine_files import EngineFile
from rmt_trt.runtime.inspection import Inspection, LayerTimes, OpenedEngine, chosen, opened
from rmt_trt.runtime.layer_information import Layer, Port
from rmt_trt.runtime.source import Source

FORMAT, FORMAT_VERSION = "rmt-trt-layer-times", 1
RUNS, MAX_RUNS = 50, 100_000
FIGURES = ("ms", "least", "most", "share")
# A layer that was fused from many nodes has a name of thousands of characters; JSON has it whole.
LONGEST = 72
MOST_NODES, MOST_PORTS = 4, 3
log = logging.getLogger("rmt_trt")


@dataclass(frozen=True)
class Look:
    """What is to be looked into: `engine`, `dtype` and `head` choose an engine file, None is the best that runs.

    layers       its layers and tensors
    layer_times  the JSON file for its layers' times
    batch        documents of a step; None is what the engine was tuned for
    runs         steps that are timed; None is RUNS
    """

    layers: bool = False
    layer_times: Path | None = None
    engine: str | None = None
    dtype: str | None = None
    head: str | None = None
    batch: int | None = None
    runs: int | None = None

    @property
    def wanted(self) -> bool:
        return self.layers or self.layer_times is not None

    def check(self) -> None:
        """Errors: ContractError for options that do not fit; FormatError for a file that cannot be written."""
        if not self.wanted:
            names = [name for name in ("engine", "dtype", "head", "batch", "runs") if getattr(self, name) is not None]
            if names:
                raise ContractError(
                    f"--{names[0]} is about the inside of an engine. Give --layers or --layer-times too"
                )
            return
        for name, known in (("dtype", DTYPES), ("head", HEADS)):
            if getattr(self, name) not in (None, *known):
                raise ContractError(f"--{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.runs is not None and self.layer_times is None:
            raise ContractError("--runs is about --layer-times FILE.json. Give that too")
        if self.runs is not None and not 1 <= self.runs <= MAX_RUNS:
            raise ContractError(f"--runs is {self.runs}; expected 1 to {MAX_RUNS}")
        if self.layer_times is not None:
            check_target(self.layer_times)


def show_layers(source: Source, look: Look, device: int, as_json: bool) -> None:
    """Prints what is asked for of the chosen engine, and writes its layers' times.

    Errors: as `inspection.chosen` and `inspection.opened`.
    """
    file = chosen(source, look.engine, look.dtype, cast(Head | None, look.head), device)
    with opened(file, source, device, look.batch) as engine:
        found = engine.inspect() if look.layers else _inspected(engine)
        times = None if look.layer_times is None else engine.layer_times(look.runs or RUNS)
    known = {layer.name: layer for layer in found.information.layers} if found is not None else {}
    facts: dict[str, Any] = {"engine": _engine_json(file), "gpu": gpu_facts(device)}
    timed = None if times is None else _times_json(times, known)
    if timed is not None and look.layer_times is not None:
        told = {"format": FORMAT, "format_version": FORMAT_VERSION, "rmt_trt": rmt_trt.__version__, **facts, **timed}
        write_file(look.layer_times, (json.dumps(told, indent=2) + "\n").encode())
    if as_json:
        inside = {"inspection": None if found is None or not look.layers else _inspection_json(found)}
        print(json.dumps(facts | inside | {"layer_times": timed}, indent=2))
        return
    screen = Console(highlight=False, markup=False, emoji=False)
    if found is not None and look.layers:
        _print_inspection(screen, found, file, _rebuild(source, file.record))
    if times is not None:
        screen.print(_times_table(times, file, known))
        screen.print(printable(f"written to {look.layer_times}"))


def _inspected(engine: OpenedEngine) -> Inspection | None:
    """What the layers are made of that are timed, where the inspector tells it: without, they have their names."""
    if not engine.has_inspector:
        return None
    try:
        return engine.inspect()
    except EngineError as err:
        log.warning("what the layers are made of is not known: %s", printable(err))
        return None


def _engine_json(file: EngineFile) -> dict[str, Any]:
    kept = ("engine", "dtype", "role", "head", "size", "sha256", "flavour", "version", "compute_capabilities")
    return {"path": str(file.path)} | {name: getattr(file.record, name) for name in kept}


def _inspection_json(found: Inspection) -> dict[str, Any]:
    value = dataclasses.asdict(found)
    return {**value, "detailed": found.information.detailed, **value.pop("information")}


def _times_json(times: LayerTimes, known: dict[str, Layer]) -> dict[str, Any]:
    rows = [(time, known.get(time.name, Layer(time.name))) for time in times.layers]
    return {
        "library": times.library, "batch": times.batch, "segments": "full, of random tokens", "warm_up": times.warm_up,
        "runs": times.runs, "step_ms": times.step,
        "layers": [
            {
                "name": time.name, "type": layer.kind, "nodes": list(layer.nodes), "median_ms": time.median,
                "least_ms": time.least, "most_ms": time.most, "share": time.share,
            }
            for time, layer in rows
        ],
    }  # fmt: skip


def _rebuild(source: Source, record: EngineRecord) -> str:
    """The command that builds the same engine again."""
    bundle = shlex.quote(str(source.path)) if source.bundle is not None else "NAME.rmt"
    most = record.profiles[0]["segment"]["max"][0]
    gpus = f" --compute-capability {','.join(map(str, record.compute_capabilities))}"
    return f"rmt-build {bundle} --engine {record.engine} --dtype {record.dtype} --max-batch {most}" + (
        gpus if record.engine == "tensorrt-rtx" else ""
    )


def _print_inspection(screen: Console, found: Inspection, file: EngineFile, rebuild: str) -> None:
    layers = found.information.layers
    screen.print(_tensors_table(found, file))
    if found.information.detailed:
        screen.print(_layers_table(found))
        return
    if layers:
        screen.print(_names_table(layers))
    kept = "keeps its layers' names alone" if layers else "keeps nothing of its layers"
    screen.print(
        f"It {kept} (profiling verbosity {printable(found.verbosity)}): what was fused, kernels and formats are not in it. An "
        f"engine that has them is built by: {printable(rebuild)}",
        soft_wrap=True,  # a command to paste
    )


def _tensors_table(found: Inspection, file: EngineFile) -> Table:
    mib = 1 << 20
    table = _table(
        f"{file.path.name}, {file.record.dtype}, loaded by {found.library}",
        ("tensor", "mode", "dtype", "shape", "stepped", "format", "memory"),
        f"stepped: full segments of {found.batch} documents. On the GPU: {found.memory.weights / mib:.1f} MiB of weights, "
        f"{found.memory.activations / mib:.1f} MiB for intermediate values",
    )
    for tensor in found.tensors:
        shapes = ["x".join(map(str, tensor[name])) for name in ("shape", "stepped")]
        row = [tensor["name"], tensor["mode"].lower(), tensor["dtype"], *shapes, tensor["format"], tensor["location"]]
        table.add_row(*(_cell(value) for value in row))
    return table


def _layers_table(found: Inspection) -> Table:
    layers = found.information.layers
    nodes = {node for layer in layers for node in layer.nodes}
    fused = sum(len(layer.nodes) > 1 for layer in layers)
    table = _table(
        f"{len(layers)} layers of {len(nodes)} nodes of the ONNX graph; {fused} hold more than one",
        ("layer", "type", "made of", "kernel", "reads", "writes"),
        "--json has all of it",
    )
    for layer in layers:
        table.add_row(
            _cell(layer.name), _cell(layer.kind), _several(layer.nodes, MOST_NODES), _cell(layer.kernel),
            _ports(layer.inputs), _ports(layer.outputs),
        )  # fmt: skip
    return table


def _names_table(layers: tuple[Layer, ...]) -> Table:
    table = _table(f"{len(layers)} layers", ("layer",))
    for layer in layers:
        table.add_row(_cell(layer.name))
    return table


def _times_table(times: LayerTimes, file: EngineFile, known: dict[str, Layer]) -> Table:
    table = _table(
        f"{file.path.name}: {times.step:.3f} ms in all layers, in a step of {times.batch} documents",
        ("layer", "type", "made of", *FIGURES),
        f"{times.library}; ms, the median, the least and the most of {times.runs} steps of full segments, after "
        f"{times.warm_up}. Steps that are not profiled may be faster",
    )
    for time in times.layers:
        layer = known.get(time.name, Layer(time.name))
        figures = (f"{value:.4f}" for value in (time.median, time.least, time.most))
        nodes = _several(layer.nodes, MOST_NODES)
        table.add_row(_cell(time.name), _cell(layer.kind), nodes, *figures, f"{time.share:.1%}")
    return table


def _table(title: str, columns: tuple[str, ...], caption: str | None = None) -> Table:
    table = Table(
        title=printable(title), title_justify="left", caption=None if caption is None else printable(caption),
        caption_justify="left",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name in FIGURES else "left")
    return table


def _cell(value: object) -> str:
    """A stranger's word, fit for a terminal and for a table."""
    text = printable(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _several(values: Iterable[str], most: int) -> str:
    cells = [_cell(value) for value in values]
    more = [f"and {len(cells) - most} more"] if len(cells) > most else []
    return "\n".join([*cells[:most], *more])


def _ports(ports: tuple[Port, ...]) -> str:
    told = (" ".join(filter(None, (port.name, port.shape, port.format and f"({port.format})"))) for port in ports)
    return _several(told, MOST_PORTS)
