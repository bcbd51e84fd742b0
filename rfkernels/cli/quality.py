"""How good samples are, in two measures that fail differently, and a third that watches for copying.

* Frechet distance between Gaussians fitted to the pixels of the samples and of the training data. It sees means and
  covariances only: a Gaussian fitted to the data scores near zero while its samples are no digits.
* Accuracy of a 1-nearest-neighbour classifier that tells samples from held-out data, leave-one-out over equal numbers
  of both (Lopez-Paz & Oquab, 2017): 0.5 cannot be told apart, 1.0 always told apart. It sees what the first does not.
* Median distance to the nearest training sample: far below that of held-out data, the model would be copying.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rfkernels.metrics import (
    energy_distance,
    frechet_distance,
    gaussian_statistics,
    nearest_distance,
    nearest_neighbour_test,
)
from rfkernels.ops.random import derive_seed, randn

_MOST_NUMBERS = 1024  # per sample; the Frechet distance takes the cube of it

__all__ = ["STEPS", "Quality", "Yardstick", "measure_steps", "quality_rows"]

STEPS = (1, 2, 4, 8, 32)


@dataclass(frozen=True)
class Quality:
    """What `Yardstick.measure` finds.

    Attributes:
        frechet: pixel Frechet distance to the training data, 0 at best; not meaningful for a handful of samples.
        one_nn: accuracy of the 1-nearest-neighbour test against the held-out data, the mean over several draws.
        one_nn_spread: its standard deviation over the draws.
        nearest: median distance to the nearest training sample.
        energy: energy distance to the held-out data, 0 at best.
    """

    frechet: float
    one_nn: float
    one_nn_spread: float
    nearest: float
    energy: float


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """(N, D): the samples flattened; images of more than 1024 numbers are first averaged over squares to at most that."""
    factor = 1
    while x.dim() == 4 and x[0].numel() > _MOST_NUMBERS * factor**2:
        factor += 1
    return (x if factor == 1 else torch.nn.functional.avg_pool2d(x, factor)).flatten(1)


class Yardstick:
    """The real data that samples are held against: training and held-out samples, flattened.

    Images of more than 1024 numbers are compared after averaging over squares of pixels, down to at most that many.

    Args:
        train: (N, ...) what the model was trained on.
        held_out: (M, ...) what it never saw.
        draws: how many sets of M samples the 1-nearest-neighbour test is averaged over.

    Raises:
        ValueError: fewer than two samples on either side.
    """

    def __init__(self, train: torch.Tensor, held_out: torch.Tensor, draws: int = 10) -> None:
        self.train, self.held_out, self.draws = _numbers(train), _numbers(held_out), draws
        for name, side in (("training", self.train), ("held-out", self.held_out)):
            if len(side) < 2:
                raise ValueError(
                    f"data: needs at least two {name} samples to compare with; got {len(side)}"
                )
        self._statistics = gaussian_statistics(self.train)

    @property
    def count(self) -> int:
        """How many samples `measure` wants: a whole number of draws."""
        return self.draws * len(self.held_out)

    def measure(self, samples: torch.Tensor) -> Quality:
        """The quality of (count, ...) samples."""
        samples = _numbers(samples)
        accuracies = torch.tensor(
            [
                float(nearest_neighbour_test(part, self.held_out))
                for part in samples.split(len(self.held_out))
            ]
        )
        return Quality(
            frechet=float(frechet_distance(samples, self._statistics)),
            one_nn=float(accuracies.mean()),
            one_nn_spread=float(accuracies.std(correction=0)),
            nearest=float(nearest_distance(samples, self.train).median()),
            energy=float(energy_distance(samples[: 4 * len(self.held_out)], self.held_out)),
        )

    def held_out_nearest(self) -> float:
        """Median distance of the held-out data to the nearest training sample: what honest samples have."""
        return float(nearest_distance(self.held_out, self.train).median())

    def gaussian(self, seed: int) -> torch.Tensor:
        """(count, D) samples of the Gaussian with the mean and covariance of the training data."""
        data = self.train.double()
        values, vectors = torch.linalg.eigh(torch.cov(data.T))
        root = vectors * values.clamp(min=0).sqrt()
        noise = randn(self.count, data.shape[1], seed=derive_seed(seed, "gaussian"))
        return (data.mean(0) + noise.double() @ root.T).float()


def measure_steps(
    draw: Callable[[int], torch.Tensor],
    yardstick: Yardstick,
    steps: Sequence[int],
    done: Callable[[], object],
) -> tuple[dict[int, Quality], dict[int, torch.Tensor]]:
    """Quality at each number of steps, and the samples; `draw(n)` gives `yardstick.count` of them by n steps."""
    qualities, samples = {}, {}
    for n in steps:
        samples[n] = draw(n)
        qualities[n] = yardstick.measure(samples[n])
        done()
    return qualities, samples


def quality_rows(curves: dict[str, dict[int, Quality]]) -> list[dict[str, object]]:
    """One row per model and number of steps, for CSV and JSON."""
    return [
        {
            "model": name,
            "steps": n,
            "frechet_distance": round(q.frechet, 5),
            "one_nn_accuracy": round(q.one_nn, 5),
            "one_nn_accuracy_std": round(q.one_nn_spread, 5),
            "nearest_training_distance": round(q.nearest, 5),
            "energy_distance": round(q.energy, 6),
        }
        for name, curve in curves.items()
        for n, q in curve.items()
    ]
