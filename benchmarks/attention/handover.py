"""Where PyTorch's attention is quicker than the native kernels: the figures behind the table of the hand-over rule.

    python benchmarks/attention/handover.py            bfloat16 and float32, 1 and 2 threads
    python benchmarks/attention/handover.py --precision bf16 --threads 1 --only-lost

One line a cell of (threads, dtype, mask, D, heads, queries, keys): microseconds of PyTorch and of the forced native backend,
their ratio, and LOST where ours takes more than 5 % + 2 microseconds longer. At the end, by (threads, dtype, mask, D): the
largest queries * keys that is lost and the smallest that is not. Only an idle machine gives figures worth a rule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from attention_targets import SMALL_SHARE, SMALL_US
from measure import Runner, interleaved

import rfkernels as rf
from rfkernels.backends.attention_schemes import PRECISIONS

SQUARE = (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
PAIRS = [
    *((n, n) for n in SQUARE), (1, 256), (1, 1024), (1, 4096), (16, 1024), (256, 77), (1024, 77), (4096, 77), (77, 1024),
]  # fmt: skip
HEADS = (1, 8)
MASKS = ("none", "causal", "bool")


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    threads: int
    dtype: str
    mask: str
    dim: int
    heads: int
    queries: int
    keys: int
    sdpa_us: float
    ours_us: float

    @property
    def lost(self) -> bool:
        """PyTorch is quicker by more than is allowed."""
        return self.ours_us > SMALL_SHARE * self.sdpa_us + SMALL_US


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Every cell of the grid, measured."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            for mask in options.masks:
                for dim in options.dims:
                    for heads in HEADS:
                        for queries, keys in PAIRS:
                            times = _times(
                                options, getattr(torch, dtype), mask, dim, heads, queries, keys
                            )
                            yield Cell(threads, dtype, mask, dim, heads, queries, keys, *times)


def _times(options, dtype, mask, dim, heads, queries, keys) -> tuple[float, float]:
    """Microseconds of PyTorch's attention and of the native kernel."""
    q = torch.randn(1, heads, queries, dim).to(dtype)
    k, v = (torch.randn(1, heads, keys, dim).to(dtype) for _ in range(2))
    given = {"is_causal": mask == "causal"}
    if mask == "bool":
        given["attn_mask"] = torch.rand(queries, keys) < 0.7
    runners = {
        "sdpa": Runner(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **given)),
        "ours": Runner(
            lambda: rf.attention(q, k, v, precision=options.precision, **given), "native"
        ),
    }
    for runner in runners.values():
        with runner.forced():
            runner.call()
    timings = interleaved(runners, "cpu", options.seconds, min_rounds=7)
    return timings["sdpa"].p50, timings["ours"].p50


def summary(found: list[Cell]) -> Iterator[str]:
    """By (threads, dtype, mask, D) the region in which PyTorch is quicker, in scores a head."""
    places = dict.fromkeys((c.threads, c.dtype, c.mask, c.dim) for c in found)
    for place in places:
        here = [c for c in found if (c.threads, c.dtype, c.mask, c.dim) == place]
        lost = [c.queries * c.keys for c in here if c.lost]
        won = [c.queries * c.keys for c in here if not c.lost]
        threads, dtype, mask, dim = place
        yield (
            f"threads {threads} {dtype:8s} {mask:6s} D {dim:3d}: {len(lost)} of {len(here)} lost; "
            f"largest lost {max(lost, default=0)}, smallest not lost {min(won, default=0)}"
        )


def main() -> None:
    """Measures and prints; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--precision", choices=PRECISIONS, default="int8")
    add("--threads", type=int, nargs="+", default=[1, 2])
    add(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        default=["bfloat16", "float32"],
    )
    add("--masks", nargs="+", choices=MASKS, default=["none"])
    add("--dims", type=int, nargs="+", default=[64, 128])
    add("--seconds", type=float, default=0.1, help="a cell is measured for about so long")
    add("--only-lost", action="store_true", help="print no line for a cell that is not lost")
    options = parser.parse_args()
    found = []
    print("threads dtype    mask    D heads queries keys     sdpa us    ours us  sdpa / ours")
    with torch.no_grad():
        for c in cells(options):
            found.append(c)
            if c.lost or not options.only_lost:
                print(
                    f"{c.threads:7d} {c.dtype:8s} {c.mask:6s} {c.dim:3d} {c.heads:5d} {c.queries:7d} {c.keys:4d} "
                    f"{c.sdpa_us:11.1f} {c.ours_us:10.1f} {c.sdpa_us / c.ours_us:8.2f}  {'LOST' if c.lost else ''}",
                    flush=True,
                )
    print("\n".join(summary(found)))


if __name__ == "__main__":
    main()
