"""Consistency flow matching (Yang et al., "Consistency Flow Matching: Defining Straight Flows with
Velocity Consistency", 2024): straight flows within segments of time, from data alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rfkernels.flow.times import Uniform
from rfkernels.ops.flow_loss import flow_loss
from rfkernels.ops.ode_step import euler_step
from rfkernels.training.objective import Batch, Setting, SourceObjective, batch_condition
from rfkernels.training.option_checks import number, require, whole
from rfkernels.training.recipes.meanflow import check_own_loss
from rfkernels.training.recipes.options import check_moment, moment
from rfkernels.training.recipes.recipe import Recipe

__all__ = ["ConsistencyFM", "ConsistencyFMObjective"]


@dataclass(frozen=True, kw_only=True)
class ConsistencyFM(Recipe):
    """Consistency flow matching: neighbouring times point to the same end of their segment.

    With K equal segments of [0, 1], e(t) the end of t's (t is in (e - 1/K, e]), t uniform on
    [1e-3, 1], r = min(t + delta, 1) on the same straight path, and f(x, t) = x + (e(t) - t) v(x, t),

        L = 1/2 |f(x_t, t) - sg f(x_r, r)|^2 + alpha/2 |v(x_t, t) - sg v(x_r, r)|^2,

    squares averaged over elements. From r = boundary on, the second f (which has t's e too) is the
    path's own point x_e; the velocity term counts for t < boundary and e - t > 1.01 delta. In a
    first phase the boundary is 0, which is flow matching weighted by (e - t)^2. Both evaluations
    see the same dropout mask. The network is a plain velocity: sample it with "euler" in K steps or
    a multiple of K.

    Attributes:
        segments: K.
        delta: distance of the two times.
        boundary: of the second phase.
        first_phase: its end: a number of steps, or a fraction in (0, 1) of the run; 0 goes without.
        alpha: weight of the velocity term.
        time_least: least t; train's times are not used.

    Published (CIFAR-10): K = 2, delta 1e-3, alpha 1e-5, 100,000 steps of the first phase and
    200,000 of the second at boundary 0.9, batch 512. The published second phase is a run of its own
    with a new optimizer; here it goes on. The held-out loss is that of the velocity against
    x1 - x0.
    """

    name: ClassVar[str] = "consistency-fm"

    segments: int = 2
    delta: float = 1e-3
    boundary: float = 0.9
    first_phase: int | float = 1 / 3
    alpha: float = 1e-5
    time_least: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("segments", self.segments, 1)
        for name, rule in (("delta", "must be in (0, 1)"), ("boundary", "must be in (0, 1]")):
            value = number(name, getattr(self, name))
            require(0 < value < 1 or (name == "boundary" and value == 1), name, rule, value)
        check_moment("first_phase", self.first_phase, 0)
        require(number("alpha", self.alpha) >= 0, "alpha", "must not be negative", self.alpha)
        require(
            0 <= number("time_least", self.time_least) < 1,
            "time_least",
            "must be in [0, 1)",
            self.time_least,
        )
        check_own_loss(self.train)

    def objective(self, setting: Setting) -> ConsistencyFMObjective:
        return ConsistencyFMObjective(setting, self)


class ConsistencyFMObjective(SourceObjective):
    """The distance of two times' predicted ends of a segment, and of their velocities."""

    def __init__(self, setting: Setting, recipe: ConsistencyFM) -> None:
        super().__init__(setting)
        self._recipe = recipe
        self._distribution = Uniform(eps=recipe.time_least)

    def batch(self, step: int) -> Batch:
        recipe, draw = self._recipe, self.draw(step)
        t = self.times(step, self._distribution)
        end = (t * recipe.segments).ceil().clamp_(min=1.0) / recipe.segments
        batch = {**self.state(draw, t), "end": end, "xe": self.state(draw, end)["xt"]}
        if step >= moment(recipe.first_phase, self.train.steps):
            batch["r"] = (t + recipe.delta).clamp_(max=1.0)
            batch["xr"] = self.state(draw, batch["r"])["xt"]
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if "end" not in batch:  # held out
            return self.regression(self.velocity(model, batch), batch["target"])
        recipe, t, end = self._recipe, batch["t"], batch["end"]
        if "r" not in batch:
            v = self.velocity(model, batch)
            return self._half_square(euler_step(batch["xt"], v, end - t), batch["xe"])
        later = self._later(model, batch)
        v = self.velocity(model, batch)
        known = batch["r"] >= recipe.boundary
        target = euler_step(batch["xr"], later, end - batch["r"])
        target = torch.where(_column(known, target), batch["xe"], target)
        loss = self._half_square(euler_step(batch["xt"], v, end - t), target)
        counts = (t < recipe.boundary) & (end - t > 1.01 * recipe.delta)
        return loss + recipe.alpha * self._half_square(v, later, counts)

    @torch.no_grad()
    def _later(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """v(x_r, r), from the random state that v(x_t, t) will start from: the same dropout."""
        device = batch["xr"].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return self.call(model, batch["xr"], batch["r"], **batch_condition(batch))

    def _half_square(
        self, a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """1/2 |a - b|^2, averaged over elements and samples, those that do not count being 0."""
        weight = None if counts is None else counts.to(a.dtype)
        return 0.5 * flow_loss(a, b, weight=weight)


def _column(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return mask.reshape(-1, *[1] * (like.dim() - 1))
