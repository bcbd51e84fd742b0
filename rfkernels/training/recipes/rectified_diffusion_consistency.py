"""Consistency distillation of a rectified diffusion network: stage 2 of Rectified Diffusion (Wang et
al. 2024), for which no code was published; the form here is this library's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rfkernels.models.noise_prediction import NoisePrediction
from rfkernels.training.objective import (
    Batch,
    Setting,
    batch_condition,
)
from rfkernels.training.option_checks import whole
from rfkernels.training.recipes.diffusion import (
    DiffusionObjective,
    check_diffusion_network,
    check_guidance,
    check_huber,
    check_teacher_grid,
    refuse_unguidable,
    whole_below,
)
from rfkernels.training.recipes.recipe import Recipe

__all__ = ["RectifiedDiffusionConsistency"]


@dataclass(frozen=True, kw_only=True)
class RectifiedDiffusionConsistency(Recipe):
    """Consistency distillation (Song, Dhariwal, Chen, Sutskever 2023) in a diffusion network's own
    form, on data, with the stage-1 network as teacher.

    The consistency function of a network is its DDIM step to index 0, f(x, k) = (alpha_0 / alpha_k)
    x + alpha_0 (r_0 - r_k) x0^(x, k) with r = sigma / alpha, which is x itself at k = 0: the boundary
    holds without further parametrisation, and a first-order network is already consistent. With
    neighbours a > b of a DDIM grid, a uniform over it, and f' the averaged student,

        x_a = alpha_a x1 + sigma_a x0,     x_b = the teacher's guided DDIM step from x_a,
        loss = mean over elements of sqrt((f(x_a, a) - f'(x_b, b))^2 + h^2) - h.

    Student and teacher are `rfkernels.models.NoisePrediction` of one schedule. Sample in one step, or
    in few with `rfkernels.sampling.ddim`.

    Attributes:
        grid_steps: N, a divisor of K; the grid is the indices j K/N - 1, j = 1 .. N, and 0.
        guidance_scale: g of the teacher, x0^_none + g (x0^_y - x0^_none); None for none.
        huber_c: h.

    Published are only the budget, 10,000 steps at batch 512, and that the result is sampled without
    guidance; grid, distance and boundary are not. The average is that of train.ema_decay.
    """

    name: ClassVar[str] = "rectified-diffusion-consistency"
    teacher: ClassVar[str] = "required"

    grid_steps: int = 40
    guidance_scale: float | None = None
    huber_c: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("grid_steps", self.grid_steps, 2)
        check_guidance(self.guidance_scale)
        check_huber(self.huber_c)

    def check_network(self, network: nn.Module) -> None:
        check_diffusion_network("model", network)

    def objective(self, setting: Setting) -> RectifiedDiffusionConsistencyObjective:
        return RectifiedDiffusionConsistencyObjective(setting, self)


class RectifiedDiffusionConsistencyObjective(DiffusionObjective):
    """t picks the place in the grid."""

    purpose: ClassVar[str] = "consistency index"

    def __init__(self, setting: Setting, recipe: RectifiedDiffusionConsistency) -> None:
        super().__init__(setting)
        total = check_teacher_grid(self.teacher, recipe.grid_steps)
        refuse_unguidable(setting, recipe.guidance_scale)
        self._recipe, self._stride = recipe, total // recipe.grid_steps
        self._average: NoisePrediction | None = None

    def attach(self, average: nn.Module) -> None:
        self.check_same_schedule(average)
        self._average = average

    def indices(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b): the neighbours in the grid, noisier first."""
        start = (whole_below(batch["t"], self._recipe.grid_steps) + 1) * self._stride - 1
        return start, (start - self._stride).clamp(min=0)

    def end(
        self, model: NoisePrediction, x: torch.Tensor, k: torch.Tensor, condition: Batch
    ) -> torch.Tensor:
        """The consistency function f(x, k)."""
        noise = self.noise(model, x, k, condition)
        return model.ddim_step(x, k, torch.zeros_like(k), noise)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        (a, b), condition = self.indices(batch), batch_condition(batch)
        with torch.no_grad():
            x_a = self.teacher.add_noise(batch["x1"], batch["x0"], a)
            x_b = self.teacher_step(x_a, a, b, condition, self._recipe.guidance_scale)
            target = self.end(self._average, x_b, b, condition)
        return self.huber(self.end(model, x_a, a, condition), target, self._recipe.huber_c)
