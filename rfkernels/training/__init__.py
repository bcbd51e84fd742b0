"""Training: a first flow from data, reflow on its pairs, distillation to a few steps; every run
resumes exactly.

`train_flow`, `reflow`, `distill` and, for every other published method, `train_recipe` return a
RunResult and, with `run=`, keep a folder that `load` reads. Times: t = 0 is the source, t = 1 the
data. All randomness is a function of the seed and of the step or sample it serves.
"""

from rfkernels.training.config import DistillConfig, OwnObject, ReflowConfig, TrainConfig
from rfkernels.training.config_json import from_dict, to_dict
from rfkernels.training.distill import distill
from rfkernels.training.domain_adaptation import FeatureAdapter, adapt_features
from rfkernels.training.invert_data import invert_data
from rfkernels.training.load import LoadedRun, load
from rfkernels.training.make_pairs import make_pairs
from rfkernels.training.metrics_log import read_metrics
from rfkernels.training.mixed_pairs import MixedPairs
from rfkernels.training.pairs import PairStore
from rfkernels.training.reflow import reflow
from rfkernels.training.train import train_flow
from rfkernels.training.train_recipe import train_recipe
from rfkernels.training.trainer import RunResult, TrainingDivergedError
from rfkernels.training.write_pairs import model_hash

__all__ = [
    "DistillConfig",
    "FeatureAdapter",
    "LoadedRun",
    "MixedPairs",
    "OwnObject",
    "PairStore",
    "ReflowConfig",
    "RunResult",
    "TrainConfig",
    "TrainingDivergedError",
    "adapt_features",
    "distill",
    "from_dict",
    "invert_data",
    "load",
    "make_pairs",
    "model_hash",
    "read_metrics",
    "reflow",
    "to_dict",
    "train_flow",
    "train_recipe",
]
