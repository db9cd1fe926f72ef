"""Packaging of rmt-trt: the folders at the top of the repository are the rooms of one package, `rmt_trt`."""

import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "rmt_trt/__init__.py").read_text(encoding="utf-8"), re.M)

# Rooms that lie at the top level, by the import name they are mapped to. Nothing named `runtime` or `export`
# is ever installed on its own.
ROOMS = {
    "rmt_trt": "rmt_trt",
    "rmt_trt.model": "rmt_trt/model",
    "rmt_trt.training": "rmt_trt/training",
    "rmt_trt.training.tasks": "rmt_trt/training/tasks",
    "rmt_trt.evaluation": "rmt_trt/evaluation",
    "rmt_trt.analysis": "rmt_trt/analysis",
    "rmt_trt.commands": "rmt_trt/commands",
    "rmt_trt.export": "export",
    "rmt_trt.export.fused": "export/fused",
    "rmt_trt.export.tensorrt": "export/tensorrt",
    "rmt_trt.runtime": "runtime",
    "rmt_trt.runtime.engines": "runtime/engines",
    "rmt_trt.calibration": "calibration",
    "rmt_trt.benchmarks": "benchmarks",
}

# Ranges only: a user may have any recent torch. Exact versions that are tested together stand in constraints.txt.
TEXT = ["tokenizers>=0.20"]
MODEL = ["torch>=2.9", "transformers>=5.0", *TEXT]
# cuda-core does not bring the bindings that it cannot be imported without: theirs is the choice of a CUDA.
CUDA = ["cuda-core>=1.0", "cuda-bindings>=12.9"]
# ONNX Runtime below 1.24.4 reads external data outside a graph's folder.
EXTRAS = {
    "text": TEXT,
    "export": [*MODEL, "onnx>=1.19", "onnxscript>=0.6", "onnxruntime>=1.24.4"],
    "cpu": ["onnxruntime>=1.24.4", *TEXT],
    # The oldest version that was run.
    "gpu": ["onnxruntime-gpu>=1.31.1", *CUDA, *TEXT],
    "tensorrt": ["tensorrt>=10.14", *CUDA, *TEXT],
    "tensorrt-lean": ["tensorrt-lean-cu13>=10.14", *CUDA, *TEXT],
    "tensorrt-rtx": ["tensorrt-rtx>=1.4", *CUDA, *TEXT],
    "train": [*MODEL, "accelerate>=1.0", "peft>=0.14", "matplotlib>=3.8"],
    "analyze": [*MODEL, "matplotlib>=3.8"],
    # Beside the extra of the engine that is measured: the GPU's and the CPU's ONNX Runtime exclude each other.
    "bench": [*MODEL, "onnx>=1.19", "onnxscript>=0.6", "matplotlib>=3.8", "nvidia-ml-py>=12"],
}
EXTRAS["dev"] = [
    *EXTRAS["export"],
    *EXTRAS["bench"],
    *EXTRAS["train"],
    "hypothesis>=6.100",
    "pytest>=8.3",
    "pytest-xdist>=3.8",
    "psutil>=5.9",
    "ruff>=0.9",
    "mypy>=1.14",
    "setuptools>=77",
    "tensorrt-rtx>=1.4",  # builds engines without a GPU; the tests run none
    "tensorrt-lean-cu13>=11.4",  # its names are compared with those that the code uses; it is never started
]


# Sources in CUDA C++ of native/, by the string that holds them.
KERNELS = {
    "kernels": ["kernels.cu"],
    "hopper": [f"sm90/{part}.cu" for part in ("common", "product", "attention", "rows")],
}


class BuildNative(build_ext):
    """Puts the sources of the GPU kernels into C strings first: NVRTC compiles them where they are used.

    Where nothing can be compiled, that is said in a line, and the package is whole without the library."""

    def build_extension(self, ext: Extension) -> None:
        made = Path(self.build_temp)
        made.mkdir(parents=True, exist_ok=True)
        for name, parts in KERNELS.items():
            lines = "".join((HERE / "native" / part).read_text(encoding="ascii") for part in parts).splitlines()
            quoted = ['"' + line.replace("\\", "\\\\").replace('"', '\\"') + '\\n"' for line in lines]
            declared = f"static const char {name.upper()}[] ="
            (made / f"{name}.h").write_text("\n".join([declared, *quoted, ";", ""]), encoding="ascii")
        ext.include_dirs = [*ext.include_dirs, str(made)]
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as err:
            print(f"rmt-trt is installed without its own products for NVIDIA GPUs, which take a C compiler ({err})")


# A plain shared library that ONNX Runtime loads, and no module of Python's. Without a C compiler all else works.
NATIVE = Extension(
    "rmt_trt.runtime._native",
    sources=[
        f"native/{name}.c"
        for name in ("ops", "signatures", "attributes", "gpu", "products", "hopper", "compile", "libraries", "host")
    ],
    depends=[
        *(f"native/{name}.h" for name in ("cuda", "gpu", "host", "lane", "node", "ort")),
        *(f"native/{part}" for parts in KERNELS.values() for part in parts),
    ],
    extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden"],
    libraries=["m", "dl", "pthread"],
    py_limited_api=True,  # it uses nothing of Python: one file for every version
    optional=True,
)

COMMANDS = ["export", "build", "run", "info", "verify", "train", "eval", "analyze", "calibrate", "flops", "bench"]

setup(
    name="rmt-trt",
    version=VERSION[1],
    description="From a trained Recurrent Memory Transformer to production: export the segment step, run any length.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list(ROOMS),
    package_dir=ROOMS,
    package_data={"rmt_trt": ["py.typed"]},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for this Python and every later one
    install_requires=["numpy>=1.26", "safetensors>=0.4.3", "typer>=0.15", "rich>=13.7", "filelock>=3.12"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": [f"rmt-{name} = rmt_trt.commands.{name}:main" for name in COMMANDS]},
    classifiers=[
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
