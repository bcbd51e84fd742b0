"""2-rectified flow++ (Lee, Lin, Fanti, "Improving the Training of Rectified Flows", 2024): one round
of reflow whose start, times and loss make it good in one or two steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rfkernels.flow.times import UShaped
from rfkernels.ops.flow_loss import flow_loss
from rfkernels.training.config import OwnObject, check_linear
from rfkernels.training.objective import Batch, Setting, SourceObjective, per_sample, spread_times
from rfkernels.training.option_checks import number, require
from rfkernels.training.recipes.options import refuse_named
from rfkernels.training.recipes.recipe import PairRecipe
from rfkernels.training.sources import Draw

__all__ = ["RectifiedFlowPlusPlus"]

LOSSES = ("perceptual-huber", "perceptual", "huber", "mse", "sqrt-mse")
Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_MARGIN = 1e-5  # times stay this far from both ends, as in the paper's code


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowPlusPlus(PairRecipe):
    """Reflow with U-shaped times and a loss that also compares end points.

    With a pair (x0, x1), x_t = (1 - t) x0 + t x1, the network's velocity v, r = v - (x1 - x0) and d
    the numbers of a sample, the losses are::

        H = (sqrt(|r|^2 + c^2) - c) / d,   c = 0.00054 d, |r|^2 summed over the sample
        P = perceptual(x_t + (1 - t) v, x1)
        "perceptual-huber"  t H + w P      "huber"     H
        "perceptual"        w P            "mse"       |r|^2 / d
                                           "sqrt-mse"  sqrt(|r|^2 / d)

    with w = 1 / (1 - t) (`divide`, the paper's configuration F) or 1 (configuration E); the paper
    writes s = 1 - t, so its 1 - s is t here. All have the optimum of the mean square only because a
    pair's x0 determines its x1: on independent noise H and P pull the flow away from the mean
    velocity, so this recipe takes pairs and nothing else.

    Start from a pretrained diffusion network: `rfkernels.models.EDMVelocity` and its neighbours
    make one the `teacher`, which makes the pairs and which the student is a copy of. Real data:
    `rfkernels.training.invert_data` makes pairs of them to fine-tune on (configuration G), or to mix
    among the teacher's (`rfkernels.training.MixedPairs`). Sample with Euler or, in 2 to 4 steps,
    with solver "rf++".

    Attributes:
        a: of the time density, proportional to cosh(a (t - 1/2)); 0 is uniform. Times are drawn
            from it and scaled to [1e-5, 1 - 1e-5]; those of `train` are not used.
        loss: one of the names above, instead of that of `train`; None: "perceptual-huber" with a
            perceptual distance, "huber" without.
        perceptual: callable(prediction, x1), both (B, ...), giving (B,) distances, such as
            `rfkernels.metrics.PerceptualDistance`. It is not trained. What its network needs of its
            input (range, size; the paper resizes both images to 224 x 224) is its own affair.
        divide: whether P is divided by 1 - t.
        huber_c: c; None for 0.00054 d.

    Published: Adam (0.9, 0.999) without decay or clipping, linear warm-up, constant rate, EMA
    0.9999, pairs of EDM's Heun solver with 18 (CIFAR-10) or 40 (ImageNet-64) steps.

    ============ ============= ========= ========== ======== ======= ==================
    data         learning rate warm-up   batch      steps    pairs   loss
    ============ ============= ========= ========== ======== ======= ==================
    CIFAR-10     2e-4          5000      512        800,000  1 M     F
    ImageNet-64  1e-4          2500      2048       700,000  5 M     E, fp16
    AFHQ-64      2e-4          5000      256        1 M              E
    ============ ============= ========= ========== ======== ======= ==================

    Left out: float16 with dynamic loss scaling (`train.autocast` is bfloat16), and Heun's variant
    of the sampling rule. The paper prints the time density exp(at) + exp(-at), which on [0, 1] is
    monotone; its code and figure are the symmetric one.
    """

    name: ClassVar[str] = "2-rf-plus-plus"

    a: float = 4.0
    loss: str | None = None
    perceptual: Perceptual | OwnObject | None = None
    divide: bool = True
    huber_c: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        UShaped(number("a", self.a))
        require(
            self.loss is None or self.loss in LOSSES,
            "loss",
            f"must be None or one of {', '.join(LOSSES)}",
            self.loss,
        )
        if not (
            self.perceptual is None
            or isinstance(self.perceptual, OwnObject)
            or callable(self.perceptual)
        ):
            raise TypeError(
                f"perceptual: must be a callable or None; got {type(self.perceptual).__name__}"
            )
        compared = self.chosen_loss.startswith("perceptual")
        require(
            compared == (self.perceptual is not None),
            "perceptual",
            f"the loss {self.chosen_loss!r} {'needs' if compared else 'has no use for'} it",
            self.perceptual,
        )
        if not isinstance(self.divide, bool):
            raise TypeError(f"divide: must be true or false; got {self.divide!r}")
        if self.huber_c is not None:
            value = number("huber_c", self.huber_c)
            require(value > 0, "huber_c", "must be positive or None", self.huber_c)
            require(
                self.chosen_loss.endswith("huber"),
                "huber_c",
                f"the loss {self.chosen_loss!r} has no use for it",
                self.huber_c,
            )
        check_linear(self.train, "the pairs are joined by straight lines")

    @property
    def chosen_loss(self) -> str:
        """The loss, with None resolved."""
        if self.loss is not None:
            return self.loss
        return "huber" if self.perceptual is None else "perceptual-huber"

    def objective(self, setting: Setting) -> RectifiedFlowPlusPlusObjective:
        return RectifiedFlowPlusPlusObjective(setting, self)


class RectifiedFlowPlusPlusObjective(SourceObjective):
    """Pairs at U-shaped times, and the losses of the recipe."""

    def __init__(self, setting: Setting, recipe: RectifiedFlowPlusPlus) -> None:
        super().__init__(setting)
        refuse_named(perceptual=recipe.perceptual)
        self._recipe, self._density = recipe, UShaped(recipe.a)

    def batch(self, step: int) -> Batch:
        return self._paired(self.draw(step), self.times(step, self._density))

    def held_out(self) -> Batch | None:
        draw = self.source.held_out()
        return None if draw is None else self._paired(draw, spread_times(draw))

    def _paired(self, draw: Draw, t: torch.Tensor) -> Batch:
        batch = self.state(draw, _MARGIN + t * (1 - 2 * _MARGIN))
        if self._recipe.perceptual is not None:
            batch["x1"] = draw.x1
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        prediction, kind = self.velocity(model, batch), self._recipe.chosen_loss
        if kind == "mse":
            return flow_loss(prediction, batch["target"], kind="mse")
        if kind == "sqrt-mse":
            residual = (prediction - batch["target"]).flatten(1)
            # The norm has a gradient at 0; the root of the mean square has none.
            return (torch.linalg.vector_norm(residual, dim=1) / residual.shape[1] ** 0.5).mean()
        if kind == "huber":
            return self._huber(prediction, batch["target"], None)
        compared = self._perceptual(prediction, batch)
        if kind == "perceptual":
            return compared
        return self._huber(prediction, batch["target"], batch["t"]) + compared

    def _huber(
        self, prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        return flow_loss(
            prediction, target, weight=weight, kind="pseudo_huber", huber_c=self._recipe.huber_c
        )

    def _perceptual(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        level = 1.0 - batch["t"]
        end = batch["xt"] + per_sample(level, prediction) * prediction
        distances = self._recipe.perceptual(end, batch["x1"])
        if distances.shape != level.shape:
            raise ValueError(
                f"perceptual: must return ({len(level)},) distances; got {tuple(distances.shape)}"
            )
        if self._recipe.divide:
            distances = distances / level.to(distances.dtype)
        return distances.mean()
