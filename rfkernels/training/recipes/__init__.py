"""Published training methods for flows, one file each: what distinguishes each from the others.

`RECIPES` names them for the command and for run folders; `rfkernels.training.train_recipe` runs
one.
"""

from rfkernels.training.recipes.recipe import PairRecipe, Recipe
from rfkernels.training.recipes.rectified_flow import DistillObjective, FlowObjective

RECIPES: dict[str, type[Recipe]] = {cls.name: cls for cls in ()}

__all__ = ["RECIPES", "DistillObjective", "FlowObjective", "PairRecipe", "Recipe"]
