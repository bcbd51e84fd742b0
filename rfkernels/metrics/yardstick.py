"""Several measures of one set of samples against training and held-out data, memorisation always among them.

* ``frechet``: Frechet distance to the training data. Sees means and covariances only: a Gaussian
  fitted to the features scores near 0.
* ``one-nn``: accuracy of a 1-nearest-neighbour classifier that tells samples from held-out data,
  0.5 at best. Sees what the first does not.
* ``kid``: unbiased kernel distance to the training data, with its standard error.
* ``energy``: unbiased energy distance to held-out data.
* ``precision-recall``, ``density-coverage``: quality and variety apart, against held-out data.

Measures of equal numbers take sets of as many samples as there are held-out ones, and average over
several sets. All see features, and the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rfkernels.metrics.distances import energy_distance
from rfkernels.metrics.features import extract, load_features
from rfkernels.metrics.frechet import frechet_distance, gaussian_statistics
from rfkernels.metrics.kernel import kernel_distance
from rfkernels.metrics.manifold import density_coverage, precision_recall
from rfkernels.metrics.memorisation import compare_nearest
from rfkernels.metrics.neighbours import nearest_distance, nearest_neighbour_test
from rfkernels.ops.random import derive_seed, randn

__all__ = ["DEFAULT_METRICS", "METRICS", "Yardstick"]

METRICS = ("frechet", "one-nn", "kid", "energy", "precision-recall", "density-coverage")
DEFAULT_METRICS = ("frechet", "one-nn", "energy")

Features = Callable[[Tensor], Tensor]


class Yardstick:
    """The real data that samples are held against, reduced to features once.

    Args:
        train: (N, ...) what the model was trained on.
        held_out: (M, ...) what it never saw.
        draws: how many sets of M samples the measures of equal numbers are averaged over.
        features: of `load_features`, or its name where that needs no labels.
        metrics: names from `METRICS`; "nearest", the memorisation, comes on top.
        seed: of the kernel distance's blocks.

    Raises:
        ValueError: fewer than two samples on either side, or an unknown metric.
    """

    def __init__(
        self,
        train: Tensor,
        held_out: Tensor,
        draws: int = 10,
        *,
        features: str | Features = "pixels",
        metrics: Sequence[str] = DEFAULT_METRICS,
        seed: int = 0,
    ) -> None:
        for metric in metrics:
            if metric not in METRICS:
                raise ValueError(f"metric: must be one of {', '.join(METRICS)}; got {metric!r}")
        for name, side in (("training", train), ("held-out", held_out)):
            if len(side) < 2:
                raise ValueError(
                    f"data: needs at least two {name} samples to compare with; got {len(side)}"
                )
        self.features = load_features(features)
        self.metrics, self.draws, self.seed = tuple(metrics), draws, seed
        self.train, self.held_out = (extract(self.features, x) for x in (train, held_out))
        self._statistics = gaussian_statistics(self.train) if "frechet" in metrics else None
        self._held_out_nearest = nearest_distance(self.held_out, self.train)

    @property
    def count(self) -> int:
        """How many samples `measure` wants: a whole number of draws."""
        return self.draws * len(self.held_out)

    def measure(self, samples: Tensor) -> dict[str, float]:
        """The measures of (count, ...) samples, by column."""
        return self.measure_features(extract(self.features, samples))

    def measure_features(self, samples: Tensor) -> dict[str, float]:
        """As `measure`, of features (count, D)."""
        found: dict[str, float] = {}
        for metric in self.metrics:
            found.update(_MEASURES[metric](self, samples))
        nearest = compare_nearest(nearest_distance(samples, self.train), self._held_out_nearest)
        return found | {
            "nearest_training_distance": nearest.distance,
            "memorisation_ratio": nearest.ratio,
            "close_share": nearest.close,
        }

    def real(self) -> dict[str, float]:
        """What real data scores, where that can be known.

        Measures against held-out data: of as many training samples. Measures against training data:
        of the held-out samples; the Frechet distance is left out, which few samples would inflate.
        """
        count = min(len(self.train), len(self.held_out))
        rows = torch.linspace(0, len(self.train) - 1, count).round().long()
        found: dict[str, float] = {}
        for metric in self.metrics:
            if metric == "kid":
                found.update(_MEASURES[metric](self, self.held_out))
            elif metric != "frechet" and (metric != "one-nn" or count == len(self.held_out)):
                found.update(_MEASURES[metric](self, self.train[rows]))
        return found | {
            "nearest_training_distance": self.held_out_nearest(),
            "memorisation_ratio": 1.0,
        }

    def held_out_nearest(self) -> float:
        """Median distance of the held-out data to the nearest training sample: what honest samples
        have."""
        return float(self._held_out_nearest.median())

    def gaussian(self, seed: int) -> Tensor:
        """(count, D) features drawn from the Gaussian with the training features' mean and
        covariance: what the Frechet distance cannot tell from the data."""
        mean, covariance = self._statistics or gaussian_statistics(self.train)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()
        noise = randn(self.count, len(mean), seed=derive_seed(seed, "gaussian"))
        return (mean + noise.double() @ root.T).float()

    def _frechet(self, samples: Tensor) -> dict[str, float]:
        return {"frechet_distance": frechet_distance(samples, self._statistics)}

    def _one_nn(self, samples: Tensor) -> dict[str, float]:
        values = torch.tensor(
            [nearest_neighbour_test(part, self.held_out) for part in self._parts(samples)]
        )
        spread = float(values.std(correction=0))
        return {"one_nn_accuracy": float(values.mean()), "one_nn_accuracy_std": spread}

    def _kid(self, samples: Tensor) -> dict[str, float]:
        # Ten blocks where each keeps ten samples at least.
        blocks = max(1, min(10, min(len(samples), len(self.train)) // 10))
        found = kernel_distance(samples, self.train, blocks=blocks, seed=self.seed)
        return {"kernel_distance": found.value, "kernel_distance_error": found.standard_error}

    def _energy(self, samples: Tensor) -> dict[str, float]:
        part = samples[: 4 * len(self.held_out)]
        return {"energy_distance": energy_distance(part, self.held_out)}

    def _precision_recall(self, samples: Tensor) -> dict[str, float]:
        return self._mean(samples, precision_recall)

    def _density_coverage(self, samples: Tensor) -> dict[str, float]:
        return self._mean(samples, density_coverage)

    def _mean(self, samples: Tensor, measure: Callable[..., Any]) -> dict[str, float]:
        """The mean over the draws of a measure that returns named values."""
        found = [measure(part, self.held_out) for part in self._parts(samples)]
        columns = zip(*found, strict=True)
        return {
            name: sum(values) / len(found)
            for name, values in zip(found[0]._fields, columns, strict=True)
        }

    def _parts(self, samples: Tensor) -> tuple[Tensor, ...]:
        return samples.split(len(self.held_out))


_MEASURES: dict[str, Callable[[Yardstick, Tensor], dict[str, float]]] = {
    "frechet": Yardstick._frechet,
    "one-nn": Yardstick._one_nn,
    "kid": Yardstick._kid,
    "energy": Yardstick._energy,
    "precision-recall": Yardstick._precision_recall,
    "density-coverage": Yardstick._density_coverage,
}
