"""Containers of weights: what lies in a file or a folder, read without believing it.

A torch pickle is read with `weights_only=True`, so that no code in it runs; a zip's members and a tensor's extent are
compared with the file's size before anything is copied; the shards of an index stay inside their folder. Weights in
any floating-point dtype are handed on as stored; the model holds them as float32.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from rmt_trt.errors import FormatError
from rmt_trt.files import atomic_file, read_json

MAX_JSON_BYTES = 1 << 26
MAX_SHARDS = 4096
MAX_DEPTH = 8
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_best.pth",
    "model.pt",
)
WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")
# Trainers store their best metric as a numpy number: plain values, whose pickle names these and nothing else.
NUMBERS: list[Any] = [
    np.dtype,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]


@dataclass(frozen=True)
class Stored:
    """What was found: the top-level value of a file (or of all shards), and the plain files that lie with it."""

    path: Path
    value: dict[str, Any]
    config: Path | None
    tokenizer: Path | None


def read_stored(path: Path) -> Stored:
    """Reads a file, an index of shards, or a folder that holds either. Errors: FormatError."""
    if not path.exists():
        raise FormatError(f"{path} does not exist; expected a checkpoint file, or a folder that holds one")
    file = _weights_in(path) if path.is_dir() else path
    value = _read_shards(file) if file.name.endswith(".index.json") else read_file(file)
    folders = [file.parent]
    # The published trainer puts its config.json one level above model_best/.
    if file.absolute().parent.name.startswith(("model_", "checkpoint-")):
        folders.append(file.absolute().parent.parent)
    return Stored(file, value, _beside(folders, "config.json"), _beside(folders, "tokenizer.json"))


def read_file(file: Path) -> dict[str, Any]:
    """The top-level value of one file: a dict of tensors, or of plain values with tensors in them.

    Errors: FormatError, for a file that is empty, cut short, no checkpoint, or that holds more than plain values.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(16)
    except OSError as err:
        raise FormatError(f"{file} cannot be read: {err}") from err
    if not head:
        raise FormatError(f"{file} is empty; expected a checkpoint")
    if head[:2] == b"PK":
        _check_zip(file)
        value = _load_pickle(file, mmap=True)
    elif head[8:9] == b"{" and file.suffix not in (".pt", ".pth", ".bin"):
        value = _load_safetensors(file)
    elif head[0] == 0x80:
        value = _load_pickle(file, mmap=False)
    elif file.suffix == ".safetensors":
        value = _load_safetensors(file)
    else:
        raise FormatError(
            f"{file} is no checkpoint: it starts with {head[:8]!r}. Expected a PyTorch file (.pt, .pth, .bin), "
            f"a .safetensors file, an index of shards (.index.json), or a folder that holds one of them"
        )
    if not isinstance(value, dict):
        raise FormatError(f"{file} holds a {type(value).__name__}; expected a dict of tensors (a state dict)")
    _check_extent(file, value)
    return value


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Errors: FormatError."""
    value = read_json(file, MAX_JSON_BYTES, "a JSON object")
    if not isinstance(value, dict):
        raise FormatError(f"{file} holds a JSON {type(value).__name__}; expected an object")
    return value


def state_dict_of(stored: Stored) -> dict[str, torch.Tensor]:
    """The tensors by name, without the wrappers and prefixes that trainers put around them. Errors: FormatError."""
    value = stored.value
    for _ in range(MAX_DEPTH):
        inner = next((value[name] for name in WRAPPERS if isinstance(value.get(name), dict)), None)
        if inner is None:
            break
        value = inner
    tensors = {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, torch.Tensor)}
    for _ in range(MAX_DEPTH):
        prefix = next((p for p in PREFIXES if tensors and all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if not tensors:
        raise FormatError(
            f"{stored.path} holds no tensors by name (top-level keys: {names_of(value)}); expected a state dict, by itself "
            f"or under one of {', '.join(WRAPPERS)}"
        )
    return tensors


def _weights_in(folder: Path) -> Path:
    for inside in (folder, folder / "model_best"):
        for name in WEIGHT_FILES:
            if (inside / name).is_file():
                return inside / name
    if (folder / "manifest.json").is_file():
        raise FormatError(f"{folder} is an exported bundle; expected the checkpoint that it was exported from")
    raise FormatError(
        f"{folder} holds no weights; expected one of {', '.join(WEIGHT_FILES)} in it or in its folder model_best. "
        f"Give the file itself if it has another name"
    )


def _beside(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _read_shards(index: Path) -> dict[str, Any]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise FormatError(f"{index} has no 'weight_map' from tensor names to file names; is it an index of shards?")
    shards = sorted(set(places.values()))
    if len(shards) > MAX_SHARDS:
        raise FormatError(f"{index} names {len(shards)} shards; at most {MAX_SHARDS} are read")
    merged: dict[str, Any] = {}
    for name in shards:
        if name in ("", ".", "..") or re.search(r"[/\\\0:]", name):
            raise FormatError(f"{index} names the shard {name!r}; a shard must be a plain file name in the same folder")
        if not (index.parent / name).is_file():
            raise FormatError(f"{index} names the shard {name!r}, which is not there; copy all shards into the folder")
        part = read_file(index.parent / name)
        twice = sorted(set(part) & set(merged))
        if twice:
            raise FormatError(f"{index}: '{twice[0]}' lies in more than one shard")
        merged.update(part)
    missing = sorted(set(places) - set(merged))
    if missing:
        raise FormatError(f"{index} promises {len(missing)} tensors that no shard holds: {names_of(missing)}")
    return merged


def _check_zip(file: Path) -> None:
    """Refuses TorchScript, and archives whose members unpack to more than the file: torch stores them plainly."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as err:
        raise FormatError(f"{file} is damaged or cut short ({err}); copy or download it again") from err
    names = [member.filename for member in members]
    if any("/code/" in name for name in names) and any(name.endswith("constants.pkl") for name in names):
        raise FormatError(
            f'{file} is a TorchScript archive; expected a state dict. Convert it: python -c "import torch; '
            f"torch.save(torch.jit.load('{file.name}', 'cpu').state_dict(), 'state_dict.pt')\""
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise FormatError(f"{file} is a zip archive without data.pkl; expected a file that torch.save wrote")
    size = file.stat().st_size
    if (
        any(member.compress_type != zipfile.ZIP_STORED for member in members)
        or sum(m.file_size for m in members) > size
    ):
        raise FormatError(f"{file} is a compressed zip archive; torch.save writes its members uncompressed")


def _load_pickle(file: Path, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols, for files that are refused anyhow
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as err:
        raise _refused_pickle(file, str(err)) from None
    except Exception as err:  # whatever torch's readers make of damaged bytes: RuntimeError, AssertionError, ...
        lines = str(err).strip().splitlines() or [type(err).__name__]
        raise FormatError(f"{file} is damaged or cut short ({names_of(lines[:1])}); copy or download it again") from err


def _refused_pickle(file: Path, reason: str) -> FormatError:
    found = re.search(r"(?:GLOBAL|class|function)[:\s]+`?([\w.]+)", reason)
    if found is None:
        return FormatError(f"{file} is damaged, or no file that torch.save wrote; nothing in it was run")
    name = found.group(1)
    message = f"{file} holds more than tensors and plain values: its pickle asks for '{name}'. Nothing in it was run"
    if name.startswith(("torch.nn.", "transformers.", "__main__.", "modeling_")):
        return FormatError(
            f"{message}. It looks like a whole pickled module. If you made it yourself, convert it where its classes "
            f"are: python -c \"import torch; torch.save(torch.load('{file.name}', 'cpu', weights_only=False)"
            f".state_dict(), 'state_dict.pt')\""
        )
    return FormatError(f"{message}; ask for a state dict or a .safetensors file instead")


def _load_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as archive:
            return {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as err:
        raise FormatError(f"{file} is no safetensors file, or cut short ({err}); copy or download it again") from err


def _check_extent(file: Path, value: dict[str, Any]) -> None:
    """Refuses tensors that claim more than the file holds: expanded views, or one storage under a thousand names."""
    total, size, pending = 0, file.stat().st_size, [(value, 0)]
    while pending:
        mapping, depth = pending.pop()
        for key, item in mapping.items():
            if isinstance(item, torch.Tensor):
                extent = item.numel() * item.element_size() if item.layout == torch.strided else None
                if extent is None or item.is_meta or extent > item.untyped_storage().nbytes():
                    raise FormatError(f"{file}: tensor '{key}' {tuple(item.shape)} is not stored plainly in the file")
                total += extent
            elif isinstance(item, dict) and depth < MAX_DEPTH:
                pending.append((item, depth + 1))
    if total > 4 * size + (1 << 20):
        raise FormatError(
            f"{file} has {size} bytes, its tensors claim {total}: it is damaged or made to exhaust memory"
        )


def names_of(keys: Iterable[object]) -> str:
    """The first few names of a file for a message, without control characters that a terminal would obey."""
    listed = ["".join(c if c.isprintable() else "?" for c in str(key)[:80]) for key in keys]
    return ", ".join(listed[:5]) + (f", ... ({len(listed)} in all)" if len(listed) > 5 else "") if listed else "none"


def write_value(path: Path, value: dict[str, Any]) -> None:
    """Writes what `torch.load(weights_only=True)` reads, atomically. Errors: FormatError."""
    try:
        with atomic_file(path) as temporary:
            torch.save(value, temporary)
    except RuntimeError as err:  # torch reports a full disk as one
        raise FormatError(
            f"cannot write {path}: PyTorch could not write all of it ({err}). Nothing was left behind; free some space or choose "
            f"another place"
        ) from err
