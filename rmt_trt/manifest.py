"""`manifest.json`: what a bundle holds, file by file and graph by graph. `docs/bundle.md` describes it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import rmt_trt
from rmt_trt.contract import DTYPES, ENGINES, HEADS, StepSpec
from rmt_trt.errors import ContractError, FormatError

FORMAT = "rmt-trt-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
GRAPHS = "graphs"  # the folder of graphs for an engine
LOCK = ".lock"
STEP = "step.onnx"
INITIAL = "initial_state.safetensors"
TOKENIZER = "tokenizer.json"
REPORT = "verification.json"
# "step" takes any batch of unequal lengths; "full" takes segments of S tokens only, and masks nothing.
ROLES = ("step", "full", "prefill", "decode")
# What a graph may need of an installation beside its engine. "native": rmt-trt's own operators for ONNX Runtime. "hopper":
# their kernels for compute capability 9.0.
NEEDS = ("native", "hopper")

MANIFEST_LIMIT = 16 << 20
FILE_LIMIT = 1 << 42
MAX_FILES = 4096
MAX_NAME = 255


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 in hexadecimal of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class GraphEntry:
    """An ONNX graph: what it is for and the external data files (names inside the bundle) that it reads.

    min_batch  documents from which on it is the one to take, where several graphs are for the same use
    needs      what an installation must have to run it, out of NEEDS; a graph that needs nothing may stand beside it
    """

    file: str
    role: str = "step"
    engine: str = "cpu"
    dtype: str = "fp32"
    head: str = "all"
    opset: int = 0
    data: tuple[str, ...] = ()
    min_batch: int = 1
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not isinstance(self.data, (tuple, list)):
            raise FormatError(
                f"graph {self.file!r}: its file and data are {self.data!r}; expected a name and a list of names"
            )
        if not all(isinstance(name, str) for name in self.data):
            raise FormatError(f"graph {self.file!r}: data is {self.data!r}; expected names of files")
        if isinstance(self.opset, bool) or not isinstance(self.opset, int) or not 0 <= self.opset <= 1 << 16:
            raise FormatError(f"graph {self.file!r}: opset is {self.opset!r}; expected a whole number")
        if (
            isinstance(self.min_batch, bool)
            or not isinstance(self.min_batch, int)
            or not 1 <= self.min_batch <= 1 << 20
        ):
            raise FormatError(
                f"graph {self.file!r}: min_batch is {self.min_batch!r}; expected a whole number from 1 on"
            )
        object.__setattr__(self, "data", tuple(self.data))
        object.__setattr__(self, "needs", _needs(self.needs, self.file, self.engine))
        allowed = {"role": ROLES, "engine": ENGINES, "dtype": DTYPES, "head": HEADS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise FormatError(f"graph {self.file!r}: {name} is {getattr(self, name)!r}; expected one of {values}")


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` as values. `model` is the model's config and `source` what the bundle was exported from."""

    spec: StepSpec
    graphs: tuple[GraphEntry, ...]
    files: dict[str, FileEntry]
    made_by: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] | None = None
    verification: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Sorted, indented, so that two manifests can be compared line by line."""
        value = asdict(self) | {"spec": self.spec.to_json()}
        for graph in value["graphs"]:
            if graph["min_batch"] == 1:  # said only where it says something: older readers do not know it
                del graph["min_batch"]
            if not graph["needs"]:
                del graph["needs"]
        return json.dumps(value, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, value: object, where: Path) -> Manifest:
        """Checks every field. Errors: FormatError, naming the file `where` it stands."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise FormatError(
                f'{where} is no manifest of an rmt-trt bundle (no "format": "{FORMAT}"). Export the model with rmt-export'
            )
        version = value.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise FormatError(
                f"{where} has format version {version!r}; this rmt-trt {rmt_trt.__version__} reads "
                f"version {FORMAT_VERSION}. Update rmt-trt, or export the model again"
            )
        _known(value, cls, str(where))
        missing = sorted({"files", "graphs", "spec"} - set(value))
        if missing:
            raise FormatError(f"{where} lacks {missing}; it was cut or altered. Export the model again")
        for name, kind in _KINDS.items():
            if name in value and not isinstance(value[name], kind):
                raise FormatError(
                    f"{where}: '{name}' is {type(value[name]).__name__}; the file was altered. Copy it again"
                )
        if len(value["files"]) > MAX_FILES or len(value["graphs"]) > MAX_FILES:
            raise FormatError(f"{where} names more than {MAX_FILES} files or graphs; no bundle has as many")
        files = {safe_name(name, where): _file_entry(name, entry, where) for name, entry in value["files"].items()}
        try:
            graphs = tuple(GraphEntry(**_known(graph, GraphEntry, "a graph")) for graph in value["graphs"])
            spec = StepSpec.from_json(value["spec"])
        except (FormatError, ContractError, TypeError) as err:
            raise FormatError(f"{where}: {err}") from err
        rest = {key: value[key] for key in ("made_by", "source", "model", "verification") if key in value}
        for name in (INITIAL, *(name for graph in graphs for name in (graph.file, *graph.data))):
            if name not in files:
                raise FormatError(
                    f"{where} uses the file {name!r} without stating its size and hash. Export the model again"
                )
        if not any(graph.role == "step" for graph in graphs):
            raise FormatError(f"{where} names no graph with role 'step'. Export the model again")
        check_uses(graphs, where)
        return cls(spec=spec, graphs=graphs, files=files, **rest)


def made_by(**versions: str) -> dict[str, str]:
    """What made a bundle: rmt-trt, Python and the libraries named."""
    return {"rmt_trt": rmt_trt.__version__, "python": platform.python_version(), **versions}


def check_uses(graphs: Sequence[GraphEntry], where: Path) -> None:
    """Errors: FormatError, when two graphs are for one and the same use: which of them runs would be chance."""
    seen: dict[tuple[Any, ...], str] = {}
    for graph in graphs:
        use = (graph.role, graph.engine, graph.dtype, graph.head, graph.min_batch, graph.needs)
        if use in seen:
            raise FormatError(
                f"{where} names two graphs, {seen[use]!r} and {graph.file!r}, for engine '{graph.engine}', {graph.dtype}, "
                f"role '{graph.role}', head '{graph.head}'. Leave one out, or export again"
            )
        seen[use] = graph.file


# JSON types of the manifest's fields.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "files": dict, "graphs": list, "spec": dict, "made_by": dict, "source": dict, "model": (dict, type(None)),
    "verification": dict,
}  # fmt: skip


def _needs(needs: Any, file: str, engine: Any) -> tuple[str, ...]:
    if not isinstance(needs, (tuple, list)) or not all(isinstance(name, str) for name in needs):
        raise FormatError(f"graph {file!r}: needs is {needs!r}; expected a list of names")
    if unknown := sorted(set(needs) - set(NEEDS)):
        named = ", ".join(f"{name:.80}" for name in unknown[:3]) + (" and others" if len(unknown) > 3 else "")
        raise FormatError(
            f"graph {file!r} needs {named}, which this rmt-trt {rmt_trt.__version__} does not know: the bundle "
            f"was made by a newer rmt-trt. Update it: pip install --upgrade rmt-trt"
        )
    if "hopper" in needs and ("native" not in needs or engine != "cuda"):
        raise FormatError(
            f"graph {file!r} is for the engine {engine!r:.80} and needs {', '.join(sorted(set(needs)))}; kernels for Hopper are "
            f"rmt-trt's own operators for the engine 'cuda', and come with the need 'native'. Export the graphs again"
        )
    return tuple(sorted(set(needs)))


def _known(value: Any, cls: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{what} is {type(value).__name__}; expected a JSON object")
    unknown = sorted(set(value) - {f.name for f in fields(cls)})
    if unknown:
        raise FormatError(f"{what} has unknown fields {unknown}; it was altered, or written by a newer rmt-trt")
    return value


def safe_name(name: object, where: Path) -> str:
    """A name as this project writes it: relative, in one spelling only, and none of the bundle's own."""
    path = PurePosixPath(name) if isinstance(name, str) else None
    if (
        path is None
        or path.is_absolute()
        or str(path) != name
        or name in (".", MANIFEST, LOCK)
        or ".." in path.parts
        or any(c in "\\:" or not c.isprintable() for c in name)
        or len(name.encode()) > MAX_NAME
    ):
        raise FormatError(f"{where} names the file {name!r:.80}; only relative paths inside the bundle are read")
    return name


def _file_entry(name: str, entry: Any, where: Path) -> FileEntry:
    entry = _known(entry, FileEntry, f"{where}: file {name!r}")
    size, digest = entry.get("size"), entry.get("sha256")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= FILE_LIMIT:
        raise FormatError(f"{where}: file {name!r} claims {size!r} bytes; expected a whole number up to {FILE_LIMIT}")
    if not isinstance(digest, str) or len(digest) != 64:
        raise FormatError(f"{where}: file {name!r} has no SHA-256 of 64 hexadecimal digits")
    return FileEntry(size, digest)
