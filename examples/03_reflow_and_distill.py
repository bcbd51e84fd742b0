"""The whole recipe on digits, kept in run folders: train, reflow, distil, and measure each at several step counts.

    python examples/03_reflow_and_distill.py            # about a minute on two cores
    python examples/03_reflow_and_distill.py --quick    # a few seconds, for a look

Stopped in between? The same command goes on where it was, and ends with the same weights.
"""

import argparse
from pathlib import Path

import torch

import rfkernels as rf
from rfkernels import data, metrics, models, training

STEPS = (1, 2, 4, 8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small budget, for a test")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders go")
    arguments = parser.parse_args()
    folder = arguments.runs / ("quick" if arguments.quick else "full")
    scale = 10 if arguments.quick else 1
    keep = {"resume": True, "progress": True}  # a folder without a run starts one

    digits = data.digits()
    network = models.build("mlp", seed=0, sample_shape=digits.sample_shape, width=256, depth=3)
    config = training.TrainConfig(
        steps=2000 // scale, batch_size=128, learning_rate=1e-3, holdout=0.15
    )
    first = training.train_flow(network, digits, config, run=folder / "1-rf", **keep)

    # The teacher's ODE makes the pairs; their noise is not stored, it is drawn again from (seed, index).
    config = training.ReflowConfig(
        pairs=8000 // scale,
        pair_steps=10,
        train=training.TrainConfig(
            steps=1500 // scale, batch_size=128, learning_rate=1e-3, time_distribution="u-shaped"
        ),
    )
    second = training.reflow(first, config, run=folder / "2-rf", **keep)

    # One Euler step from the noise must land on the image of the pair.
    config = training.DistillConfig(
        k=1, train=training.TrainConfig(steps=800 // scale, batch_size=128, learning_rate=5e-4)
    )
    student = training.distill(
        second, config, pairs=folder / "2-rf" / "pairs", run=folder / "distilled", **keep
    )

    train, held_out = data.split(digits, 0.15, seed=0)  # the split that training made
    noise = rf.randn(4 * held_out.size, 1, 8, 8, seed=1)
    print(
        "pixel Frechet distance to the training digits, and 1-nearest-neighbour accuracy against held-out ones"
    )
    print(f"{'steps':10}" + "".join(f"{n:>16}" for n in STEPS))
    for name, result in (("1-RF", first), ("2-RF", second), ("distilled", student)):
        cells = []
        for n in STEPS:
            x = rf.sample(result.ema, noise, steps=n)
            accuracies = [
                metrics.nearest_neighbour_test(part, held_out.x) for part in x.split(held_out.size)
            ]
            accuracy = torch.tensor(accuracies).mean()
            cells.append(f"{metrics.frechet_distance(x, train.x):8.3f} / {accuracy:.2f} ")
        print(f"{name:10}" + "".join(f"{cell:>16}" for cell in cells))

    # A run folder is all that is needed later on:
    loaded = rf.load(folder / "2-rf")
    again = rf.sample(loaded.model, noise[:4], steps=1)
    assert torch.equal(again, rf.sample(second.ema, noise[:4], steps=1))


if __name__ == "__main__":
    main()
