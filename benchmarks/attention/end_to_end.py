"""Samples of a trained DiT under quantized attention against exact attention, from the same noise.

    python benchmarks/attention/end_to_end.py RUN_FOLDER --out benchmarks/results/attention_end_to_end.csv

RUN_FOLDER is a run of ``train_dit.py``. ``drift`` is the root mean square of x - x_exact over that of x_exact along the
Euler path; ``steps x 2`` is what halving the step does to exact sampling, a yardstick. ``frechet`` is the distance of 16
features (means over 7 x 7 pixels) between samples and data, or exact samples; ``other noise`` is exact sampling from another
seed, what a distance of nothing looks like at this number of samples. Nothing here depends on the machine's load.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows as files
import torch
from machine import environment

import rfkernels as rf
from rfkernels import data, metrics, training

KINDS = ("int8_u8", "int8_bf16", "bf16")
COLUMNS = (
    *("measure", "attention", "against", "t", "value", "samples", "steps", "train_steps"),
    *("rfkernels", "torch", "isa", "commit", "date"),
)
Row = dict[str, str]


def paths(model, attention: str, x0: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Times (N + 1,) and states (N + 1, B, ...) along the Euler path; proves that every layer ran as asked."""
    for block in model.blocks:
        block.attention = attention
    rf.attention_stats(reset=True)
    labels = torch.arange(len(x0)) % 10
    info = rf.sample(model, x0, steps=steps, condition={"y": labels}, return_info=True)
    stats = rf.attention_stats(reset=True)
    expected = (
        {} if attention == "sdpa" else {(attention, attention, "native"): steps * len(model.blocks)}
    )
    if stats.calls != expected or stats.handovers:
        raise RuntimeError(f"end_to_end: expected {expected} calls of attention; got {stats}")
    return info.times, info.trajectory


def features(x: torch.Tensor) -> torch.Tensor:
    """(N, 16): means over 7 x 7 pixels."""
    return torch.nn.functional.avg_pool2d(x, 7).flatten(1)


def drift(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact state."""
    return float((x - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@torch.no_grad()
def measured(run: Path, samples: int, steps: int):
    """Rows without the environment's columns."""
    loaded = training.load(run)
    model = loaded.model
    x0 = rf.randn(samples, *model.sample_shape, seed=21)
    times, exact = paths(model, "sdpa", x0, steps)
    images = {"sdpa": exact[-1]}
    for kind in KINDS:
        with rf.use_backend("native"):
            _, states = paths(model, kind, x0, steps)
        images[kind] = states[-1]
        for t, x, true in zip(times.tolist(), states, exact, strict=True):
            yield _row("drift", kind, "sdpa", drift(x, true), f"{t:.4f}")
    _, fine = paths(model, "sdpa", x0, 2 * steps)
    for t, x, true in zip(times.tolist(), fine[::2], exact, strict=True):
        yield _row("drift", "steps x 2", "sdpa", drift(x, true), f"{t:.4f}")
    other = rf.randn(samples, *model.sample_shape, seed=22)
    images["other noise"] = paths(model, "sdpa", other, steps)[1][-1]
    real = metrics.gaussian_statistics(data.mnist().x, features=features)
    for kind, made in images.items():
        yield _row("frechet", kind, "data", metrics.frechet_distance(made, real, features=features))
        if kind != "sdpa":
            between = metrics.frechet_distance(made, images["sdpa"], features=features)
            yield _row("frechet", kind, "sdpa", between)


def _row(measure: str, attention: str, against: str, value: float, t: str = "") -> Row:
    return {
        "measure": measure,
        "attention": attention,
        "against": against,
        "t": t,
        "value": f"{value:.4e}",
    }


def main() -> None:
    """Measures and writes; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    trained = training.load(options.run).step
    common = {n: v for n, v in environment("cpu").items() if n in COLUMNS}
    common |= {
        "samples": str(options.samples),
        "steps": str(options.steps),
        "train_steps": str(trained),
    }
    rows = []
    for row in measured(options.run, options.samples, options.steps):
        rows.append({**common, **row})
        print(row, flush=True)
        files.write(options.out, rows, COLUMNS)


if __name__ == "__main__":
    main()
