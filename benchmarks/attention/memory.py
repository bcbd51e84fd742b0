"""Peak memory of one call of attention above what its inputs take, each spelling in a process of its own.

    python benchmarks/attention/memory.py --out benchmarks/results/attention_memory.csv

Linux only: the peak is the process's resident set (VmHWM), set back before the call; the call before it, on few tokens, has
loaded whatever is loaded once. The output is part of the figure. Nothing here depends on the machine's load.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows as files
import torch
from machine import environment

import rfkernels as rf

SHAPES = ((1, 8, 4096, 64), (1, 8, 4096, 128), (1, 2, 16384, 64), (1, 2, 16384, 128))
SPELLINGS = (
    *(("int8", "bfloat16"), ("int8_bf16", "bfloat16"), ("bf16", "bfloat16"), ("SDPA", "bfloat16")),
    *(("int8", "float32"), ("SDPA", "float32")),
)
# glibc keeps freed memory below a threshold that grows by itself, and a call would find it there for nothing
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
COLUMNS = (
    *("variant", "dtype", "shape", "threads", "output_mib", "peak_mib"),
    *("rfkernels", "torch", "isa", "commit", "date"),
)


def resident_kib(name: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


@torch.no_grad()
def peak_mib(name: str, dtype: str, shape: tuple[int, ...]) -> float:
    """MiB that the call adds at its highest to what the process holds before it."""

    def call(q, k, v):
        if name == "SDPA":
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)
        with rf.use_backend("native"):
            return rf.attention(q, k, v, precision=name)

    batch, heads, length, dim = shape
    kind = getattr(torch, dtype)
    call(*(torch.randn(batch, heads, 64, dim).to(kind) for _ in range(3)))
    tensors = [torch.randn(batch, heads, length, dim).to(kind) for _ in range(3)]
    before = resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    call(*tensors)
    return (resident_kib("VmHWM") - before) / 1024


def main() -> None:
    """Measures and writes; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE.csv")
    parser.add_argument(
        "--one", nargs=3, metavar=("VARIANT", "DTYPE", "SHAPE"), help="one spelling, here"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        name, dtype, shape = options.one
        print(peak_mib(name, dtype, tuple(int(n) for n in shape.split("x"))))
        return
    common = {n: v for n, v in environment("cpu").items() if n in COLUMNS}
    rows = []
    for shape in SHAPES:
        for name, dtype in SPELLINGS:
            size = "x".join(map(str, shape))
            command = [
                sys.executable,
                *sys.orig_argv[1 : -len(sys.argv)],
                __file__,
                "--threads",
                str(options.threads),
            ]
            done = subprocess.run(
                [*command, "--one", name, dtype, size],
                capture_output=True, text=True, check=True, env={**os.environ, **_MALLOC},
            )  # fmt: skip
            elements = shape[0] * shape[1] * shape[2] * shape[3]
            row = {
                **common, "variant": name, "dtype": dtype, "shape": size, "threads": str(options.threads),
                "output_mib": f"{elements * getattr(torch, dtype).itemsize / 2**20:.1f}",
                "peak_mib": f"{float(done.stdout):.1f}",
            }  # fmt: skip
            rows.append(row)
            print({n: row[n] for n in COLUMNS[:6]}, flush=True)
    if options.out:
        files.write(options.out, rows, COLUMNS)


if __name__ == "__main__":
    main()
