"""What is installed: no torch inside the extension, few libraries, one OpenMP, versions that agree, quick imports."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import rfkernels as rf
from rfkernels.ops.projected_update import projected_update

_C = pytest.importorskip("rfkernels._C", reason="the extension is not built here")
ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF and /proc are Linux's")
ALLOWED = re.compile(
    r"^(libgomp|libstdc\+\+|libgcc_s|libm|libc|libpthread|libdl|librt|ld-linux[\w-]*)\.so(\.\d+)*$"
)


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in an interpreter of its own that imports the same package, whatever folder the tests run from."""
    path = os.pathsep.join(p for p in sys.path if p and "tests" not in Path(p).parts)
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=variables,
        check=False,
        cwd=tempfile.gettempdir(),
    )


def output(code: str, **environment: str) -> str:
    run = python(code, **environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@LINUX
def test_the_extension_has_no_symbol_of_torch():
    for line in tool("nm", "-D", _C.__file__).splitlines():
        symbol = line.split()[-1]  # after an address, which may read ...c10
        assert not re.search(r"torch|c10|at_?en|3c10|2at", symbol, re.IGNORECASE), line


@LINUX
def test_the_extension_needs_few_libraries():
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d", _C.__file__))
    assert needed
    for library in needed:
        assert ALLOWED.match(library), f"{library} is not on the list of allowed libraries"


@LINUX
def test_the_extension_exports_its_init_function_alone():
    exported = re.findall(r" [TWVBD] (\S+)", tool("nm", "-D", "--defined-only", _C.__file__))
    # _ZTI, _ZTS: type names of function pointers that the C++ runtime shares by design.
    ours = [
        name for name in exported if not name.startswith(("rfk_", "_ZTI", "_ZTS", "_init", "_fini"))
    ]
    assert ours == ["PyInit__C"]


@LINUX
def test_one_openmp_runtime_in_the_process():
    code = (
        "import re, torch, rfkernels as rf\n"
        "torch.randn(200000).add_(1); rf.randn(200000, seed=1)\n"
        "text = open('/proc/self/maps').read()\n"
        "print(*sorted(set(re.findall(r'/\\S*(?:libgomp|libomp|libiomp)\\S*', text))))"
    )
    assert len(output(code).split()) == 1


def test_torch_governs_the_threads():
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert _C.max_threads() == (count if _C.has_openmp() else 1)
    finally:
        torch.set_num_threads(before)


def test_the_extension_imports_without_torch():
    code = (
        "import importlib.util, sys\n"
        "sys.modules['torch'] = None\n"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.isa_detected(), module.philox4x32((0, 0, 0, 0), (0, 0)))"
    )
    assert output(code) == f"{_C.isa_detected()} {(0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)}"


def test_import_without_triton():
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'triton' else real(name, package)\n"
        "import torch, rfkernels as rf\n"
        "print(rf.available_backends('ode_step'), float(rf.euler_step(torch.ones(1), torch.ones(1), 0.5)))\n"
        "try:\n"
        "    with rf.use_backend('triton'):\n"
        "        rf.euler_step(torch.ones(1), torch.ones(1), 0.5)\n"
        "except rf.BackendUnavailableError as error:\n"
        "    print(error)\n"
    )
    first, second = output(code).splitlines()
    assert first == "('native', 'reference') 1.5"
    assert "the package triton is not installed; `pip install triton`" in second


def test_import_stays_light():
    code = (
        "import torch, time, sys; before = set(sys.modules); start = time.perf_counter()\n"
        "import rfkernels\n"
        "print(time.perf_counter() - start)\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    seconds, modules = output(code).splitlines()
    assert float(seconds) < 2.0  # 0.05 s on an idle machine
    for heavy in (
        "triton",
        "typer",
        "rich",
        "scipy",
        "matplotlib",
        "sklearn",
        "diffusers",
        "safetensors",
    ):
        assert heavy not in modules.split(), f"`import rfkernels` brings {heavy}"


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "amx"])
def test_the_environment_caps_the_instruction_set(level):
    levels = ["baseline", "avx2", "avx512", "amx"]
    code = "import rfkernels as rf; from rfkernels import _C; rf.randn(9, seed=0); print(_C.isa_used(), _C.launch_counts())"
    used, counts = output(code, RFK_MAX_ISA=level).split(" ", 1)
    assert levels.index(used) == min(levels.index(level), levels.index(_C.isa_detected()))
    served = "avx512" if used == "amx" else used  # only attention has kernels for the tile unit
    assert eval(counts, {"__builtins__": {}})[("random", served)] == 1  # a printed dict of ints


def test_an_unknown_instruction_set_is_refused():
    run = python("import rfkernels", RFK_MAX_ISA="avx10")
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert (
        last
        == "ValueError: RFK_MAX_ISA: the value must be one of baseline, avx2, avx512, amx; got 'avx10'"
    )
    with pytest.raises(
        ValueError, match="isa level must be one of baseline, avx2, avx512, amx; got 'sse'"
    ):
        _C.cap_isa("sse")


def sgdp_step(x: torch.Tensor) -> torch.Tensor:
    weight, momentum = x.clone(), torch.zeros_like(x)
    projected_update([weight], [x], [momentum], rule="sgdp", lr=0.1)
    return weight


@pytest.mark.parametrize(
    "row", rf.backend_table(), ids=lambda r: f"{r['op']}-{r['backend']}-{r['device']}"
)
def test_the_table_of_doctor_is_true(row):
    device = "cpu" if row["device"] == "any" else row["device"]
    if device == "cuda" and not torch.cuda.is_available():
        assert not row["available"]
        assert row["reason"]
        return
    x = torch.ones(3, 5, device=device)
    heads = torch.ones(3, 2, 4, 16, device=device)
    calls = {
        "ode_step": lambda: rf.euler_step(x, x, 0.5),
        "interpolate": lambda: rf.interpolate(x, 0.5, seed=1).xt,
        "flow_loss": lambda: rf.flow_loss(x, x, reduction="none"),
        "random": lambda: rf.randn(3, 5, seed=1, device=device),
        "quantize": lambda: rf.quantize(heads, heads, precision="int8_bf16"),
        "attention": lambda: rf.attention(heads, heads, heads, precision="int8_bf16"),
        "projected_update": lambda: sgdp_step(x),
    }
    with rf.use_backend(row["backend"]):
        if row["available"]:
            assert calls[row["op"]]().shape[0] == 3
        else:
            with pytest.raises(rf.BackendUnavailableError, match=re.escape(row["reason"])):
                calls[row["op"]]()


def test_an_unavailable_backend_gives_its_reason():
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, rfkernels as rf\n"
        "with rf.use_backend('triton'):\n"
        "    rf.randn(3, seed=0)\n"
    )
    run = python(code)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "rfkernels._errors.BackendUnavailableError: random: backend 'triton' cannot serve tensors on cpu: "
    )
    assert "TRITON_INTERPRET=1" in last or "pip install triton" in last


def test_doctor_prints_the_table():
    run = subprocess.run(
        [sys.executable, "-m", "rfkernels", "doctor", "--json"], capture_output=True, text=True, check=True,
        cwd=tempfile.gettempdir(), env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    report = json.loads(run.stdout)
    assert [r["op"] for r in report["backends"]] == [r["op"] for r in rf.backend_table()]
    assert report["versions"]["rfkernels"] == rf.__version__
    assert report["cpu"]["ISA detected"] == _C.isa_detected()


def test_versions_agree():
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab.]\w+)*", rf.__version__)
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    source = re.search(r'^input = "(.*)"', project, re.MULTILINE)[1]
    written = re.search(r'__version__ = "(.*)"', (ROOT / source).read_text())
    assert written is not None
    assert written[1] == rf.__version__
    try:
        assert importlib.metadata.version("rfkernels") == rf.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("rfkernels runs from a checkout, no package metadata is installed")


def test_calls_without_the_dlpack_exchange_table():
    x, v, dt, seeds = (
        torch.randn(3, 40).T,
        torch.randn(40, 3).bfloat16(),
        torch.rand(40),
        torch.arange(40),
    )
    expected = None
    try:
        for enabled in (True, False):
            _C.use_exchange_api(enabled)
            assert enabled or not _C.exchange_api_in_use()
            leaf = x.clone().requires_grad_()
            loss = rf.flow_loss(leaf, v.float(), weight=dt)
            loss.backward()
            found = [
                rf.euler_step(x, v, dt),
                rf.euler_step(x, v, 0.5, out=torch.empty_like(x)),
                *rf.taylor_step(x, (v, v), torch.tensor(0.5), cast=torch.float16),
                rf.linear_step(
                    x, (v,), (dt,), noise_scale=dt[::1], seed=seeds, offset=torch.tensor(3)
                ),
                *rf.interpolate(x, dt, seed=seeds, return_x0=True, path="vp"),
                rf.randn(0, 3, seed=1),
                loss.detach(),
                leaf.grad,
            ]
            expected = expected or found
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)
    finally:
        _C.use_exchange_api(True)
