"""Re-MeanFlow: MeanFlow on the pairs of a teacher's flow, one reflow and one distillation at once.

(Re-MeanFlow, rectified MeanFlow, 2025; the constants are those of its code, which counts time from
the data. On a teacher's pairs paths hardly cross, so that the average velocity is close to the
velocity and the regression has little noise.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from rfkernels.flow.times import LogitNormal, UShaped
from rfkernels.training.config import TrainConfig
from rfkernels.training.objective import Batch, Setting, source_of
from rfkernels.training.option_checks import number, require
from rfkernels.training.recipes.meanflow import MeanFlowObjective, MeanFlowOptions
from rfkernels.training.recipes.options import check_moment, moment
from rfkernels.training.recipes.recipe import PairRecipe

__all__ = ["ReMeanFlow", "ReMeanFlowObjective"]

_QUANTILE_PAIRS = 4096  # pairs whose lengths give the quantile of `prune`


@dataclass(frozen=True, kw_only=True)
class ReMeanFlow(MeanFlowOptions, PairRecipe):
    """Re-MeanFlow: MeanFlow on a teacher's pairs, with times of its own.

    The loss is MeanFlow's (see there) on pairs (x0, x1), with p = 1/2, and the intervals [t, t + h]

        t from the U-shape (a = 4), at least time_least;   gap = sigmoid(-0.8 + n), n normal;
        t + h = min(t + gap, 1), and 1 where t < 0.2 and t + h > 0.6,

    so that the intervals that one step needs are frequent. The network is a flow map: give one as
    the model, since a teacher that is a velocity does not take spans. Sample with "flow-map".

    Attributes:
        a: of the U-shape.
        gap_mean, gap_std: of the logit-normal gap.
        time_least: least t. The published 1/81 is sigma = 80 of an EDM teacher; a rectified flow
            begins at 0.
        prune: fraction of the pairs, the longest ones by |x1 - x0|, that are given no weight; the
            quantile is estimated on up to 4096 pairs.
        guided_steps: until when the target has the guidance of target_guidance_scale and _mix in
            it: a number of steps, or a fraction in (0, 1) of the run; None for all of it. (The
            option guidance_scale is that of the pairs.)

    Published (ImageNet-64; FID 2.87 in one step, second-hand, at a tenth of the cost of 2-RF++): p =
    0.5, c = 0.01, 25 % of averages, guidance 2.5 for 50,000 of 100,000 steps, time_least 1/81, and
    the longest pairs left out; how many is not known here, hence prune = 0 by default.
    """

    name: ClassVar[str] = "re-meanflow"

    weight_power: float = 0.5
    a: float = 4.0
    gap_mean: float = -0.8
    gap_std: float = 1.0
    time_least: float = 0.0
    prune: float = 0.0
    guided_steps: int | float | None = None
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=2500, learning_rate=1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        UShaped(self.a)
        LogitNormal(self.gap_mean, self.gap_std)
        least, prune = number("time_least", self.time_least), number("prune", self.prune)
        require(0 <= least < 1, "time_least", "must be in [0, 1)", least)
        require(0 <= prune < 1, "prune", "must be in [0, 1)", prune)
        if self.guided_steps is not None:
            check_moment("guided_steps", self.guided_steps, 0)

    def objective(self, setting: Setting) -> ReMeanFlowObjective:
        return ReMeanFlowObjective(setting, self)


class ReMeanFlowObjective(MeanFlowObjective):
    """MeanFlow's regression on pairs: intervals towards the whole, no weight for the longest."""

    _recipe: ReMeanFlow

    def __init__(self, setting: Setting, recipe: ReMeanFlow) -> None:
        super().__init__(setting, recipe)
        self._start = UShaped(recipe.a)
        self._gap = LogitNormal(recipe.gap_mean, recipe.gap_std)
        self._longest = self._length_quantile() if recipe.prune else None

    def intervals(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        t = self.times(step, self._start).clamp_(min=self._recipe.time_least)
        end = (t + self.times(step, self._gap, "gap")).clamp_(max=1.0)
        end = end.masked_fill((t < 0.2) & (end > 0.6), 1.0)
        return t, end - t

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        if self._longest is not None:
            kept = lengths(batch["target"]) <= self._longest
            batch["weight"] = kept.to(batch["target"].dtype) / (1.0 - self._recipe.prune)
        return batch

    def guides(self, step: int) -> bool:
        until = self._recipe.guided_steps
        now = until is None or step < moment(until, self.train.steps)
        return super().guides(step) and now

    def _length_quantile(self) -> float:
        """The length that a fraction 1 - prune of the pairs does not exceed."""
        found, size = [], self.train.batch_size
        for start in range(0, _QUANTILE_PAIRS, size):
            draw = self.source.draw(start, size)
            found.append(lengths(draw.x1 - source_of(draw)))
        return torch.cat(found).quantile(1.0 - self._recipe.prune).item()


def lengths(x: torch.Tensor) -> torch.Tensor:
    """(B,) Euclidean norms of the samples of x (B, ...)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
