"""Measures of samples and of flows: distances between sets, memorisation, straightness, cost, and
whole evaluations of runs."""

from rfkernels.metrics.curve import QualityRow, quality_curve
from rfkernels.metrics.distances import energy_distance, sliced_wasserstein
from rfkernels.metrics.drawer import Drawer
from rfkernels.metrics.evaluate import Evaluation, EvaluationRow, evaluate
from rfkernels.metrics.features import FeatureNetwork, extract, load_features, train_classifier
from rfkernels.metrics.first_order import FirstOrderDefect, first_order_defect
from rfkernels.metrics.frechet import GaussianStatistics, frechet_distance, gaussian_statistics
from rfkernels.metrics.kernel import KernelDistance, kernel_distance
from rfkernels.metrics.manifold import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    precision_recall,
)
from rfkernels.metrics.memorisation import Memorisation, memorisation
from rfkernels.metrics.neighbours import nearest_distance, nearest_neighbour_test
from rfkernels.metrics.perceptual import PerceptualDistance
from rfkernels.metrics.real_data import RealData, real_data
from rfkernels.metrics.transport import (
    crossing,
    relative_transport_cost,
    straightness,
    straightness_of_trajectory,
    transport_cost,
)
from rfkernels.metrics.yardstick import Yardstick

__all__ = [
    "DensityCoverage",
    "Drawer",
    "Evaluation",
    "EvaluationRow",
    "FeatureNetwork",
    "FirstOrderDefect",
    "GaussianStatistics",
    "KernelDistance",
    "Memorisation",
    "PerceptualDistance",
    "PrecisionRecall",
    "QualityRow",
    "RealData",
    "Yardstick",
    "crossing",
    "density_coverage",
    "energy_distance",
    "evaluate",
    "extract",
    "first_order_defect",
    "frechet_distance",
    "gaussian_statistics",
    "kernel_distance",
    "load_features",
    "memorisation",
    "nearest_distance",
    "nearest_neighbour_test",
    "precision_recall",
    "quality_curve",
    "real_data",
    "relative_transport_cost",
    "sliced_wasserstein",
    "straightness",
    "straightness_of_trajectory",
    "train_classifier",
    "transport_cost",
]
