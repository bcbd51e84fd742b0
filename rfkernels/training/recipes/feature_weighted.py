"""The feature-weighted loss of the rectified-flow paper for translation between two sets of images
(Liu, Gong, Liu, "Flow Straight and Fast", 2023): errors count as far as a feature map sees them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rfkernels.training.config import OwnObject
from rfkernels.training.objective import Batch, Setting
from rfkernels.training.recipes.options import refuse_named
from rfkernels.training.recipes.recipe import Recipe
from rfkernels.training.recipes.rectified_flow import FlowObjective

__all__ = ["FeatureWeighted"]


@dataclass(frozen=True, kw_only=True)
class FeatureWeighted(Recipe):
    """A flow between two data sets that is asked to be right where a feature map h looks.

    With x_t and dx_t/dt of the path, x1 - x0 on the straight one, the loss is::

        E |J_h(x_t) (dx_t/dt - v(x_t, t))|^2,   the mean over the numbers of h

    J_h times a vector is one forward derivative (`torch.func.jvp`), so the Jacobian is never made
    and a step costs one evaluation of h with its derivative, and their backward, on top of the
    network's. Give the second data set as `x0` of `train_recipe`. One network translates both ways:
    `rfkernels.sample(network, x0)` and `rfkernels.invert(network, x1)`, the same ODE backwards.

    Directions that h does not see at any state are not learnt: let h keep what matters of the
    domains, with more numbers rather than fewer. v enters the loss only through J_h, so the loss
    says nothing of its size; the held-out loss is this loss.

    Attributes:
        features: h, a callable of states (B, ...) giving (B, ...), made of operations with a
            forward derivative; a module is copied, frozen, and moved to the network's device. The
            paper takes the latent of a classifier trained to tell the two domains apart.

    Published: 512 x 512 images of AFHQ, MetFaces and CelebA-HQ in pairs of domains, h fine-tuned
    from an ImageNet network, the DDPM++ U-Net, AdamW (0.9, 0.999) with decay 0.1, dropout 0.1,
    batch 4, 1000 epochs, EMA 0.9999, the rate chosen by the training loss; sampled from held-out
    images with 100 Euler steps, and with one after reflow.
    """

    name: ClassVar[str] = "feature-weighted"

    features: Callable[[torch.Tensor], torch.Tensor] | OwnObject

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (callable(self.features) or isinstance(self.features, OwnObject)):
            raise TypeError(f"features: must be a callable; got {type(self.features).__name__}")

    def objective(self, setting: Setting) -> FeatureWeightedObjective:
        return FeatureWeightedObjective(setting, self)


class FeatureWeightedObjective(FlowObjective):
    """The batches of a flow, and the loss through the feature map."""

    def __init__(self, setting: Setting, recipe: FeatureWeighted) -> None:
        super().__init__(setting)
        refuse_named(features=recipe.features)
        features = recipe.features
        if isinstance(features, nn.Module):
            features = copy.deepcopy(features).eval().requires_grad_(False)
            features = features.to(self.source.device)
        self._features = features

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        residual = batch["target"] - self.velocity(model, batch)
        # Fused attention has no forward derivative; its plain form has.
        with sdpa_kernel(SDPBackend.MATH):
            _, seen = torch.func.jvp(self._features, (batch["xt"],), (residual,))
        return seen.square().mean()
