"""InstaFlow (Liu, Zhang, Ma, Peng, Liu, "InstaFlow: One Step is Enough for High-Quality
Diffusion-Based Text-to-Image Generation", 2023): distillation in two stages, first in the network's
own space, then by a perceptual distance of decoded images.

Its reflow of a guided teacher is `rfkernels.training.reflow` with guidance_scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from rfkernels.training.config import Distance, OwnObject, TrainConfig
from rfkernels.training.objective import Batch, Setting, SourceObjective
from rfkernels.training.option_checks import require
from rfkernels.training.recipes.options import (
    check_distance,
    check_moment,
    moment,
    refuse_named,
)
from rfkernels.training.recipes.recipe import PairRecipe
from rfkernels.training.recipes.rectified_flow import mean_distance
from rfkernels.training.sources import Draw

__all__ = ["InstaFlowDistill"]

Decoder = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class InstaFlowDistill(PairRecipe):
    """InstaFlow's distillation of a conditional 2-RF into one step: L2 first, perceptual afterwards.

    With x1 where the teacher's guided flow from z under condition y ends, and v the student,

        |v(z, 0 | y) - (x1 - z)|^2                                    before perceptual_from,
        distance(decoder(z + v(z, 0 | y)), decoder(x1))               from there on.

    Give the reflowed run as `teacher`: distilling a flow that was not reflowed fails. The held-out
    loss is the first one throughout. Sample the student in one step without guidance, which it has
    learnt; the 2-RF itself with guidance 1 to 2.

    Attributes:
        distance: "l2", for both stages and without decoding; or the second stage's
            callable(prediction, target) -> (B,) losses or their mean, such as
            `rfkernels.metrics.PerceptualDistance`.
        decoder: from the network's samples to images, differentiable, such as a frozen VAE's; None
            where the samples are the images.
        perceptual_from: the step where the second stage begins; a fraction in (0, 1) is that of
            train.steps.
        guidance_scale: of the teacher while making pairs, v = v(x | none) + g (v(x | y) -
            v(x | none)); None for a teacher without condition.

    Published (Stable Diffusion 1.5, AdamW, 0.9B): pairs of the 2-RF at g = 1.5, batch 1024, 21,500
    steps of L2 and then 18,000 of LPIPS on decoded images, hence 0.54. Its reflow before: pairs at
    g = 5.0, 70,000 steps at batch 64 and 25,000 at 1024, learning rate 1e-6, EMA 0.9999, clip 1.0.
    """

    name: ClassVar[str] = "instaflow-distill"

    distance: str | Distance = "l2"
    decoder: Decoder | None = None
    perceptual_from: int | float = 0.54
    guidance_scale: float | None = 1.5
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1500, learning_rate=1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distance(self.distance, self.train)
        check_moment("perceptual_from", self.perceptual_from, 0)
        if self.decoder is None or isinstance(self.decoder, OwnObject):
            return
        if not callable(self.decoder):
            raise TypeError(f"decoder: must be callable; got {type(self.decoder).__name__}")
        require(self.distance != "l2", "decoder", "serves a callable distance", self.distance)

    def objective(self, setting: Setting) -> InstaFlowDistillObjective:
        refuse_named(distance=self.distance, decoder=self.decoder)
        return InstaFlowDistillObjective(setting, self)


class InstaFlowDistillObjective(SourceObjective):
    """One step against the pairs' ends. Batches of the second stage carry x1."""

    def __init__(self, setting: Setting, recipe: InstaFlowDistill) -> None:
        super().__init__(setting)
        self._distance, self._decoder = recipe.distance, recipe.decoder
        self._switch = moment(recipe.perceptual_from, self.train.steps)

    def batch(self, step: int) -> Batch:
        draw = self.draw(step)
        batch = self._paired(draw)
        if callable(self._distance) and step >= self._switch:
            batch["x1"] = draw.x1
        return batch

    def held_out(self) -> Batch | None:
        draw = self.source.held_out()
        return None if draw is None else self._paired(draw)

    def _paired(self, draw: Draw) -> Batch:
        return self.state(draw, torch.zeros(len(draw.x1), device=draw.x1.device))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        velocity = self.velocity(model, batch)
        if "x1" not in batch:
            return self.regression(velocity, batch["target"])
        decode = self._decoder or (lambda x: x)
        with torch.no_grad():
            target = decode(batch["x1"])
        return mean_distance(self._distance, decode(batch["xt"] + velocity), target)
