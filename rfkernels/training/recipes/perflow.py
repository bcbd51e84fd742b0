"""PeRFlow (Yan, Liu, Pan, Liew, Feng, "PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play
Accelerator", 2024): a flow made straight within windows of time, from data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rfkernels.models.noise_prediction import NoisePrediction
from rfkernels.models.windowed_prediction import (
    EPSILON_TARGETS,
    check_windows,
    window_coefficients,
)
from rfkernels.ops.interpolate import interpolate
from rfkernels.ops.ode_step import linear_step
from rfkernels.sampling import get_solver, sample
from rfkernels.training.config import check_linear
from rfkernels.training.objective import (
    Batch,
    Setting,
    SourceObjective,
    batch_condition,
    per_sample,
)
from rfkernels.training.option_checks import require, whole
from rfkernels.training.recipes.diffusion import (
    DiffusionObjective,
    check_guidance,
    refuse_unguidable,
    whole_below,
)
from rfkernels.training.recipes.recipe import Recipe

__all__ = ["PeRFlow"]


@dataclass(frozen=True, kw_only=True)
class PeRFlow(Recipe):
    """Reflow inside each of K equal windows of time, whose starts are noised data: no pairs are
    stored, and the data keep the flow near the truth.

    With t uniform, [t_a, t_e) its window and x_a = (1 - t_a) x0 + t_a x1, the teacher's flow leads
    from x_a to x_e at t_e, and on the line between them

        x_t = x_a + (t - t_a) / (t_e - t_a) (x_e - x_a),   target velocity (x_e - x_a) / (t_e - t_a).

    A network of the straight path learns that velocity by the loss of `train`. A
    `rfkernels.models.NoisePrediction` (student and teacher, of one schedule) stays what it is: x_a
    is a state of its schedule, the teacher takes DDIM steps, times are the schedule's indices, and
    the target is noise* = (x_e - l x_a) / n of `window_coefficients`; sample it through
    `rfkernels.models.windowed_prediction.WindowedNoisePrediction`. Both are sampled by Euler on
    `rfkernels.sampling.windows.WindowGrid(K)`, in K steps or more.

    Attributes:
        windows: K.
        teacher_steps: in a window.
        teacher_solver: of a velocity teacher; diffusion networks take DDIM steps.
        guidance_scale: of the teacher; None for none, and then the student is guided when sampled.
        epsilon_target: "ddim" or "diffused" noise*, for diffusion networks.

    Published: K = 4; Stable Diffusion 1.5 with 8 teacher steps, XL with 10; guidance 7.5, or none
    with captions dropped; AdamW, learning rate 8e-5 at batch 32 on each process, about 4,000 steps at
    batch 1024 in all. The published "diffused" weights belong to the first release.
    """

    name: ClassVar[str] = "perflow"
    teacher: ClassVar[str] = "required"

    windows: int = 4
    teacher_steps: int = 8
    teacher_solver: str = "euler"
    guidance_scale: float | None = None
    epsilon_target: str = "ddim"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("windows", self.windows, 1)
        whole("teacher_steps", self.teacher_steps, 1)
        require(
            not get_solver(self.teacher_solver).adaptive,
            "teacher_solver",
            "must take fixed steps",
            self.teacher_solver,
        )
        check_guidance(self.guidance_scale)
        require(
            self.epsilon_target in EPSILON_TARGETS,
            "epsilon_target",
            f"must be one of {', '.join(EPSILON_TARGETS)}",
            self.epsilon_target,
        )
        check_linear(self.train, "windows are cut of the linear path")

    def objective(self, setting: Setting) -> SourceObjective:
        refuse_unguidable(setting, self.guidance_scale)
        if isinstance(setting.teacher, NoisePrediction):
            check_windows(setting.teacher, self.windows, self.epsilon_target)
            total = setting.teacher.schedule.steps
            rule = f"must be fewer than the steps of the teacher's schedule, {total}"
            require(self.windows < total, "windows", rule, self.windows)
            return PeRFlowNoiseObjective(setting, self)
        return PeRFlowObjective(setting, self)


class _Windowed(DiffusionObjective):
    """t is a time in [0, 1)."""

    purpose: ClassVar[str] = "window time"

    def __init__(self, setting: Setting, recipe: PeRFlow) -> None:
        super().__init__(setting)
        self._recipe = recipe


class PeRFlowObjective(_Windowed):
    """For velocity networks."""

    def states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, target velocity), (b, ...) each."""
        count, t = self._recipe.windows, batch["t"]
        start = whole_below(t, count).to(t.dtype) / count
        x_a = interpolate(batch["x1"], start, x0=batch["x0"]).xt
        x_e = self.window_end(x_a, start, batch_condition(batch))
        target = linear_step(x_e, (x_a,), (-count,), x_coefficient=count)
        return x_a + per_sample(t - start, x_a) * target, target

    @torch.no_grad()
    def window_end(self, x_a: torch.Tensor, start: torch.Tensor, condition: Batch) -> torch.Tensor:
        """Where the teacher's flow takes x_a at times start (b,) within a window."""
        recipe = self._recipe
        length = 1.0 / recipe.windows

        def inside(x: torch.Tensor, u: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
            t = (start + u.to(start.dtype) * length).clamp(max=1.0)
            return length * self.call(self.teacher, x, t, **condition)

        guided = recipe.guidance_scale is not None
        return sample(
            inside,
            x_a,
            steps=recipe.teacher_steps,
            solver=recipe.teacher_solver,
            condition=condition,
            uncondition={} if guided else None,
            guidance_scale=recipe.guidance_scale,
        )

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        xt, target = self.states(batch)
        found = self.call(model, xt, batch["t"], **batch_condition(batch))
        return self.regression(found, target)


class PeRFlowNoiseObjective(_Windowed):
    """For diffusion networks; noise levels are whole multiples 1 .. K of 1 / K, K the indices."""

    def attach(self, average: nn.Module) -> None:
        check_windows(average, self._recipe.windows, self._recipe.epsilon_target)
        self.check_same_schedule(average)

    @torch.no_grad()
    def states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(z, K s, noise*): states on the windows' lines, their levels (b,) and the target."""
        recipe, schedule = self._recipe, self.teacher.schedule
        length = schedule.steps // recipe.windows
        level = schedule.steps - whole_below(batch["t"], schedule.steps)
        start = -(-level // length) * length
        end = start - length
        z_a = self.teacher.add_noise(batch["x1"], batch["x0"], start - 1)
        z_e = self.teacher_steps(
            z_a,
            start - 1,
            length,
            recipe.teacher_steps,
            batch_condition(batch),
            recipe.guidance_scale,
        )
        share = (start - level).double() / length
        z = linear_step(z_a, (z_e,), (share,), x_coefficient=1 - share)
        keep, gain = window_coefficients(schedule, start, end, recipe.epsilon_target)
        noise = linear_step(z_e, (z_a,), (-keep / gain,), x_coefficient=1 / gain)
        return z, level, noise

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        z, level, noise = self.states(batch)
        found = self.call(model, z, None, index=level, **batch_condition(batch))
        return self.regression(found, noise)
