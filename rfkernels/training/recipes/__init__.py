"""Published training methods for flows, one file each: what distinguishes each from the others.

`RECIPES` names them for the command and for run folders; `rfkernels.training.train_recipe` runs
one.
"""

from rfkernels.training.recipes.consistency_fm import ConsistencyFM
from rfkernels.training.recipes.feature_weighted import FeatureWeighted
from rfkernels.training.recipes.flow_map_matching import (
    LagrangianSelfDistillation,
    SplitMeanFlow,
)
from rfkernels.training.recipes.instaflow import InstaFlowDistill
from rfkernels.training.recipes.meanflow import ImprovedMeanFlow, MeanFlow
from rfkernels.training.recipes.perflow import PeRFlow
from rfkernels.training.recipes.re_meanflow import ReMeanFlow
from rfkernels.training.recipes.recipe import PairRecipe, Recipe
from rfkernels.training.recipes.rectified_diffusion import RectifiedDiffusion
from rfkernels.training.recipes.rectified_diffusion_consistency import RectifiedDiffusionConsistency
from rfkernels.training.recipes.rectified_diffusion_phased import RectifiedDiffusionPhased
from rfkernels.training.recipes.rectified_flow import DistillObjective, FlowObjective
from rfkernels.training.recipes.rf_plus_plus import RectifiedFlowPlusPlus
from rfkernels.training.recipes.shortcut import Shortcut
from rfkernels.training.recipes.slimflow import SlimFlowDistill, SlimFlowReflow

RECIPES: dict[str, type[Recipe]] = {
    cls.name: cls
    for cls in (
        ConsistencyFM,
        FeatureWeighted,
        ImprovedMeanFlow,
        InstaFlowDistill,
        LagrangianSelfDistillation,
        MeanFlow,
        PeRFlow,
        ReMeanFlow,
        RectifiedDiffusion,
        RectifiedDiffusionConsistency,
        RectifiedDiffusionPhased,
        RectifiedFlowPlusPlus,
        Shortcut,
        SlimFlowDistill,
        SlimFlowReflow,
        SplitMeanFlow,
    )
}

__all__ = [
    "RECIPES",
    "ConsistencyFM",
    "DistillObjective",
    "FeatureWeighted",
    "FlowObjective",
    "ImprovedMeanFlow",
    "InstaFlowDistill",
    "LagrangianSelfDistillation",
    "MeanFlow",
    "PairRecipe",
    "PeRFlow",
    "ReMeanFlow",
    "Recipe",
    "RectifiedDiffusion",
    "RectifiedDiffusionConsistency",
    "RectifiedDiffusionPhased",
    "RectifiedFlowPlusPlus",
    "Shortcut",
    "SlimFlowDistill",
    "SlimFlowReflow",
    "SplitMeanFlow",
]
