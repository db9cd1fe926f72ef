"""The package as it is installed: what an import loads, what a wheel holds, what the type check reaches."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from documents import blocks, run_program
from models import example_bundle

import rmt_trt

ROOMS = ("rmt_trt", "export", "runtime", "calibration", "benchmarks")
COMMANDS = sorted(entry.name for entry in importlib.metadata.distribution("rmt-trt").entry_points)
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "tensorrt", "cuda")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command away from the repository and returns what it wrote; it may fail."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        text=True,
        capture_output=True,
        timeout=1200,
        check=False,
    )


@pytest.fixture(scope="module")
def tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that no build folder is left in the repository."""
    made = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.rmt")
    copy = tmp_path_factory.mktemp("package") / "tree"
    shutil.copytree(root, copy, ignore=made)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """A wheel built from the copy."""
    out = tree.parent / "wheels"
    done = run(*PIP, "wheel", tree, "--no-deps", "--no-build-isolation", "-w", out, cwd=tree.parent)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.parametrize(
    ("statement", "kept_out"),
    [("import rmt_trt", HEAVY), ("from rmt_trt import RMTRuntime", ("torch", "transformers", "onnx"))],
)
def test_an_import_in_a_fresh_process_loads_no_heavy_module(statement, kept_out, tmp_path):
    program = f"import sys\n{statement}\nprint([name for name in {kept_out!r} if name in sys.modules])"
    done = run(sys.executable, "-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


def test_every_public_name_is_there():
    assert [name for name in rmt_trt.__all__ if not hasattr(rmt_trt, name)] == []


def test_the_installed_version_is_the_modules_own():
    assert importlib.metadata.version("rmt-trt") == rmt_trt.__version__


@pytest.mark.parametrize("command", COMMANDS)
def test_a_console_command_explains_itself(command, tmp_path):
    done = run(Path(sysconfig.get_path("scripts")) / command, "--help", cwd=tmp_path)
    assert (done.returncode, "Usage" in done.stdout) == (0, True), done.stdout + done.stderr


def test_a_wheel_has_one_top_level_name_and_every_module(wheel, tree):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"rmt_trt", f"rmt_trt-{rmt_trt.__version__}.dist-info"}
    sources = [path.relative_to(tree) for room in ROOMS for path in (tree / room).rglob("*.py")]
    wanted = {(Path() if path.parts[0] == "rmt_trt" else Path("rmt_trt")) / path for path in sources}
    assert {path.as_posix() for path in wanted} == {name for name in names if name.endswith(".py")}
    assert "rmt_trt/py.typed" in names


def test_a_wheel_holds_the_operators_where_there_is_a_compiler(wheel):
    if shutil.which("gcc") or shutil.which("cc"):
        with zipfile.ZipFile(wheel) as archive:
            assert "rmt_trt/runtime/_native.abi3.so" in archive.namelist()
    assert "-cp311-abi3-" in wheel.name  # one for every Python from 3.11 on


def test_without_a_compiler_the_package_is_whole_but_for_the_operators(wheel, tree, tmp_path):
    bare = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "*.so"))
    done = run(
        *PIP, "wheel", bare, "--no-deps", "--no-build-isolation", "-w", tmp_path, cwd=tmp_path, CC="/nonexistent"
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as with_it, zipfile.ZipFile(built) as without:
        assert set(without.namelist()) == set(with_it.namelist()) - {"rmt_trt/runtime/_native.abi3.so"}


def test_a_source_distribution_holds_the_operators_sources(tree, root, tmp_path):
    bare = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build"))
    build = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
    done = run(sys.executable, "-c", build, tmp_path / "made", cwd=bare)
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "made").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    assert {str(path.relative_to(root)) for path in (root / "native").rglob("*") if path.is_file()} <= names


@pytest.mark.slow
def test_a_wheel_with_its_cpu_extra_runs_a_bundle_without_torch(wheel, root, tmp_path):
    bundle = shutil.copytree(example_bundle(), tmp_path / "memorize.rmt")
    home = tmp_path / "clean"
    venv.create(home)
    installed = run(
        *PIP, "--python", home / "bin/python", "install", "--no-compile", "-c", root / "constraints.txt",
        f"rmt-trt[cpu] @ {wheel.as_uri()}", cwd=tmp_path,
    )  # fmt: skip
    assert installed.returncode == 0, f"pip needs a package index for this test and failed:\n{installed.stderr}"

    for arguments in ("--help", bundle):
        shown = run(home / "bin/rmt-info", arguments, cwd=tmp_path)
        assert shown.returncode == 0, shown.stdout + shown.stderr
    readme = blocks((root / "README.md").read_text(encoding="utf-8"))
    snippet = next(block.text for block in readme if block.language == "python" and block.not_run is None)
    done = run_program(snippet, tmp_path, home / "bin/python")
    assert done.returncode == 0, done.stdout + done.stderr
    absent = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx') if u.find_spec(n)])"
    assert run(home / "bin/python", "-c", absent, cwd=tmp_path).stdout.strip() == "[]"


@pytest.mark.slow
def test_the_type_check_reaches_the_mapped_folders_and_finds_nothing_else(root, tree):
    """Of a tree with one error sown into each room, `make types` reports these and no other."""
    sown = tree.parent / "sown"
    shutil.copytree(tree, sown)
    modules = [sorted((sown / room).rglob("*.py"))[-1] for room in ROOMS]
    for module in modules:
        module.write_text(module.read_text(encoding="utf-8") + "\nsown_error\n", encoding="utf-8")

    # The environment that runs this test, seen from a new one, so that only the package itself is installed anew.
    home = sown / ".venv"
    venv.create(home)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    (home / "installed").touch()
    done = run("make", "types", cwd=sown)

    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    others = [line for line in errors if '"sown_error" is not defined' not in line]
    assert others == [], "\n".join(others)
    paths = [module.relative_to(sown) for module in modules]
    wanted = [path if path.parts[0] == "rmt_trt" else Path("rmt_trt") / path for path in paths]
    found = [Path("rmt_trt") / line.split(":")[0].split("/rmt_trt/", 1)[1] for line in errors]
    assert sorted(found) == sorted(wanted), done.stdout + done.stderr
    assert done.returncode != 0
