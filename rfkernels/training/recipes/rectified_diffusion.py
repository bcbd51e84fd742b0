"""Rectified Diffusion (Wang, Yang, Huang, Fu, Li, "Rectified Diffusion: Straightness Is Not Your Need
in Rectified Flow", 2024): reflow that leaves a diffusion network what it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from rfkernels.training.config import TrainConfig
from rfkernels.training.objective import (
    Batch,
    Setting,
    batch_condition,
)
from rfkernels.training.option_checks import require
from rfkernels.training.recipes.diffusion import (
    DiffusionObjective,
    check_diffusion_network,
    check_huber,
    whole_below,
)
from rfkernels.training.recipes.recipe import PairRecipe

__all__ = ["RectifiedDiffusion"]


@dataclass(frozen=True, kw_only=True)
class RectifiedDiffusion(PairRecipe):
    """Stage 1 of Rectified Diffusion: the network's own training, on a teacher's pairs.

    The noise of a training sample is the one that the teacher's flow took to this x1. With k uniform
    over the K whole indices of the network's schedule,

        x_k = alpha_k x1 + sigma_k x0,    (x0, x1) a pair,
        loss = |x0^ - x0|^2                                        "noise", the paper's,
        loss = mean over elements of sqrt((x1^ - x1)^2 + h^2) - h  "data", the released code's,

    x0^ and x1^ the estimates that a prediction of noise, v or data gives. Both have one optimum; the
    second weights an element's gradient by sigma / alpha more, which the Huber form tames. The
    trained flow is first-order: its noise estimate is constant along a trajectory, so that one DDIM
    step (`rfkernels.sampling.ddim`) ends where many do; paths need not be straight.
    `rfkernels.metrics.first_order_defect` measures how far that holds.

    The network is a `rfkernels.models.NoisePrediction`, and its schedule is the one trained with; the
    published runs change Stable Diffusion's to linear betas, `model=teacher.with_schedule("linear")`.
    The pairs may come from any flow.

    Attributes:
        loss: "noise" or "data".
        huber_c: h of "data".

    Published (Stable Diffusion 1.5): 1.6 M pairs, 25 steps of DPM-Solver at guidance 5.0; AdamW,
    learning rate 5e-6 constant after 500 steps, weight decay 1e-3, clip 1.0, batch 128, 200,000
    steps, EMA 0.9999, h = 1e-3; captions are dropped with a probability that is not given (0.1 is
    usual: train.label_dropout). Sampled by DDIM on linear betas with end="first-index", guidance 1.5.
    """

    name: ClassVar[str] = "rectified-diffusion"

    loss: str = "data"
    huber_c: float = 1e-3
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=2500, learning_rate=1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss in ("noise", "data"), "loss", "must be 'noise' or 'data'", self.loss)
        check_huber(self.huber_c)

    def check_network(self, network: nn.Module) -> None:
        check_diffusion_network("model", network)

    def objective(self, setting: Setting) -> RectifiedDiffusionObjective:
        return RectifiedDiffusionObjective(setting, self)


class RectifiedDiffusionObjective(DiffusionObjective):
    """The index is floor(t K)."""

    purpose: ClassVar[str] = "diffusion index"

    def __init__(self, setting: Setting, recipe: RectifiedDiffusion) -> None:
        super().__init__(setting)
        self._kind, self._huber_c = recipe.loss, recipe.huber_c

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        x0, x1 = batch["x0"], batch["x1"]
        k = whole_below(batch["t"], model.schedule.steps)
        x_k = model.add_noise(x1, x0, k)
        answer = self.call(model, x_k, None, index=k, **batch_condition(batch))
        data, noise = model.estimates(x_k, k, answer)
        if self._kind == "noise":
            return (noise - x0).square().mean()
        return self.huber(data, x1, self._huber_c)
