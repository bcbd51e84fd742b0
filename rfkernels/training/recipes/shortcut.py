"""Shortcut models (Frans, Hafner, Levine, Abbeel, "One Step Diffusion via Shortcut Models", 2024):
one network for every step size, which learns large steps from two of its own half as large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rfkernels.ops.ode_step import linear_step
from rfkernels.training.objective import (
    Batch,
    Setting,
    SourceObjective,
    batch_condition,
    spread_times,
)
from rfkernels.training.option_checks import number, require, whole
from rfkernels.training.recipes.meanflow import check_own_loss
from rfkernels.training.recipes.recipe import Recipe

__all__ = ["Shortcut", "ShortcutObjective"]


@dataclass(frozen=True, kw_only=True)
class Shortcut(Recipe):
    """Shortcut models: u(x, t, d) of a step d agrees with two steps of d/2.

    The steps are d = 1, 1/2, ..., 1/M and t is uniform on the grid of d (train's times are not
    used). Most samples learn the velocity
    as the smallest step, |u(x_t, t, 1/M) - (x1 - x0)|^2. The others, with d > 1/M, learn

        |u(x_t, t, d) - sg clip((b1 + b2) / 2)|^2,
        b1 = u'(x_t, t, d/2),   b2 = u'(clip(x_t + d/2 b1), t + d/2, d/2),

    with u' the averaged network (EMA) and clip to [-clip, clip]. No teacher, no derivative. The
    network is a flow map, whose span is d. Sample with solver "flow-map" in 1, 2, 4, ... M uniform
    steps: other spans are not learnt, and the velocity is the one of span 1/M, not of span 0.

    Attributes:
        finest: M, a power of two.
        bootstrap_fraction: fraction of the samples that learn from the network's own steps, spread
            evenly over steps.
        clip: bound of states and targets; the data is expected in [-1, 1] or of unit variance.
        target_guidance_scale: classifier-free guidance of b1 and b2 where d/2 = 1/M, from where it
            spreads to the larger steps, so that sampling needs no second call; 1 for none. The
            smallest step itself stays unguided.

    Published (ImageNet 256, latents, DiT-XL; FID 10.6, 7.8 and 3.8 in 1, 4 and 128 steps,
    second-hand): M = 128, clip 4, EMA 0.999 (train.ema_decay), AdamW at 1e-4 with decay 0.1, label
    dropout 0.1. The paper bootstraps a quarter of the samples, its code an eighth. The code shares
    the steps d out in equal numbers and drops no labels of bootstrapped samples; here d is drawn,
    and labels are dropped everywhere. The held-out loss is that of the smallest step.
    """

    name: ClassVar[str] = "shortcut"
    flow_map: ClassVar[bool] = True
    sample_solver: ClassVar[str] = "flow-map"
    learns_velocity: ClassVar[bool] = False

    finest: int = 128
    bootstrap_fraction: float = 0.25
    clip: float = 4.0
    target_guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("finest", self.finest, 2)
        require(
            self.finest & (self.finest - 1) == 0,
            "finest",
            "must be a power of two",
            self.finest,
        )
        fraction = number("bootstrap_fraction", self.bootstrap_fraction)
        require(
            0 <= fraction <= 1, "bootstrap_fraction", "must be in [0, 1]", self.bootstrap_fraction
        )
        require(number("clip", self.clip) > 0, "clip", "must be positive", self.clip)
        number("target_guidance_scale", self.target_guidance_scale)
        check_own_loss(self.train)
        require(
            not self.train.sample_every or self.finest % self.train.sample_steps == 0,
            "train.sample_steps",
            f"must be a power of two up to {self.finest}, whose steps are learnt",
            self.train.sample_steps,
        )

    def objective(self, setting: Setting) -> ShortcutObjective:
        return ShortcutObjective(setting, self)


class ShortcutObjective(SourceObjective):
    """Flow matching at the smallest step, agreement of one step with two at the others."""

    _average: nn.Module

    def __init__(self, setting: Setting, recipe: Shortcut) -> None:
        super().__init__(setting)
        self._recipe = recipe
        self._guided = recipe.target_guidance_scale != 1.0
        if self._guided:
            conditional = "y" in self.source.draw(0, 1).condition
            require(
                conditional and setting.null_label is not None,
                "target_guidance_scale",
                "guidance in the target needs labels and a network with a null_label",
                recipe.target_guidance_scale,
            )

    def attach(self, average: nn.Module) -> None:
        self._average = average

    def batch(self, step: int) -> Batch:
        sizes = self._recipe.finest.bit_length() - 1  # log2 M: d = 1, ..., 2/M
        power = (self.uniform("step size", step) * sizes).floor().clamp_(max=sizes - 1)
        learns = self.chosen(step, self._recipe.bootstrap_fraction)
        power = torch.where(learns, power, float(sizes))
        count = torch.exp2(power)  # steps of size d from 0 to 1; exact, as is all that follows
        place = (self.uniform("time", step) * count).floor()
        batch = self.state(self.draw(step), place / count)
        batch["span"] = 1.0 / count
        return batch

    def held_out(self) -> Batch | None:
        draw = self.source.held_out()
        if draw is None:
            return None
        finest = self._recipe.finest
        batch = self.state(draw, (spread_times(draw) * finest).floor() / finest)
        batch["span"] = torch.full_like(batch["t"], 1.0 / finest)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        prediction = self.call(
            model, batch["xt"], batch["t"], span=batch["span"], **batch_condition(batch)
        )
        return self.regression(prediction, self._targets(batch))

    @torch.no_grad()
    def _targets(self, batch: Batch) -> torch.Tensor:
        """x1 - x0 at the smallest step, the mean of two steps at the others."""
        rows = (batch["span"] > 1.0 / self._recipe.finest).nonzero()[:, 0]
        # Without any, one row is evaluated for nothing: processes that share the weights stay in
        # step.
        part = {name: value[rows if len(rows) else slice(0, 1)] for name, value in batch.items()}
        x, t, half, bound = part["xt"], part["t"], part["span"] / 2, self._recipe.clip
        condition = batch_condition(part)
        first = self._step(x, t, half, condition)
        middle = linear_step(x, (first,), (half,)).clamp_(-bound, bound)
        second = self._step(middle, t + half, half, condition)
        mean = linear_step(first, (second,), (0.5,), x_coefficient=0.5).clamp_(-bound, bound)
        return batch["target"].index_copy(0, rows, mean) if len(rows) else batch["target"]

    def _step(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        span: torch.Tensor,
        condition: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """u' at (x, t, span), guided in the rows of the smallest step."""
        value = self.call(self._average, x, t, span=span, **condition)
        if not self._guided:
            return value
        null = {"y": torch.full_like(condition["y"], self.setting.null_label)}
        lacking = self.call(self._average, x, t, span=span, **{**condition, **null})
        scale = torch.where(
            span == 1.0 / self._recipe.finest, self._recipe.target_guidance_scale, 1.0
        )
        return linear_step(lacking, (value,), (scale,), x_coefficient=1.0 - scale)
