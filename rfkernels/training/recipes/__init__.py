"""Published training methods for flows, one file each: what distinguishes each from the others.

`RECIPES` names them for the command and for run folders; `rfkernels.training.train_recipe` runs
one.
"""

from rfkernels.training.recipes.feature_weighted import FeatureWeighted
from rfkernels.training.recipes.instaflow import InstaFlowDistill
from rfkernels.training.recipes.recipe import PairRecipe, Recipe
from rfkernels.training.recipes.rectified_flow import DistillObjective, FlowObjective
from rfkernels.training.recipes.rf_plus_plus import RectifiedFlowPlusPlus
from rfkernels.training.recipes.slimflow import SlimFlowDistill, SlimFlowReflow

RECIPES: dict[str, type[Recipe]] = {
    cls.name: cls
    for cls in (
        FeatureWeighted,
        InstaFlowDistill,
        RectifiedFlowPlusPlus,
        SlimFlowDistill,
        SlimFlowReflow,
    )
}

__all__ = [
    "RECIPES",
    "DistillObjective",
    "FeatureWeighted",
    "FlowObjective",
    "InstaFlowDistill",
    "PairRecipe",
    "Recipe",
    "RectifiedFlowPlusPlus",
    "SlimFlowDistill",
    "SlimFlowReflow",
]
