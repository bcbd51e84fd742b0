"""What a step minimises. An objective supplies the samples, times and target of a step and the loss
on them; the loop in `trainer.py` does everything else, so that a recipe is an objective and little
more."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from rfkernels.flow.paths import get_path
from rfkernels.flow.times import get_time_distribution
from rfkernels.ops.flow_loss import flow_loss
from rfkernels.ops.interpolate import interpolate
from rfkernels.ops.random import derive_seed, rand
from rfkernels.training.config import Distance, TrainConfig
from rfkernels.training.sources import Draw, Source

__all__ = ["Batch", "DistillObjective", "FlowObjective", "Objective"]

# A step's tensors by name, all with the same first dimension, so that micro-batches are slices:
# "xt", "t", "target", and as "condition.<name>" the keyword arguments of the network.
Batch = dict[str, torch.Tensor]


def batch_condition(batch: Batch) -> dict[str, torch.Tensor]:
    """The keyword arguments of the network in a batch."""
    prefix = "condition."
    return {n.removeprefix(prefix): v for n, v in batch.items() if n.startswith(prefix)}


class Objective(Protocol):
    """What the loop asks of a recipe."""

    def batch(self, step: int) -> Batch:
        """The samples of a step, a function of the step alone."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean loss over these samples, 0-d float32, differentiable in the model's weights."""

    def held_out(self) -> Batch | None:
        """The samples that the held-out loss is measured on, always the same; None without any."""


class _OnSource:
    """What the objectives on a source of samples share."""

    def __init__(self, source: Source, config: TrainConfig, null_label: int | float | None) -> None:
        self.source, self.config, self.null_label = source, config, null_label
        self.device_type = source.device.type
        self._dropout_seed = derive_seed(config.seed, "label dropout")

    def _draw(self, step: int) -> Draw:
        size = self.config.batch_size
        draw = self.source.draw(step * size, size)
        if self.config.label_dropout:
            # derived once: the draw of a step is (seed, step)
            coin = rand(size, seed=self._dropout_seed, offset=step, device=draw.x1.device)
            y = draw.condition["y"]
            dropped = (coin < self.config.label_dropout).reshape(-1, *[1] * (y.dim() - 1))
            draw.condition["y"] = y.masked_fill(dropped, self.null_label)
        return draw

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(
            self.device_type, dtype=torch.bfloat16, enabled=self.config.autocast == "bfloat16"
        )

    def _velocity(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        with self._autocast():
            return model(batch["xt"], batch["t"], **batch_condition(batch)).float()

    def _batch(self, draw: Draw, t: torch.Tensor) -> Batch:
        noise = (
            {"x0": draw.x0} if draw.x0 is not None else {"seed": draw.seed, "offset": draw.offset}
        )
        xt, target, _ = interpolate(draw.x1, t, path=self.config.path, **noise)
        condition = {f"condition.{name}": value for name, value in draw.condition.items()}
        return {"xt": xt, "target": target, "t": t, **condition}

    def _regression(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return flow_loss(
            self._velocity(model, batch),
            batch["target"],
            kind=self.config.loss,
            huber_c=self.config.huber_c,
        )


class FlowObjective(_OnSource):
    """Flow matching: E |v(x_t, t) - dx_t/dt|^2 over the source's coupling (Liu et al., 2023,
    equation 1).

    On a data set this trains the first flow; on pairs it is reflow.
    """

    def __init__(self, source: Source, config: TrainConfig, null_label: int | float | None) -> None:
        super().__init__(source, config, null_label)
        self._times = get_time_distribution(config.time_distribution)
        self._time_seed = derive_seed(config.seed, "time")
        self._time_max = (
            getattr(get_path(config.path), "t_end", 1.0)
            if config.time_max is None
            else config.time_max
        )

    def batch(self, step: int) -> Batch:
        draw = self._draw(step)
        t = self._times.sample(
            len(draw.x1), seed=self._time_seed, offset=step, device=draw.x1.device
        )
        return self._batch(draw, t if self._time_max == 1.0 else t * self._time_max)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self._regression(model, batch)

    def held_out(self) -> Batch | None:
        draw = self.source.held_out()
        if draw is None:
            return None
        # Times spread evenly whatever the training draws, so that losses of different runs compare.
        t = (torch.arange(len(draw.x1), device=draw.x1.device) + 0.5) / len(draw.x1)
        return self._batch(draw, t * self._time_max)


class DistillObjective(_OnSource):
    """Distillation into k Euler steps: v at t = j/k sends x_t to x1 (Liu et al., 2023, 3.2).

    With distance "l2" the loss is |v(x_t, t) - (x1 - x0)|^2, which for k = 1 is |x0 + v(x0, 0) -
    x1|^2. A callable distance sees (x_t + (1 - t) v, x1), both (B, ...) float32, and returns (B,)
    losses or their mean.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        null_label: int | float | None,
        *,
        k: int,
        distance: str | Distance,
    ) -> None:
        super().__init__(source, config, null_label)
        self._k, self._distance = k, distance
        self._time_seed = derive_seed(config.seed, "time")

    def batch(self, step: int) -> Batch:
        draw = self._draw(step)
        size, device = len(draw.x1), draw.x1.device
        if self._k == 1:
            return self._paired(draw, torch.zeros(size, device=device))
        u = rand(size, seed=self._time_seed, offset=step, device=device)
        return self._paired(draw, (u * self._k).floor().clamp_(max=self._k - 1) / self._k)

    def held_out(self) -> Batch | None:
        draw = self.source.held_out()
        if draw is None:
            return None
        return self._paired(
            draw, (torch.arange(len(draw.x1), device=draw.x1.device) % self._k) / self._k
        )

    def _paired(self, draw: Draw, t: torch.Tensor) -> Batch:
        batch = self._batch(draw, t)
        if callable(self._distance):
            batch["x1"] = draw.x1
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if not callable(self._distance):
            return self._regression(model, batch)
        velocity, t = self._velocity(model, batch), batch["t"]
        end = batch["xt"] + (1.0 - t).reshape(-1, *[1] * (velocity.dim() - 1)) * velocity
        value = self._distance(end, batch["x1"])
        if value.dim() > 1 or (value.dim() == 1 and len(value) != len(t)):
            raise ValueError(
                f"distance: must return ({len(t)},) losses or a 0-d tensor; got "
                f"{tuple(value.shape)}"
            )
        return value.mean()
