"""Quantized attention compiled by Triton for every supported architecture without a GPU, and its machine code read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (Linux only)")

SHARED = {80: 163, 89: 99, 90: 227, 120: 99}  # KiB that a program may have
# Bytes of stack: on 12.0 the compiler keeps some 100 bytes a thread outside its 255 registers.
STACK = {(120, "int8_fp8", 128): 128}
# Products of Q K^T and of P V in the PTX.
PRODUCTS = {
    ("int8", False): ".s32.s8.s8",
    ("e4m3", False): ".f32.e4m3.e4m3",
    ("bf16", False): ".f32.bf16.bf16",
    ("int8", True): ".s32.s8.s8.s32",
    ("e4m3", True): ".f32.e4m3.e4m3.f32",
    ("bf16", True): ".f32.bf16.bf16.f32",
}
TYPES = {
    "int8_bf16": ("int8", "bf16"),
    "int8_fp8": ("int8", "e4m3"),
    "fp8": ("e4m3", "e4m3"),
    "bf16": ("bf16", "bf16"),
}
HOPPER = {"int8": "IGMMA", "e4m3": "QGMMA", "bf16": "HGMMA"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict]:
    """What triton_aot_attention.py prints, from a process that never saw the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))
    }
    helper = Path(__file__).with_name("triton_aot_attention.py")
    done = subprocess.run(
        [sys.executable, str(helper)],
        env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_attention(line: dict, arch: int) -> None:
    qk, pv = TYPES[line["scheme"]]
    instructions = line["instructions"]
    for kind in {qk, pv}:
        ending = PRODUCTS[kind, arch != 90]
        assert any(product.endswith(ending) for product in line["products"]), line["products"]
        if arch == 90:
            assert instructions.get(HOPPER[kind], 0) > 0, f"no {HOPPER[kind]}"
    if arch == 90:
        assert all(product.startswith("wgmma") for product in line["products"]), line["products"]
    assert line["asynchronous"], "K and V are not loaded ahead"
    # 64 scores a thread: one exponential each, plus the rescaling of two rows and what the epilogue needs
    loops = 2 if line["case"] == "causal" else 1
    assert 64 * loops <= instructions["MUFU"] <= 72 * loops


def check_quantize(line: dict) -> None:
    name = line["kernel"]
    assert not line["fma"], f"{name}: products and sums are contracted"
    assert not line["flushes"], f"{name}: subnormals are flushed or a quotient is approximate"
    if name in ("rows_kernel", "codes_kernel"):
        wide = {"ld.global.v4.b32", "ld.global.L1::evict_first.v4.b32"}
        assert wide & set(line["accesses"]), f"{name}: loads are narrow; {line['accesses']}"
    for conversion in line["e4m3"]:  # over float16 it would round twice
        assert conversion.endswith("e4m3x2.f32"), conversion
    if "fp8" in line["scheme"] and name == "codes_kernel":
        assert line["e4m3"], "e4m3 codes are not made by the hardware"


@pytest.mark.parametrize("arch", SHARED)
def test_kernels_compile_for(arch, lines):
    found = [line for line in lines if line["arch"] == arch]
    kernels = {line["kernel"] for line in found}
    assert "attention_kernel" in kernels
    if arch == 90:
        assert len(kernels) == 7, kernels
    for line in found:
        case = f"{line['kernel']} {line['scheme']} {line['dim']} {line['case']}"
        allowed = STACK.get((arch, line["scheme"], line["dim"]), 0)
        assert line["stack"] <= allowed, f"{case}: spills {line['stack']} bytes"
        assert line["local"] == 0, case
        assert line["registers"] <= 255, case
        assert line["shared"] <= SHARED[arch], f"{case}: {line['shared']} KiB of shared memory"
        if line["kernel"] == "attention_kernel":
            check_attention(line, arch)
        elif line["kernel"] not in ("exact_kernel", "valid_kernel"):
            check_quantize(line)


def test_sums_of_fp8_products_end_with_the_block(lines):
    """Hopper's tensor cores keep 13 bits of a sum: a block's four products of 32 keys start from nothing."""
    checked = 0
    for line in lines:
        if line["arch"] == 90 and line["kernel"] == "attention_kernel" and "fp8" in line["scheme"]:
            assert len(line["starts"]) % 4 == 0
            assert line["starts"][::4] == ["0"] * (len(line["starts"]) // 4)
            checked += len(line["starts"])
    assert checked >= 12
