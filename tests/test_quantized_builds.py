"""INT8 and FP8 for TensorRT: real builds of quantized graphs without a GPU, what each kind of GPU has, what is refused."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
from models import made
from quantized import STATIC, ranges_of, written
from stand_in import host_gpu
from tensorrt_builds import ADA, RTX, contents, copy_of

from rmt_trt import ContractError, EngineError, FormatError, RMTRuntime
from rmt_trt.bundle import Bundle
from rmt_trt.calibration import add_static, add_without_data
from rmt_trt.commands import build as command
from rmt_trt.commands.report import engine_record, record_lines
from rmt_trt.engine_check import read_record
from rmt_trt.export import EngineOptions
from rmt_trt.export.tensorrt import BuildOptions, add_engines, builder, check_build, engines
from rmt_trt.export.tensorrt.products import PRODUCTS, check_products
from rmt_trt.runtime.engine_files import refusal
from rmt_trt.runtime.engines import cuda
from rmt_trt.runtime.source import open_source

FEW = EngineOptions(segments=3)
HALVES = {"int8": "int8 in float16", "fp8": "fp8 in float16"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with INT8 and FP8 graphs for TensorRT-RTX, one product of the INT8 graph kept; nobody may change it."""
    path = copy_of(made("bert").bundle, tmp_path_factory.mktemp("quantized"))
    ranges = ranges_of("bert")
    node = made_products(path)[0]
    add_static(path, ranges, "tensorrt-rtx", "int8", keep={node}, options=FEW)
    add_static(path, ranges, "tensorrt-rtx", "fp8", options=FEW)
    return path


def made_products(path: Path) -> list[str]:
    from rmt_trt.calibration.step_graph import read_step

    return [product.node for product in read_step(Bundle(path))[1]]


def built(name: str, kind: str, capabilities: tuple[int, ...], folder: Path) -> bytes:
    """An engine of one graph of the catalogue, without a bundle."""
    written(name, kind, folder / "g.onnx")
    options = dataclasses.replace(ADA, compute_capabilities=capabilities)
    return bytes(builder.build_plan(folder / "g.onnx", made(name).spec, RTX, options).data)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_products_of_an_engine_are_those_of_its_dtype(name: str, tmp_path: Path) -> None:
    """By the types in the list of kernels that TensorRT-RTX writes into an engine as text."""
    found = {}
    for dtype, kind in HALVES.items():
        data = built(name, kind, (89,) if dtype == "int8" else (120,), tmp_path)
        found[dtype] = {word: len(re.findall(rb"\b%s\b" % word.encode(), data)) for word in ("int8", "fp8_e4m3")}
    assert found["fp8"]["fp8_e4m3"] > found["int8"]["fp8_e4m3"] == 0
    assert found["int8"]["int8"] > found["fp8"]["int8"]


@pytest.mark.parametrize("capability", [75, 80, 86, 121])
def test_int8_builds_for_every_kind_of_gpu_that_tensorrt_rtx_knows(capability: int, tmp_path: Path) -> None:
    assert "int8" in PRODUCTS[capability]
    assert built("bert", "int8 in float16", (capability,), tmp_path)


def test_the_table_is_right_about_what_the_builder_refuses(tmp_path: Path) -> None:
    """FP8 below 8.9, and float32 products for 7.5: if a later release builds them, the table is to be changed."""
    for kind, capability, words in (("fp8 in float16", 80, "fp8_e4m3"), ("int8", 75, "FP32 GEMM is not supported")):
        with pytest.raises(EngineError, match=words):
            built("bert", kind, (capability,), tmp_path)
    assert "fp8" not in PRODUCTS[80]


def test_engines_of_quantized_graphs_are_added_and_taken_only_where_they_are_asked_for(
    quantized: Path, tmp_path: Path
) -> None:
    path = copy_of(quantized, tmp_path)
    both = dataclasses.replace(ADA, compute_capabilities=(89, 120))
    made_here = add_engines(path, "tensorrt-rtx", ("int8", "fp8"), both)
    assert [one.record.dtype for one in made_here] == ["int8", "fp8"]
    for one in made_here:
        record = read_record(Bundle(path).file(one.file.replace(".engine", ".json")), Bundle(path).spec)
        assert record == one.record
        assert record.graph["file"] == f"graphs/tensorrt-rtx-{record.dtype}-step-all.onnx"
        known = engine_record(Bundle(path).manifest, "tensorrt-rtx", record.dtype)
        assert known["unverified"] == engines.UNVERIFIED
        assert known["verified_on"] == "cpu"
        assert known["verification"]["passed"]
        assert known["quantization"]["rest"] == "fp16"
        assert "that was engine cpu; not on its own" in "".join(record_lines("tensorrt-rtx", record.dtype, known))
    assert engine_record(Bundle(path).manifest, "tensorrt-rtx", "int8")["quantization"]["kept"]
    told = refusal(open_source(path), "tensorrt-rtx", None, 0) or ""
    assert told.startswith("its engine files compute in fp8, int8, which has to be asked for")
    asked = refusal(open_source(path), "tensorrt-rtx", "int8", 0) or ""
    assert asked.startswith("tensorrt-rtx-int8-all-sm89-sm120-b8.engine: ")
    with RMTRuntime(path, threads=1) as runtime:
        assert (runtime.engine, runtime.dtype) == ("cpu", "fp32")


@pytest.mark.parametrize(
    ("capabilities", "dtype", "message"),
    [
        ((80,), "fp8", r"compute capability 8\.0 has no fp8 products; 8\.9, 9\.0, .*12\.1 have\. Build fp8 for those, or for 8\.0 with --dtype int8 or fp16"),
        ((75, 89), "fp8", r"compute capability 7\.5 has no fp8 products"),
        ((80, 86), "fp8", r"compute capability 8\.0, 8\.6 has no fp8 products"),
    ],
)  # fmt: skip
def test_a_gpu_without_such_products_is_refused_before_a_build(
    capabilities: tuple[int, ...], dtype: str, message: str, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmt_trt.export.tensorrt.engines.build_plan", lambda *_: pytest.fail("something was built"))
    before = contents(quantized)
    with pytest.raises(ContractError, match=message):
        add_engines(quantized, "tensorrt-rtx", ("int8", dtype), BuildOptions(capabilities))
    assert contents(quantized) == before
    with pytest.raises(ContractError, match=message):  # nor does a bundle without a graph hide it
        check_build("tensorrt-rtx", (dtype,), BuildOptions(capabilities), Bundle(made("bert").bundle))


def test_the_gpu_that_is_here_is_looked_at_where_none_is_named(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.flavours, "capabilities", lambda *_: (86,))
    with pytest.raises(ContractError, match=r"compute capability 8\.6 has no fp8 products"):
        add_engines(quantized, "tensorrt-rtx", ("fp8",), BuildOptions())


def test_a_kind_of_gpu_that_is_not_known_yet_is_left_to_the_builder() -> None:
    check_products("tensorrt", ("int8", "fp8"), (130,), None)
    with pytest.raises(ContractError, match=r"6\.0 has no int8 products.* with --dtype fp16$"):
        check_products("tensorrt", ("int8",), (60,), None)


def test_float32_beside_the_8_bits_is_refused_for_7_5_before_a_build(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of(quantized, tmp_path)
    add_static(path, ranges_of("bert"), "tensorrt-rtx", "int8", options=FEW, half=False)
    assert STATIC["int8"].half is False
    monkeypatch.setattr("rmt_trt.export.tensorrt.engines.build_plan", lambda *_: pytest.fail("something was built"))
    with pytest.raises(ContractError, match=r"no float32 products for compute capability 7\.5, and the int8 graph of"):
        add_engines(path, "tensorrt-rtx", ("int8",), BuildOptions((75,)))


def test_float16_beside_the_8_bits_is_not_for_the_cpu(quantized: Path) -> None:
    with pytest.raises(ContractError, match="half is for the engines of a GPU"):
        add_static(quantized, ranges_of("bert"), "cpu", "int8", half=True)


@pytest.mark.parametrize("dtype", ["int8-dynamic", "int8-weights", "int4-weights"])
def test_engines_are_not_built_in_dtypes_for_onnx_runtime(dtype: str, quantized: Path) -> None:
    with pytest.raises(ContractError, match=f"dtype is '{dtype}'; expected one of fp32, fp16, bf16, int8, fp8$"):
        add_engines(quantized, dtypes=(dtype,), options=ADA)
    told = refusal(open_source(quantized), "tensorrt-rtx", dtype, 0)
    assert told == f"engines are built in fp32, fp16, bf16, int8, fp8, not in {dtype}"


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            "tensorrt-rtx",
            "First add a graph to build it from: rmt-calibrate .*bert.rmt --engine tensorrt-rtx --dtype fp8",
        ),
        ("cuda", r"the bundle has no graphs for CUDA in fp8 .* Add them: rmt-calibrate .* --engine cuda --dtype fp8"),
    ],
)
def test_an_engine_without_a_quantized_graph_says_how_to_add_one(engine: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        RMTRuntime(made("bert").bundle, engine=engine, dtype="fp8")


def test_int8_is_not_made_for_cuda_and_not_advised_there() -> None:
    bundle = made("bert").bundle
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(ContractError, match=r"for 'cuda' there are fp8, .* no INT8 products .* tensorrt, tensorrt-rtx"):
        add_static(bundle, ranges_of("bert"), "cuda", "int8")
    with pytest.raises(EngineError, match="no INT8 products") as told:
        RMTRuntime(bundle, engine="cuda", dtype="int8")
    assert "rmt-calibrate" not in str(told.value)
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("dtype", ["fp8", "int8-weights"])
def test_a_graph_that_the_gpu_refuses_leaves_the_bundle_as_it_was(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of(made("bert").bundle, tmp_path)
    before = contents(path)

    def refused(graph: Path, gpu: object, ours: bool, sizes: object) -> None:
        raise EngineError(f"ONNX Runtime cannot run {graph.name}: nodes are assigned to the default CPU EP")

    def add() -> None:
        if dtype == "fp8":  # emulated, as what stays float is float32
            add_static(path, ranges_of("bert"), "cuda", dtype, options=FEW, half=False)
        else:
            add_without_data(path, "cuda", dtype, options=FEW)

    with host_gpu():
        monkeypatch.setattr(cuda, "open_session", refused)
        with pytest.raises(EngineError, match=f"cannot run cuda-{dtype}-step-all.onnx: nodes are assigned"):
            add()
    assert contents(path) == before
    assert list(path.parent.iterdir()) == [path]


USAGE: dict[str, tuple[list[str], str]] = {
    "capability": (["--dtype", "fp8", "--compute-capability", "80"], "compute capability 8.0 has no fp8 products; 8.9, 9.0"),
    "dtype": (["--dtype", "int8-weights", "--compute-capability", "89"], "dtype is 'int8-weights'; expected one of fp32"),
    "no graph": (["--dtype", "int8", "--compute-capability", "89"], "Add one with rmt-calibrate"),
}  # fmt: skip


@pytest.mark.parametrize("name", USAGE)
def test_the_command_says_it_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, message = USAGE[name]
    monkeypatch.setattr(sys, "argv", ["rmt-build", str(made("bert").bundle), *given])
    with pytest.raises(SystemExit) as ended:
        command.main()
    err = capsys.readouterr().err.strip()
    assert ended.value.code == 1
    assert message in err
    assert "\n" not in err


def test_a_new_bundle_cannot_be_built_quantized() -> None:
    with pytest.raises(FormatError, match=r"a new bundle lists no fp8 graph .* Add one with rmt-calibrate NAME.rmt"):
        check_build("tensorrt-rtx", ("fp16", "fp8"), ADA, None)
