"""The house keeps its plan: one stem per op in every folder, imports in one direction, stubs that match the module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import rfkernels as rf
from rfkernels._dispatch import BACKENDS, OPS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(rf.__file__).parent
SOURCES = {
    "csrc/cpu": ".cpp",
    "csrc/cuda": ".cu",
    "rfkernels/ops": ".py",
    "rfkernels/backends/reference": ".py",
    "rfkernels/backends/native": ".py",
    "rfkernels/backends/triton": ".py",
}
# (folder, op): why the file may be missing.
REASONS: dict[tuple[str, str], str] = {
    ("csrc/cuda", "attention"): "the Triton kernels serve CUDA; a kernel for sm_90a follows",
}
MEASURED_IN = {"quantize": "attention"}  # op: the benchmark that has its rows
# Rooms from the bottom up; a room imports from those before it and from itself.
ROOMS = ("backends", "ops", "optim", "flow", "sampling", "training", "cli")


def folder(path: str) -> Path:
    """A folder of the checkout; the package's own are looked up where it is installed."""
    return (
        PACKAGE / path.removeprefix("rfkernels/") if path.startswith("rfkernels") else ROOT / path
    )


@pytest.mark.parametrize("path", SOURCES)
def test_every_op_has_its_file(path):
    for op in OPS:
        exists = (folder(path) / f"{op}{SOURCES[path]}").is_file()
        reason = REASONS.get((path, op))
        assert exists or reason, f"{path}/{op}{SOURCES[path]} is missing and no reason is given"
        assert not (exists and reason), f"{path}/{op}{SOURCES[path]} exists: take its reason away"


def test_no_backend_has_an_op_that_is_not_in_the_table():
    shared = {
        "__init__", "precision", "geometry", "launch", "philox", "tiles",
        "exact_attention", "attention_kernels", "quantize_tiles", "quantize_cuda",
    }  # fmt: skip
    for backend in BACKENDS:
        stems = {file.stem for file in (PACKAGE / "backends" / backend).glob("*.py")}
        assert stems - shared == set(OPS), backend


def test_every_op_has_a_test_and_a_benchmark():
    for op in OPS:
        assert (ROOT / "tests/ops" / f"test_{op}.py").is_file()
        assert (ROOT / "benchmarks/ops" / f"{MEASURED_IN.get(op, op)}.py").is_file()


def test_the_table_has_every_cell():
    cells = {(row["op"], row["backend"], row["device"]) for row in rf.backend_table()}
    places = (("native", "cpu"), ("native", "cuda"), ("triton", "cuda"), ("reference", "any"))
    assert cells == {(op, *place) for op in OPS for place in places}
    for row in rf.backend_table():
        assert row["available"] == (row["reason"] == "")
        assert row["available"] or str(row["reason"])[0].islower()


def test_the_stub_lists_the_functions_of_the_module():
    module = pytest.importorskip("rfkernels._C")
    stub = ast.parse((ROOT / "python/bindings/_C.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    declared |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert declared == {name for name in dir(module) if not name.startswith("_")}


# Layers ----------------------------------------------------------------------------------------------------------


def includes(path: str) -> list[tuple[Path, str]]:
    files = [f for f in (ROOT / path).rglob("*") if f.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert files, path
    return [
        (f, line)
        for f in files
        for line in re.findall(r"^\s*#\s*include\s*(.*)$", f.read_text(), re.MULTILINE)
    ]


def test_the_native_core_knows_neither_python_nor_torch():
    for file, line in includes("csrc"):
        assert not re.search(r"Python\.h|pybind11|torch|ATen|c10|numpy", line), (file, line)


def test_the_glue_knows_no_torch_headers():
    for file, line in includes("python"):
        assert not re.search(r"torch|ATen|c10", line), (file, line)


def test_kernels_of_one_level_take_nothing_from_the_standard_library_that_the_linker_could_share():
    # An inline template emitted with AVX-512 may be the copy that the linker keeps for every level.
    for file, line in includes("csrc/cpu"):
        assert re.search(
            r'^"|<(cstdint|cstring|cmath|immintrin\.h|initializer_list|type_traits)>', line
        ), (file, line)


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions; those for type checkers are left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("rfkernels.")}


def test_imports_go_one_way():
    for rank, room in enumerate(ROOMS):
        later = ROOMS[rank + 1 :]
        for file in (PACKAGE / room).rglob("*.py"):
            for name in imports(file):
                assert name.split(".")[1] not in later, (
                    f"{file} imports {name}: {room} comes before it"
                )


def test_nothing_imports_the_command_or_the_integrations():
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0]
        for name in imports(file):
            target = name.split(".")[1]
            if file.name != "__main__.py" and target in {"cli", "integrations"}:
                assert room == target, f"{file} imports {name}"


def test_no_pickle():
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"^\s*(import|from) pickle\b", text, re.MULTILINE), file
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, (file, call)
