"""Rectified flow (Liu, Gong, Liu, "Flow Straight and Fast", 2023): the regression that trains the
first flow and every reflow, and the distillation into k Euler steps."""

from __future__ import annotations

import torch
from torch import nn

from rfkernels.training.config import Distance
from rfkernels.training.objective import Batch, Setting, SourceObjective, per_sample, source_of
from rfkernels.training.sources import Draw

__all__ = ["DistillObjective", "FlowObjective"]


class FlowObjective(SourceObjective):
    """Flow matching: E |v(x_t, t) - dx_t/dt|^2 over the source's coupling (equation 1).

    On a data set this trains the first flow; on pairs it is reflow.
    """

    def batch(self, step: int) -> Batch:
        return self.state(self.draw(step), self.scaled(self.times(step)))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.regression(self.velocity(model, batch), batch["target"])


class DistillObjective(SourceObjective):
    """Distillation into k Euler steps: v at t = j/k sends x_t to x1 (section 3.2).

    With distance "l2" the loss is |v(x_t, t) - (x1 - x0)|^2, which for k = 1 is |x0 + v(x0, 0) -
    x1|^2. A callable distance sees (x_t + (1 - t) v, x1), both (B, ...) float32, and returns (B,)
    losses or their mean. In `reverse` v at t = (j+1)/k sends x_t to x0, and the distance sees
    (x_t - t v, x0).
    """

    def __init__(
        self, setting: Setting, *, k: int, distance: str | Distance, reverse: bool = False
    ) -> None:
        super().__init__(setting)
        self._k, self._distance, self._reverse = k, distance, reverse

    def batch(self, step: int) -> Batch:
        draw = self.draw(step)
        if self._k == 1:
            return self._paired(draw, torch.zeros(len(draw.x1), device=draw.x1.device))
        u = self.uniform("time", step)
        return self._paired(draw, (u * self._k).floor().clamp_(max=self._k - 1))

    def held_out(self) -> Batch | None:
        draw = self.source.held_out()
        if draw is None:
            return None
        count = torch.arange(len(draw.x1), device=draw.x1.device)
        return self._paired(draw, (count % self._k).to(torch.float32))

    def _paired(self, draw: Draw, j: torch.Tensor) -> Batch:
        batch = self.state(draw, (j + 1 if self._reverse else j) / self._k)
        if callable(self._distance):
            batch["end"] = source_of(draw) if self._reverse else draw.x1
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if not callable(self._distance):
            return self.regression(self.velocity(model, batch), batch["target"])
        velocity, t = self.velocity(model, batch), batch["t"]
        way = -t if self._reverse else 1.0 - t
        end = batch["xt"] + per_sample(way, velocity) * velocity
        return mean_distance(self._distance, end, batch["end"])


def mean_distance(
    distance: Distance, prediction: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """A callable distance between (B, ...) tensors, averaged over the samples.

    Raises:
        ValueError: it returns neither (B,) losses nor their mean.
    """
    value = distance(prediction, target)
    if value.dim() > 1 or (value.dim() == 1 and len(value) != len(prediction)):
        raise ValueError(
            f"distance: must return ({len(prediction)},) losses or a 0-d tensor; got "
            f"{tuple(value.shape)}"
        )
    return value.mean()
