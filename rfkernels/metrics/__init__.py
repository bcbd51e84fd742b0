"""Measures of samples and of flows: distances between sets, straightness, crossing, cost."""

from rfkernels.metrics.curve import QualityRow, quality_curve
from rfkernels.metrics.distances import energy_distance, sliced_wasserstein
from rfkernels.metrics.frechet import GaussianStatistics, frechet_distance, gaussian_statistics
from rfkernels.metrics.neighbours import nearest_distance, nearest_neighbour_test
from rfkernels.metrics.transport import (
    crossing,
    relative_transport_cost,
    straightness,
    straightness_of_trajectory,
    transport_cost,
)

__all__ = [
    "GaussianStatistics",
    "QualityRow",
    "crossing",
    "energy_distance",
    "frechet_distance",
    "gaussian_statistics",
    "nearest_distance",
    "nearest_neighbour_test",
    "quality_curve",
    "relative_transport_cost",
    "sliced_wasserstein",
    "straightness",
    "straightness_of_trajectory",
    "transport_cost",
]
