"""SlimFlow (Zhu, Liu, Liu, "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified
Flow", 2024): reflow and one-step distillation into a network smaller than the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from rfkernels.ops.ode_step import linear_step
from rfkernels.training.config import Distance, TrainConfig
from rfkernels.training.objective import Batch, Setting, SourceObjective, batch_condition, source_of
from rfkernels.training.option_checks import number, require
from rfkernels.training.recipes.options import (
    check_distance,
    check_moment,
    moment,
    refuse_named,
)
from rfkernels.training.recipes.recipe import PairRecipe
from rfkernels.training.recipes.rectified_flow import FlowObjective, mean_distance
from rfkernels.training.sources import Draw

__all__ = ["SlimFlowDistill", "SlimFlowReflow", "two_step_target"]

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - min(1.0, done),
    "exp": lambda done: math.exp(-done),
    "cosine": lambda done: (1.0 + math.cos(math.pi * min(1.0, done))) / 2.0,
}


@dataclass(frozen=True, kw_only=True)
class SlimFlowReflow(PairRecipe):
    """SlimFlow's annealing reflow: pairs of a teacher, learnt by a smaller network from scratch.

    At step k the noise z of a pair (z, x1) is mixed with fresh noise z',

        z_b = sqrt(1 - b^2) z + b z',   x_t = (1 - t) z_b + t x1,   target x1 - z_b,

    so that b = 1 trains an ordinary flow on the teacher's samples, which a small network learns
    fast, and b = 0 is reflow. z_b is standard normal for every b. The loss is the mean square and t
    uniform; the held-out loss is that of reflow (b = 0) throughout.

    Attributes:
        anneal: b over the run: "linear" (1 - min(1, k / K)), "exp" (exp(-k / K)), "cosine"
            ((1 + cos(pi min(1, k / K))) / 2), or a number in [0, 1], which stays.
        anneal_steps: K. A whole number counts steps, a fraction in (0, 1) is that of train.steps.
        flip: mirrors z and x1 together, left to right, each sample with probability 1/2. It doubles
            the pairs of a teacher of photographs, whose flow commutes with the mirror. Off by
            default, since it teaches mirrored images where the data has none (digits, writing); the
            paper's runs have it on.

    Published (CIFAR-10): linear, K = 300,000 of 800,000 steps, flip, Adam at 2e-4 with 5,000 steps
    of warm-up, batch 128, clip 1.0, EMA 0.999999, dropout 0.15, t >= 1e-3 (train.time_min), about
    50,000 pairs of RK45. Its code mirrors a whole batch on one coin; here every sample has its own.
    """

    name: ClassVar[str] = "slimflow-reflow"

    anneal: str | float = "linear"
    anneal_steps: int | float = 0.375
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.anneal, str):
            require(
                self.anneal in _SCHEDULES,
                "anneal",
                f"must be one of {', '.join(_SCHEDULES)} or a number",
                self.anneal,
            )
        else:
            value = number("anneal", self.anneal)
            require(0 <= value <= 1, "anneal", "must be in [0, 1]", self.anneal)
        check_moment("anneal_steps", self.anneal_steps, 1)
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip: must be true or false; got {self.flip!r}")

    def noise_share(self, step: int) -> float:
        """b at a step, in [0, 1]."""
        if not isinstance(self.anneal, str):
            return float(self.anneal)
        return _SCHEDULES[self.anneal](step / moment(self.anneal_steps, self.train.steps))

    def objective(self, setting: Setting) -> SlimFlowReflowObjective:
        return SlimFlowReflowObjective(setting, self)


class SlimFlowReflowObjective(FlowObjective):
    """Reflow whose pairs are mirrored and annealed."""

    def __init__(self, setting: Setting, recipe: SlimFlowReflow) -> None:
        super().__init__(setting)
        self._recipe = recipe
        shape = tuple(self.source.sample_shape)
        require(not recipe.flip or len(shape) == 3, "flip", "needs images (C, H, W)", shape)

    def batch(self, step: int) -> Batch:
        # Accesses an element: mirroring 4 (z and x1, in and out), annealing 2 (z in and out, its
        # noise drawn in the kernel), the state 4. Typed plainly it is about 18. Where z is drawn,
        # not stored, and neither mirrored nor annealed, `state` draws it in the kernel as well: 3.
        draw, share = self.draw(step), self._recipe.noise_share(step)
        if self._recipe.flip:
            draw = self._mirrored(draw, step)
        if share > 0.0:
            draw = draw._replace(x0=self._annealed(source_of(draw), step, share))
        return self.state(draw, self.scaled(self.times(step)))

    def _mirrored(self, draw: Draw, step: int) -> Draw:
        width = draw.x1.shape[-1]
        column = torch.arange(width, device=draw.x1.device)
        coin = self.uniform("flip", step) < 0.5
        # One gather with an index that is not stored: a choice between x and its mirror, or rows by
        # a mask, would cost more passes or wait for the device.
        index = torch.where(coin[:, None], width - 1 - column, column)
        index = index.reshape(len(coin), *[1] * (draw.x1.dim() - 2), width).expand(draw.x1.shape)
        x0 = source_of(draw).gather(-1, index)
        return draw._replace(x1=draw.x1.gather(-1, index), x0=x0)

    def _annealed(self, z: torch.Tensor, step: int, share: float) -> torch.Tensor:
        first = step * self.train.batch_size + self._share.start
        return linear_step(
            z,
            (),
            (),
            x_coefficient=math.sqrt(1.0 - share * share),
            noise_scale=share,
            seed=self._seed("annealing noise"),
            offset=torch.arange(first, first + len(z), device=z.device),
        )


@dataclass(frozen=True, kw_only=True)
class SlimFlowDistill(PairRecipe):
    """SlimFlow's flow-guided distillation: a small 2-RF becomes a one-step network.

    With u(z) = v(z, 0), pairs (z, x1) and fresh noise z' in the second term,

        L = D(z + u(z), x1) + w E_r D(z' + u(z'), y_r),
        x_r = z' + r u(z'),   y_r = x_r + (1 - r) v_teacher(x_r, r),

    where y_r has no gradient: the teacher corrects the rest of the student's own step. Give the
    annealed 2-RF of the small size as `teacher`, whose EMA weights the student starts from, and the
    pairs that it learnt from as `pairs` (the folder `pairs` of its run). Without `pairs` the
    teacher makes new ones, which are worse: it is the small one.

    Attributes:
        distance: D: "l2", with the loss of `train`, or a callable(prediction, target) -> (B,) losses
            or their mean.
        two_step_weight: w; 0 leaves plain distillation.
        r_range: r is uniform between these.

    Published: D is LPIPS of both images at 64 x 64, w = 1, Adam at 2e-4, 400,000 steps, batch 128.
    The paper draws r from U(0, 1) and moves to x_r by the teacher; here, as in its code, r is in
    (0.2, 0.8) and the student moves. Its code gives the network (1 - e) z + e x1 at time e = 1e-3, a
    leak of the answer; here it is z at time 0. It also starts from the last weights of the 2-RF.
    """

    name: ClassVar[str] = "slimflow-distill"

    distance: str | Distance = "l2"
    two_step_weight: float = 1.0
    r_range: tuple[float, float] = (0.2, 0.8)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1500, learning_rate=1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distance(self.distance, self.train)
        require(
            number("two_step_weight", self.two_step_weight) >= 0,
            "two_step_weight",
            "must not be negative",
            self.two_step_weight,
        )
        require(
            isinstance(self.r_range, (tuple, list)) and len(self.r_range) == 2,
            "r_range",
            "must be two numbers",
            self.r_range,
        )
        least, most = (number("r_range", r) for r in self.r_range)
        object.__setattr__(self, "r_range", (least, most))  # JSON gives a list back
        require(0 <= least <= most <= 1, "r_range", "must be 0 <= least <= most <= 1", self.r_range)

    def objective(self, setting: Setting) -> SlimFlowDistillObjective:
        refuse_named(distance=self.distance)
        return SlimFlowDistillObjective(setting, self)


class SlimFlowDistillObjective(SourceObjective):
    """The distance to a pair's end, and to the end of two steps from fresh noise.

    Held-out samples have the first term alone.
    """

    def __init__(self, setting: Setting, recipe: SlimFlowDistill) -> None:
        super().__init__(setting)
        self._recipe = recipe

    def batch(self, step: int) -> Batch:
        draw, recipe = self.draw(step), self._recipe
        batch = self._paired(draw)
        if recipe.two_step_weight:
            least, most = recipe.r_range
            u = self.uniform("two-step time", step).to(draw.x1.dtype)
            batch["r"] = least + (most - least) * u
            batch["fresh"] = self.fresh_noise(draw, step, "two-step noise")
        return batch

    def held_out(self) -> Batch | None:
        draw = self.source.held_out()
        return None if draw is None else self._paired(draw)

    def _paired(self, draw: Draw) -> Batch:
        zero = torch.zeros(len(draw.x1), device=draw.x1.device)
        return {**self.state(draw, zero), "x1": draw.x1}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        z = batch["xt"]
        loss = self._distance(z + self.velocity(model, batch), batch["x1"])
        if "fresh" not in batch:
            return loss
        fresh, r, condition = batch["fresh"], batch["r"], batch_condition(batch)
        u = self.call(model, fresh, batch["t"], **condition)
        target = two_step_target(
            lambda x, t: self.call(self.teacher, x, t, **condition), fresh, u, r
        )
        return loss + self._recipe.two_step_weight * self._distance(fresh + u, target)

    def _distance(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if callable(self._recipe.distance):
            return mean_distance(self._recipe.distance, prediction, target)
        return self.regression(prediction, target)


@torch.no_grad()
def two_step_target(
    teacher: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    z: torch.Tensor,
    u: torch.Tensor,
    r: torch.Tensor,
) -> torch.Tensor:
    """Where the teacher's Euler step from r to 1 ends, after a step of u from noise z to time r.

    Args:
        teacher: velocity(x, t).
        z, u: noise and a velocity at it, (B, ...).
        r: (B,) times in [0, 1].

    Returns:
        (B, ...) without gradient: x_r + (1 - r) teacher(x_r, r), x_r = z + r u.
    """
    state = linear_step(z, (u.detach(),), (r,))
    return linear_step(state, (teacher(state, r),), (1.0 - r,))
