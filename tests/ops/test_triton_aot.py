"""Triton kernels compiled for every supported architecture without a GPU: no spills, 16-byte accesses, no contraction."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (Linux only)")

VECTORS = {
    "euler float32": ("ld.global.v4.b32", "st.global.v4.b32"),
    "euler float64": ("ld.global.v2.b64", "st.global.v2.b64"),
    "euler float32 state, bfloat16 velocity and copy": (
        "ld.global.v4.b32",
        "ld.global.v2.b32",
        "st.global.v4.b32",
    ),
    "guided bfloat16": ("ld.global.v4.b32", "st.global.v4.b32"),
    "guided float16": ("ld.global.v4.b32", "st.global.v4.b32"),
    "taylor 3 float32": ("ld.global.v4.b32", "st.global.v4.b32"),
    "linear 8 bfloat16": ("ld.global.v4.b32", "st.global.v4.b32"),
    "linear 2 noise float32": ("ld.global.v4.b32", "st.global.v4.b32"),
    "interpolate linear float32": ("ld.global.v4.b32", "st.global.v4.b32"),
    "interpolate linear given float16": ("ld.global.v4.b32", "st.global.v4.b32"),
    "loss mse short float32": ("ld.global.v4.b32", "st.global.v4.b32"),
    "normal float32": ("st.global.v4.b32",),
    "adamp float32": ("ld.global.v4.b32", "st.global.v4.b32"),
    "adamp bfloat16 with a float32 average": ("ld.global.v4.b32", "st.global.v4.b32"),
    "sgdp float32": ("ld.global.v4.b32", "st.global.v4.b32"),
    "sliced": ("ld.global.v4.b32", "st.global.v4.b32"),
    "wide noise": ("ld.global.v4.b32", "st.global.v4.b32"),
    "ragged": ("ld.global.v4.b32", "st.global.v4.b32"),
}
FLOAT32_NOISE = ("linear 2 noise float32", "interpolate linear float32", "normal float32")


def compile_for(arch: int, cases: str, cache: Path) -> list[dict]:
    """The lines of triton_aot.py, from a process that never saw the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(cache)
    }
    helper = Path(__file__).with_name("triton_aot.py")
    command = [sys.executable, str(helper), str(arch), cases]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(lines: list[dict]) -> None:
    for line in lines:
        case = line["case"]
        assert line["stack"] == line["local"] == 0, (
            f"{case}: {line['kernel']} spills to local memory"
        )
        assert {"LDL", "STL"}.isdisjoint(line["instructions"]), (
            f"{case}: {line['kernel']} uses local memory"
        )
        vectors = () if line["kernel"] == "decide_kernel" else VECTORS.get(case, ())
        for access in vectors:
            assert access in line["accesses"], (
                f"{case}: {line['kernel']} has no {access}; {line['accesses']}"
            )
        if (
            case in FLOAT32_NOISE
        ):  # the quads lie as the loads do: no exchange through shared memory
            assert not any("shared" in access for access in line["accesses"]), case
        if "vp" not in case:  # the exponential of the vp paths is the maths library's
            assert not line["fma"], f"{case}: products and sums are contracted"
            assert not line["flushes"], (
                f"{case}: subnormals are flushed or a quotient is approximate"
            )
        if line["kernel"] == "step_kernel" and "noise" not in case:
            assert {"FFMA", "DFMA"}.isdisjoint(line["instructions"]), (
                f"{case}: ptxas contracted products and sums"
            )


@pytest.mark.parametrize("arch", [80, 100, 120])
def test_main_kernels_compile_for(arch, tmp_path):
    lines = compile_for(arch, "core", tmp_path)
    assert len(lines) >= 7
    check(lines)


def test_every_variant_compiles_for_sm_90(tmp_path):
    *lines, values = compile_for(90, "all", tmp_path)
    assert values == {"case": "values", "kernels": 1}, (
        "a step size or a seed compiled a kernel of its own"
    )
    assert len(lines) >= 30
    check(lines)
    normal = next(line["instructions"] for line in lines if line["case"] == "normal float32")
    # Eight normals a thread, two quads: 568 instructions in all, 40 of them the wide multiplies of Philox.
    assert sum(normal.values()) <= 800
