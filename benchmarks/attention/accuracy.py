"""Errors of every scheme of quantized attention, and of other kernels' schemes emulated, against exact attention.

    python benchmarks/attention/accuracy.py --out benchmarks/results/attention_accuracy.csv
    python benchmarks/attention/accuracy.py --out ... --run RUN_FOLDER    only Q, K, V of the DiT of train_dit.py

Rows of the other kind that the file has stay in it.

The inputs are those of ``tests/ops/attention_inputs.py``: 8 seeds, medians over them. The truth is PyTorch's attention in
float64 on the same inputs. Nothing here depends on the machine's load.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

# `python -P` leaves the script's folder out; the inputs belong to the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "ops"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import attention_inputs as inputs
import rows as files
import torch
from machine import environment
from peers import PEERS

import rfkernels as rf
from rfkernels import training

NATIVE, REFERENCE = ("int8_u8", "int8_bf16", "bf16"), ("int8_fp8", "fp8")
COLUMNS = (
    *("inputs", "dtype", "length", "head_dim", "scheme", "backend", "samples"),
    *("sqnr_db", "cosine", "relative_l1", "rmse", "rfkernels", "torch", "isa", "commit", "date"),
)
COUNT = len(NATIVE) + len(REFERENCE) + len(PEERS)  # rows for one place
TIMES = (0.1, 0.5, 0.9)
Row = dict[str, str]


def measured(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Row]:
    """One row a scheme: ours on the CPU kernels where they serve it, else on the reference; then the others'."""
    truth = inputs.exact(q, k, v)
    for backend, schemes in (("native", NATIVE), ("reference", REFERENCE)):
        for scheme in schemes:
            with rf.use_backend(backend):
                found = rf.attention(q, k, v, precision=scheme)
            yield _row(scheme, backend, found, truth)
    for name, attention in PEERS.items():
        yield _row(
            name, "torch" if name.startswith("SDPA") else "emulated", attention(q, k, v), truth
        )


def _row(scheme: str, backend: str, found: torch.Tensor, truth: torch.Tensor) -> Row:
    got = inputs.measures(found, truth)
    return {
        "scheme": scheme, "backend": backend, "samples": str(len(truth)), "sqnr_db": f"{got['sqnr']:.2f}",
        "cosine": f"{got['cosine']:.7f}", "relative_l1": f"{got['relative_l1']:.5f}", "rmse": f"{got['rmse']:.3e}",
    }  # fmt: skip


def synthetic(length: int, seeds: int) -> Iterator[tuple[Row, tuple[torch.Tensor, ...]]]:
    """What hard inputs there are, and the tensors."""
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (64, 128):
            for name, generator in inputs.GENERATORS.items():
                if dtype == torch.float32 or name == "normal":
                    yield (
                        _place(name, dtype, length, dim),
                        tuple(x.to(dtype) for x in generator(length, dim, seeds)),
                    )


def _place(name: str, dtype: torch.dtype, length: int, dim: int) -> Row:
    return {
        "inputs": name, "dtype": str(dtype).removeprefix("torch."), "length": str(length), "head_dim": str(dim),
    }  # fmt: skip


@torch.no_grad()
def recorded(run: Path, images: int = 8) -> Iterator[tuple[Row, tuple[torch.Tensor, ...]]]:
    """Q, K and V of every layer of a trained DiT on its own paths: images that its flow is making, at three times."""
    model = training.load(run).model
    x0 = rf.randn(images, *model.sample_shape, seed=11)
    labels = torch.arange(images) % 10
    states = rf.sample(model, x0, steps=20, condition={"y": labels}, return_info=True)
    original = torch.nn.functional.scaled_dot_product_attention
    for time in TIMES:
        seen = []

        def record(q, k, v, seen=seen, **options):
            seen.append((q, k, v))
            return original(q, k, v, **options)

        with mock.patch("torch.nn.functional.scaled_dot_product_attention", record):
            x = states.trajectory[round(20 * time)]
            model(x, torch.full((images,), time), y=labels)
        for layer, (q, k, v) in enumerate(seen):
            yield (
                _place(f"DiT layer {layer}, t = {time}", q.dtype, q.shape[2], q.shape[3]),
                (q, k, v),
            )


def _rows_in(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def main() -> None:
    """Measures and writes; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    parser.add_argument(
        "--run", type=Path, metavar="RUN_FOLDER", help="a run of train_dit.py, to measure instead"
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    common = {n: v for n, v in environment("cpu").items() if n in COLUMNS}
    trained = options.run is not None
    source = recorded(options.run) if trained else synthetic(options.length, options.seeds)
    kept = [row for row in _rows_in(options.out) if row["inputs"].startswith("DiT") != trained]
    collected: list[Row] = []
    for place, tensors in source:
        for row in measured(*tensors):
            collected.append({**common, **place, **row})
        print(place, {row["scheme"]: row["sqnr_db"] for row in collected[-COUNT:]}, flush=True)
        files.write(options.out, kept + collected if trained else collected + kept, COLUMNS)


if __name__ == "__main__":
    main()
