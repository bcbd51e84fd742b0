"""Phased Rectified Diffusion (Wang, Yang, Huang, Fu, Li, "Rectified Diffusion: Straightness Is Not
Your Need in Rectified Flow", 2024): first-order within segments of the schedule, from data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rfkernels.ops.ode_step import linear_step
from rfkernels.training.objective import (
    Batch,
    Setting,
    batch_condition,
)
from rfkernels.training.option_checks import require, whole
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

__all__ = ["RectifiedDiffusionPhased"]


@dataclass(frozen=True, kw_only=True)
class RectifiedDiffusionPhased(Recipe):
    """A diffusion network made first-order within M segments of its schedule, so that M DDIM steps
    suffice; on data, with a teacher that is run while training.

    Segment m = 1 .. M runs from index a = m K/M - 1 down to e = a - K/M (0 for the last). For a data
    sample, noise and a uniform segment, with r = sigma / alpha,

    1. x_a = alpha_a x1 + sigma_a x0;
    2. grid_steps / M DDIM steps of the teacher, guided, lead to x_e;
    3. noise* = (x_e / alpha_e - x_a / alpha_a) / (r_e - r_a), the slope of a first-order path;
    4. k uniform over the whole indices of (e, a], x_k = alpha_k (x_a / alpha_a + (r_k - r_a) noise*);
    5. x_e^ = alpha_e (x_k / alpha_k + (r_e - r_k) x0^), x0^ the student's noise estimate at (x_k, k);
       loss = mean over elements of sqrt((x_e^ - x_e)^2 + h^2) - h.

    Student and teacher are `rfkernels.models.NoisePrediction` of one schedule.

    Attributes:
        segments: M, a divisor of grid_steps.
        grid_steps: indices of the teacher's DDIM grid, a divisor of K.
        guidance_scale: g of the teacher, x0^_none + g (x0^_y - x0^_none); None for none. The paper's
            w is g - 1.
        huber_c: h.

    Published: Stable Diffusion 1.5 with g = 3, XL with g = 7.5; M = 4, grid 40, h = 1e-3, AdamW,
    learning rate 5e-6, batch 20 (XL: 5) on each of 8 processes, 20,000 steps, EMA 0.9999, the
    schedule left as it is. Sampled in 4 DDIM steps at guidance 1.5.
    """

    name: ClassVar[str] = "rectified-diffusion-phased"
    teacher: ClassVar[str] = "required"

    segments: int = 4
    grid_steps: int = 40
    guidance_scale: float | None = None
    huber_c: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("segments", self.segments, 1)
        whole("grid_steps", self.grid_steps, 1)
        require(
            self.grid_steps % self.segments == 0,
            "segments",
            f"must divide grid_steps, {self.grid_steps}",
            self.segments,
        )
        check_guidance(self.guidance_scale)
        check_huber(self.huber_c)

    def check_network(self, network: nn.Module) -> None:
        check_diffusion_network("model", network)

    def objective(self, setting: Setting) -> RectifiedDiffusionPhasedObjective:
        return RectifiedDiffusionPhasedObjective(setting, self)


class RectifiedDiffusionPhasedObjective(DiffusionObjective):
    """Batches also hold the segment 0 .. M - 1; t places k in it."""

    purpose: ClassVar[str] = "phased index"

    def __init__(self, setting: Setting, recipe: RectifiedDiffusionPhased) -> None:
        super().__init__(setting)
        total = check_teacher_grid(self.teacher, recipe.grid_steps)
        require(
            recipe.segments < total,
            "segments",
            f"must be fewer than the steps of the teacher's schedule, {total}",
            recipe.segments,
        )
        refuse_unguidable(setting, recipe.guidance_scale)
        self._recipe, self._length = recipe, total // recipe.segments

    def attach(self, average: nn.Module) -> None:
        self.check_same_schedule(average)

    def batch(self, step: int) -> Batch:
        segment = whole_below(self.uniform("phased segment", step), self._recipe.segments)
        return {**super().batch(step), "segment": segment}

    def held_out(self) -> Batch | None:
        batch = super().held_out()
        if batch is None:
            return None
        place = torch.arange(len(batch["t"]), device=batch["t"].device)
        return {**batch, "segment": place % self._recipe.segments}

    def indices(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(a, k, e): where the segments of a batch start, where the student is asked, their ends."""
        start = (batch["segment"] + 1) * self._length - 1
        end = (start - self._length).clamp(min=0)
        inside = (batch["t"].double() * (start - end)).long()
        return start, torch.minimum(end + 1 + inside, start), end

    @torch.no_grad()
    def states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_a, x_k, x_e) of a batch, (b, ...) each: steps 1 to 4."""
        (a, k, e), schedule, recipe = self.indices(batch), self.teacher.schedule, self._recipe
        x_a = self.teacher.add_noise(batch["x1"], batch["x0"], a)
        steps = recipe.grid_steps // recipe.segments
        condition = batch_condition(batch)
        x_e = self.teacher_steps(x_a, a, self._length, steps, condition, recipe.guidance_scale)
        gap = schedule.noise_ratio_at(e) - schedule.noise_ratio_at(a)
        alpha_a, alpha_e = (schedule.coefficients(index)[0] for index in (a, e))
        slope = linear_step(x_e, (x_a,), (-1 / (alpha_a * gap),), x_coefficient=1 / (alpha_e * gap))
        return x_a, self.teacher.ddim_step(x_a, a, k, slope), x_e

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        _, k, e = self.indices(batch)
        _, x_k, x_e = self.states(batch)
        noise = self.noise(model, x_k, k, batch_condition(batch))
        return self.huber(model.ddim_step(x_k, k, e, noise), x_e, self._recipe.huber_c)
