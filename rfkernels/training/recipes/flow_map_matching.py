"""Flow maps learnt by self-distillation: the velocity at the map's own end, or its own two parts,
are the target (Boffi, Albergo, Vanden-Eijnden, "How to build a consistency model: learning flow maps
via self-distillation", 2025; Guo et al., "SplitMeanFlow", 2025).

With u(x, t, h) the network, X(x, t, t + h) = x + h u(x, t, h) is where the flow takes x. On the
diagonal, h = 0, both recipes learn the velocity by flow matching; off it, intervals [t, t + h]
between two uniform times learn from what the network knows already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rfkernels.ops.ode_step import linear_step
from rfkernels.training.objective import (
    Batch,
    Setting,
    SourceObjective,
    batch_condition,
    per_sample,
)
from rfkernels.training.option_checks import number, require
from rfkernels.training.recipes.meanflow import check_own_loss, exact_network
from rfkernels.training.recipes.recipe import Recipe

__all__ = ["LagrangianSelfDistillation", "SplitMeanFlow"]


@dataclass(frozen=True, kw_only=True)
class _FlowMapMatching(Recipe):
    """What both recipes have."""

    flow_map: ClassVar[bool] = True
    sample_solver: ClassVar[str] = "flow-map"

    span_fraction: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction = number("span_fraction", self.span_fraction)
        require(0 <= fraction <= 1, "span_fraction", "must be in [0, 1]", self.span_fraction)
        check_own_loss(self.train)


@dataclass(frozen=True, kw_only=True)
class LagrangianSelfDistillation(_FlowMapMatching):
    """Lagrangian self-distillation: the map moves with the velocity at the point it has reached.

    Off the diagonal, with e = t + h and y = X(x_t, t, e),

        |dX/de - sg u(sg y, e, 0)|^2,   dX/de = u(x_t, t, h) + h d_h u(x_t, t, h),

    one forward derivative in h alone, tangents (0, 0, 1) in (x, t, h), with a gradient through it;
    it needs no derivative in x. Sample with solver "flow-map".

    Attributes:
        span_fraction: fraction of the samples off the diagonal, spread evenly over steps.

    Published: 25 % off the diagonal. The learnt weights of the losses of the published code are
    left out. train's time distribution is that of both times. The held-out loss is that of the
    velocity.
    """

    name: ClassVar[str] = "lagrangian-self-distillation"

    def objective(self, setting: Setting) -> LagrangianObjective:
        return LagrangianObjective(setting, self)


@dataclass(frozen=True, kw_only=True)
class SplitMeanFlow(_FlowMapMatching):
    """SplitMeanFlow: the average over an interval is that of its two parts, without a derivative.

    Off the diagonal, with a uniform part l and m = t + l h,

        |u(x_t, t, h) - sg(l u(x_t, t, l h) + (1 - l) u(y, m, (1 - l) h))|^2,
        y = x_t + l h u(x_t, t, l h).

    Sample with solver "flow-map".

    Attributes:
        span_fraction: fraction of the samples off the diagonal, spread evenly over steps.
            Users of the published code found that above a fifth the network can fall to a trivial
            solution.

    train's time distribution is that of both times. The held-out loss is that of the velocity.
    """

    name: ClassVar[str] = "split-meanflow"

    span_fraction: float = 0.15

    def objective(self, setting: Setting) -> SplitObjective:
        return SplitObjective(setting, self)


class _FlowMapObjective(SourceObjective):
    """Flow matching where h = 0; where it is not, the residual that a subclass defines."""

    def __init__(self, setting: Setting, recipe: _FlowMapMatching) -> None:
        super().__init__(setting)
        self._fraction = recipe.span_fraction

    def batch(self, step: int) -> Batch:
        one = self.scaled(self.times(step, purpose="first time"))
        two = self.scaled(self.times(step, purpose="second time"))
        # On the diagonal the first time alone, so that it has the whole distribution.
        averages = self.chosen(step, self._fraction)
        batch = self.state(self.draw(step), torch.where(averages, torch.minimum(one, two), one))
        batch["span"] = (one - two).abs() * averages
        return batch

    def held_out(self) -> Batch | None:
        batch = super().held_out()
        return None if batch is None else {**batch, "span": torch.zeros_like(batch["t"])}

    def off_diagonal(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        """The rows with h > 0, and what they hold. Without any, one row stands in for them, so that
        processes that share the weights make the same calls."""
        rows = (batch["span"] > 0).nonzero()[:, 0]
        return rows, {n: v[rows if len(rows) else slice(0, 1)] for n, v in batch.items()}

    def average(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The network on a batch's own states, times and spans."""
        condition = batch_condition(batch)
        return self.call(model, batch["xt"], batch["t"], span=batch["span"], **condition)


class LagrangianObjective(_FlowMapObjective):
    """The derivative of the map in its end against the velocity there."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        prediction = self.average(model, batch)
        rows, part = self.off_diagonal(batch)
        x, t, span, condition = part["xt"], part["t"], part["span"], batch_condition(part)
        network = exact_network(model, condition)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
            _, slope = torch.func.jvp(lambda h: network(x, t, h), (span,), (torch.ones_like(span),))
        with torch.no_grad():
            reached = linear_step(x, (prediction[rows if len(rows) else slice(0, 1)],), (span,))
            there = self.call(model, reached, t + span, span=torch.zeros_like(span), **condition)
        if not len(rows):
            return self.regression(prediction + 0.0 * slope.sum(), batch["target"])
        prediction = prediction.index_add(0, rows, per_sample(span, slope) * slope)
        return self.regression(prediction, batch["target"].index_copy(0, rows, there))


class SplitObjective(_FlowMapObjective):
    """One interval against its two parts."""

    def batch(self, step: int) -> Batch:
        return {**super().batch(step), "part": self.uniform("part", step)}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.regression(self.average(model, batch), self.targets(model, batch))

    @torch.no_grad()
    def targets(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """x1 - x0 on the diagonal, the mean of the two parts off it."""
        if "part" not in batch:  # held out
            return batch["target"]
        rows, part = self.off_diagonal(batch)
        x, t, condition, share = part["xt"], part["t"], batch_condition(part), part["part"]
        first_span = share * part["span"]
        first = self.call(model, x, t, span=first_span, **condition)
        middle = linear_step(x, (first,), (first_span,))
        rest = part["span"] - first_span
        second = self.call(model, middle, t + first_span, span=rest, **condition)
        mean = linear_step(first, (second,), (1.0 - share,), x_coefficient=share)
        return batch["target"].index_copy(0, rows, mean) if len(rows) else batch["target"]
