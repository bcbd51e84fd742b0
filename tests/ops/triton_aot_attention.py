"""Compile the kernels of quantized attention ahead of time, without a GPU, and print what came out as JSON lines.

In a process of its own; see ``triton_aot.py``, whose stand-in for a device it uses. To the fields of that program a line
adds the architecture, the scheme, the shared memory in KiB, the kinds of matrix products, and of e4m3 P V on Hopper which
products start from nothing (0) rather than from the sum so far.
"""

from __future__ import annotations

import json
import re

import torch
import triton
import triton_aot as aot
from triton.runtime import driver

from rfkernels.backends import triton as package
from rfkernels.backends.triton import attention

ALL = (
    "rows_kernel",
    "sums_kernel",
    "finish_kernel",
    "codes_kernel",
    "attention_kernel",
    "exact_kernel",
)
# arch -> cases: name, scheme, head size, keywords, kernels.
CASES = {
    80: [
        ("plain", "int8_bf16", 64, {}, ("rows_kernel", "codes_kernel", "attention_kernel")),
        ("plain", "int8_bf16", 128, {}, ("attention_kernel",)),
    ],
    89: [("plain", "int8_fp8", 64, {}, ("attention_kernel",))],
    90: [
        ("plain", "int8_fp8", 128, {}, ALL),
        ("plain", "int8_bf16", 64, {}, ("attention_kernel",)),
        ("causal", "int8_bf16", 128, {"causal": True}, ("attention_kernel",)),
        ("plain", "fp8", 64, {}, ("rows_kernel", "attention_kernel")),
        ("plain", "bf16", 128, {}, ("attention_kernel",)),
        ("mask, lse", "int8_fp8", 64, {"mask": True}, ("valid_kernel", "attention_kernel")),
    ],
    120: [("plain", "int8_fp8", 128, {}, ("attention_kernel",))],
}
BATCH, HEADS, LENGTH = 1, 4, 1024


class Device(aot.NoDevice):
    """One index per architecture: kernels are kept by it."""

    def get_current_device(self) -> int:
        return self.arch


def call(scheme: str, dim: int, causal: bool = False, mask: bool = False) -> None:
    q, out = (aot.new(BATCH, HEADS, LENGTH, dim, dtype=aot.BF16) for _ in range(2))
    k, v = (aot.new(BATCH, HEADS // 2, LENGTH, dim, dtype=aot.BF16) for _ in range(2))
    lse = aot.new(BATCH, HEADS, LENGTH) if mask else None
    shape = (BATCH, HEADS, LENGTH, LENGTH)
    closed = torch.ones((1, 1, LENGTH, LENGTH), dtype=torch.bool).expand(shape) if mask else None
    attention.attention(q, k, v, None, closed, causal, 0.125, scheme, out, lse)


class Skipped:
    """Stands for a kernel that a case leaves out."""


def only(wanted: tuple[str, ...], compiling):
    def run(self, *args, grid, warmup, **kwargs):
        if self.fn.__name__ not in wanted:
            return Skipped
        return compiling(self, *args, grid=grid, warmup=warmup, **kwargs)

    return run


def describe(kernel) -> dict[str, object]:
    ptx = kernel.asm["ptx"]
    starts = re.findall(r"wgmma\S*e4m3\.e4m3\s*\{[^}]*\},\s*\{[^}]*\},\s*\S+,\s*(\S+),", ptx)
    return {
        **aot.inspect(kernel),
        "shared": kernel.metadata.shared / 1024,
        "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync[\w.]*", ptx))),
        "starts": starts,
        "e4m3": sorted(set(re.findall(r"cvt\.[\w.]*e4m3[\w.]*", ptx))),
        "asynchronous": "cp.async" in ptx,
    }


def main() -> None:
    compiling = aot.compile_only(triton.JITFunction.run)
    for arch, cases in CASES.items():
        driver.set_active(Device(arch))
        package._capability = lambda arch=arch: (arch // 10, arch % 10)
        for case, scheme, dim, keywords, wanted in cases:
            triton.JITFunction.run = only(wanted, compiling)
            aot.compiled.clear()
            call(scheme, dim, **keywords)
            names = {"arch": arch, "case": case, "scheme": scheme, "dim": dim}
            for name, kernel in list(aot.compiled):
                print(json.dumps({**names, "kernel": name, **describe(kernel)}))


if __name__ == "__main__":
    main()
