"""Every name of TensorRT's that our code uses is there: in the flavours that are installed, and in the bindings of others.

The names are read out of our source (`library_names`). TensorRT itself cannot be imported without its libraries; its
names stand in the extension module of its Python bindings, a small package of its own.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import tensorrt_lean
import tensorrt_library
import tensorrt_rtx
from library_names import Names, looked_up, own_names, tree_of

from rmt_trt.engine_record import HARDWARE
from rmt_trt.runtime.engine_fit import DIAGNOSTICS, RTX_TARGETS

ROOT = Path(__file__).resolve().parent.parent
BUILDS = sorted((ROOT / "export/tensorrt").glob("*.py"))
RUNS = sorted(
    [
        *(ROOT / "runtime/engines").glob("tensorrt*.py"),
        *(ROOT / "runtime").glob("engine_f*.py"),
        ROOT / "runtime/inspection.py",
    ]
)
# What these files use of each other, and of what is below them.
TOGETHER = (*BUILDS, *RUNS, ROOT / "runtime/cuda.py", ROOT / "runtime/machine.py", ROOT / "rmt_trt/errors.py")
OURS = tuple(sorted([*BUILDS, *(ROOT / "runtime").rglob("*.py")]))
# Where flavours and versions differ, names of one alone may stand: TensorRT-RTX's runtime settings and caches, what it
# says of an engine's validity, the GPUs that it is told to build for.
DIFFERENCES = {"flavours.py", "tensorrt_versions.py", "tensorrt_cache.py", "engine_fit.py"}
# The lean runtime has no engine inspector.
NOT_LEAN = {"inspection.py"}
# Of cuda.core, whose objects have no types either.
CUDA = {"Device", "set_current", "handle", "launch"}
VERSIONS = ("10.16", "11.4")
PYTHON = {name for kind in (str, bytes, dict, list, tuple) for name in dir(kind)} | {"__members__", "__version__"}


def names_of(file: Path) -> Names:
    return looked_up(file, TOGETHER)


def known(trt: ModuleType) -> set[str]:
    """Names of a module and of its classes' members."""
    return set(dir(trt)) | {name for kind in vars(trt).values() if isinstance(kind, type) for name in dir(kind)}


def library_part(names: Names, trt: ModuleType = tensorrt_rtx) -> set[str]:
    """The names that are a library's, of those that were found; derived methods are called by it."""
    return ({*names.names} & known(trt)) - PYTHON | (names.defined & known(trt))


def test_the_names_are_found_in_the_source() -> None:
    built = set().union(*(library_part(names_of(file)) for file in BUILDS))
    run = set().union(*(library_part(names_of(file)) for file in RUNS))
    assert {"build_serialized_network", "TF32", "decomposable", "node_operator", "step_complete"} <= built
    assert {"execute_async_v3", "deserialize_cuda_engine", "set_runtime_cache", "seek", "INTERNAL_ERROR"} <= run
    assert min(len(built), len(run)) > 50


def test_a_misspelt_name_is_found_wherever_the_librarys_objects_come_from(tmp_path: Path) -> None:
    file = tmp_path / "source.py"
    file.write_text(
        "class Held:\n"
        "    engine: Any = None\n"
        "    def keep(self, made: Any) -> None:\n"
        "        self.cache, self.other = made.create_it(), 3\n"
        "        self.cache.in_a_field(); self.engine.of_a_field()\n"
        "        self.other.not_the_librarys()\n"
        "def made_of(trt: Any) -> tuple[Any, int]:\n"
        "    return trt.Kind.MISSPELT, 1\n"
        "def use(held: Held, mine: int) -> None:\n"
        "    one, two = made_of(mine)\n"
        "    for layer in held.engine.layers:\n"
        "        layer.in_a_loop = one.of_a_result\n"
        "    mine.bit_length()\n"
    )
    found = looked_up(file, (file,))
    assert {*found.names} == {
        "create_it", "in_a_field", "of_a_field", "Kind", "MISSPELT", "layers", "in_a_loop", "of_a_result",
    }  # fmt: skip
    assert ("Kind", "MISSPELT") in found.chains
    with pytest.raises(AssertionError, match=r"tensorrt_rtx has no Kind"):
        resolve(tensorrt_rtx, ("Kind", "MISSPELT"))


@pytest.mark.parametrize("file", [*BUILDS, *RUNS], ids=lambda file: file.name)
def test_what_is_looked_up_is_in_tensorrt_rtx_or_ours(file: Path) -> None:
    found = names_of(file)
    unknown = {*found.names} - known(tensorrt_rtx) - own_names(OURS) - PYTHON - CUDA
    assert not unknown, {name: found.names[name] for name in unknown}
    for chain in found.chains:
        resolve(tensorrt_rtx, chain)


@pytest.mark.parametrize(
    "file", [file for file in RUNS if file.name not in DIFFERENCES | NOT_LEAN], ids=lambda f: f.name
)
def test_what_runs_an_engine_is_in_the_lean_runtime(file: Path) -> None:
    found = names_of(file)
    assert library_part(found) - known(tensorrt_lean) == set()
    for chain in found.chains:
        resolve(tensorrt_lean, chain)


def test_members_stand_in_the_lean_runtime_where_the_stand_in_has_them() -> None:
    for kind, members in tensorrt_library.COMMON.items():
        missing = [member for member in members if not hasattr(getattr(tensorrt_lean, kind), member)]
        assert not missing, f"{kind} has no {missing}"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_is_in_the_bindings_of_tensorrt(version: str, pytestconfig: pytest.Config) -> None:
    stands = bindings(version, pytestconfig.cache.mkdir("tensorrt-bindings"))  # type: ignore[union-attr]
    for file in [*BUILDS, *RUNS]:
        missing = {name for name in library_part(names_of(file)) if not stands(name)}
        if file.name in DIFFERENCES:
            missing -= known(tensorrt_rtx) - known(tensorrt_lean)
        assert not missing, f"TensorRT {version} lacks what {file.name} uses"
    offered = {name for kind, members in tensorrt_library.COMMON.items() for name in (kind, *members)}
    offered |= {level.upper() for level in HARDWARE}
    assert not {name for name in offered if not stands(name)}
    assert not stands("set_runtime_cache"), "what TensorRT-RTX has alone is not found in everything"


def test_names_that_are_put_together_are_there() -> None:
    """Names out of records and tables, which no source spells out."""
    assert {level.upper() for level in HARDWARE} == set(tensorrt_rtx.HardwareCompatibilityLevel.__members__)
    assert {level.upper() for level in HARDWARE} == set(tensorrt_lean.HardwareCompatibilityLevel.__members__)
    kinds = tensorrt_rtx.ComputeCapability.__members__
    assert {f"SM{value}" for value in RTX_TARGETS} == {name for name in kinds if name.startswith("SM")}
    assert set(DIAGNOSTICS) <= set(tensorrt_rtx.EngineInvalidityDiagnostics.__members__)


def test_a_package_index_that_cannot_be_reached_is_a_failure_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(pytest.fail.Exception, match="this test needs a package index, and pip failed"):
        bindings("10.16", tmp_path / "cache")


REMOVED = {"FP16", "BF16", "INT8", "FP8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"}
# ONNX Runtime's own calibration is another thing: the function that makes it is no name of a builder.
BANNED = re.compile("(?<!^create_)calibrator$|^int8_calibration|^dynamic_range$|^set_dynamic_range$", re.IGNORECASE)


def python_files() -> list[Path]:
    rooms = ("rmt_trt", "export", "runtime", "calibration", "benchmarks", "examples", "tests")
    return sorted([ROOT / "setup.py", *(file for room in rooms for file in (ROOT / room).rglob("*.py"))])


def test_no_precision_is_asked_of_a_builder_and_nothing_is_calibrated_by_it() -> None:
    asked = []
    for file in python_files():
        for node in ast.walk(tree_of(file)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            of = node.value if isinstance(node, ast.Attribute) else None
            flag = (
                (of.attr if isinstance(of, ast.Attribute) else of.id if isinstance(of, ast.Name) else "") if of else ""
            )
            if (flag == "BuilderFlag" and name in REMOVED) or BANNED.search(name):
                asked.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {name}")
    assert not asked


def test_no_number_of_an_enum_is_kept() -> None:
    """A number may be made of a name to be handed to the library in the same line, as a bit; it is never kept."""
    kept = []
    for file in [*BUILDS, *RUNS]:
        assert {"value", "real"} & {*names_of(file).names} == set(), file.name
        tree = tree_of(file)
        above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "int":
                inside = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                if "trt" in inside and not isinstance(above[node], ast.BinOp):
                    kept.append(f"{file.name}:{node.lineno}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                enums = {"set_flag", "clear_flag", "get_flag", "set_memory_pool_limit", "get_engine_stat"}
                if node.func.attr in enums and isinstance(node.args[0], ast.Constant):
                    kept.append(f"{file.name}:{node.lineno}")
    assert not kept


def resolve(trt: ModuleType, chain: tuple[str, ...]) -> None:
    """Follows names from the module down. Errors: AssertionError with the one that is missing."""
    place: object = trt
    for number, name in enumerate(chain):
        assert hasattr(place, name), f"{trt.__name__} has no {'.'.join(chain[: number + 1])}"
        place = getattr(place, name)


def bindings(version: str, cache: Path) -> Callable[[str], bool]:
    """Whether a name stands in the extension module of TensorRT's bindings, downloaded once and kept in `cache`."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(cache.glob(f"tensorrt_cu13_bindings-{version}.*-{python}-*.whl"))
    if not found:
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", "download"]
        package = f"tensorrt_cu13_bindings=={version}.*"
        done = subprocess.run(
            [*pip, "--no-deps", "-d", str(cache), package], text=True, capture_output=True, timeout=300, check=False
        )
        if done.returncode != 0:
            pytest.fail(
                f"this test needs a package index, and pip failed to download {package}:\n{done.stderr}", pytrace=False
            )
        found = sorted(cache.glob(f"tensorrt_cu13_bindings-{version}.*-{python}-*.whl"))
    with zipfile.ZipFile(found[-1]) as archive:
        data = archive.read("tensorrt_bindings/tensorrt.so")
    words = set(re.findall(rb"(?<![A-Za-z0-9_])[A-Za-z_][A-Za-z0-9_]*(?![A-Za-z0-9_])", data))
    # A linker lets a word that another ends with stand in that: INPUT in ATTENTION_INPUT.
    return lambda name: name.encode() in words or name.encode() + b"\0" in data
