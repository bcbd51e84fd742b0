"""What a step minimises. An objective supplies the samples, times and target of a step and the loss
on them; the loop in `trainer.py` does everything else, so that a recipe is an objective and little
more.

Everything random is a function of (seed, purpose, step or sample), and a step's samples are split
over the processes that train together, so that a run resumes to the bit and does not depend on how
many processes share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import nn

from rfkernels.flow.paths import get_path
from rfkernels.flow.times import TimeDistribution, get_time_distribution
from rfkernels.ops.flow_loss import flow_loss
from rfkernels.ops.interpolate import interpolate
from rfkernels.ops.random import derive_seed, rand, randn
from rfkernels.training.config import TrainConfig
from rfkernels.training.processes import Processes, processes
from rfkernels.training.sources import Draw, Source

__all__ = ["Batch", "Objective", "Setting", "SourceObjective", "batch_condition", "per_sample"]

# A step's tensors by name, all with the same first dimension, so that micro-batches are slices:
# "xt", "t", "target", and as "condition.<name>" the keyword arguments of the network.
Batch = dict[str, torch.Tensor]


def batch_condition(batch: Batch) -> dict[str, torch.Tensor]:
    """The keyword arguments of the network in a batch."""
    prefix = "condition."
    return {n.removeprefix(prefix): v for n, v in batch.items() if n.startswith(prefix)}


def per_sample(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B,) values as (B, 1, ...) in the dtype of x (B, ...), to multiply its samples."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


class Objective(ABC):
    """What the loop asks of a recipe."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """This process's samples of a step, a function of the step alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean loss over these samples, 0-d, differentiable in the model's weights."""

    @abstractmethod
    def held_out(self) -> Batch | None:
        """The samples that the held-out loss is measured on, always the same; None without any."""

    def attach(self, average: nn.Module) -> None:  # noqa: B027 (most objectives need none)
        """Hands over the averaged network before the first step, for targets that come from it."""


@dataclass(frozen=True)
class Setting:
    """What a recipe's objective is made of, besides the recipe.

    Attributes:
        source: where samples come from: a data set with its coupling, or pairs.
        train: the loop's options.
        null_label: the label that stands for no condition; None where there is none.
        teacher: a frozen network in evaluation mode on the source's device; None without one.
        processes: who shares the samples of a step.
    """

    source: Source
    train: TrainConfig
    null_label: int | float | None = None
    teacher: nn.Module | None = None
    processes: Processes = field(default_factory=processes)


class SourceObjective(Objective):
    """What the objectives on a source of samples share: draws, times, states and calls."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.source, self.train = setting, setting.source, setting.train
        self.teacher = setting.teacher
        self._share = setting.processes.share(self.train.batch_size)
        self._times = get_time_distribution(self.train.time_distribution)
        self._seeds: dict[str, int] = {}

    # Draws

    def draw(self, step: int) -> Draw:
        """This process's samples of a step, with the label dropout."""
        size = self.train.batch_size
        draw = self.source.draw(step * size, size, self._share)
        if self.train.label_dropout:
            y = draw.condition["y"]
            dropped = self.uniform("label dropout", step) < self.train.label_dropout
            dropped = dropped.reshape(-1, *[1] * (y.dim() - 1))
            draw.condition["y"] = y.masked_fill(dropped, self.setting.null_label)
        return draw

    def uniform(self, purpose: str, step: int) -> torch.Tensor:
        """One uniform number in [0, 1) per sample of this process, (b,) float32."""
        drawn = rand(
            self.train.batch_size,
            seed=self._seed(purpose),
            offset=step,
            device=self.source.device,
        )
        return drawn[self._share]

    def times(
        self, step: int, distribution: TimeDistribution | None = None, purpose: str = "time"
    ) -> torch.Tensor:
        """One time per sample of this process, (b,) float32, from the run's distribution or
        another."""
        drawn = (distribution or self._times).sample(
            self.train.batch_size,
            seed=self._seed(purpose),
            offset=step,
            device=self.source.device,
        )
        return drawn[self._share]

    def chosen(self, step: int, fraction: float) -> torch.Tensor:
        """Which of this process's samples belong to a fraction of the run's, (b,) bool.

        They are spread evenly over all positions of the run: every part of a step, of another
        process or of a micro-batch, has its share; of steps too small for one, every so many has.
        """
        share, size = Fraction(fraction).limit_denominator(10**6), self.train.batch_size
        places = torch.arange(step * size, (step + 1) * size + 1, device=self.source.device)
        before = places * share.numerator // share.denominator
        return (before[1:] > before[:-1])[self._share]

    def fresh_noise(self, draw: Draw, step: int, purpose: str) -> torch.Tensor:
        """Standard normal numbers like x1 that no other purpose, step or sample shares."""
        first = step * self.train.batch_size + self._share.start
        index = torch.arange(first, first + len(draw.x1), device=draw.x1.device)
        noise = randn(*draw.x1.shape, seed=self._seed(purpose), offset=index, device=index.device)
        return noise.to(draw.x1.dtype)

    def _seed(self, purpose: str) -> int:
        if purpose not in self._seeds:
            self._seeds[purpose] = derive_seed(self.train.seed, purpose)
        return self._seeds[purpose]

    # States

    def state(self, draw: Draw, t: torch.Tensor) -> Batch:
        """x_t and the path's velocity of a draw at times (b,), with its condition."""
        noise = (
            {"x0": draw.x0} if draw.x0 is not None else {"seed": draw.seed, "offset": draw.offset}
        )
        xt, target, _ = interpolate(draw.x1, t, path=self.train.path, **noise)
        return {"xt": xt, "target": target, "t": t, **condition_of(draw)}

    def held_out(self) -> Batch | None:
        draw = self.source.held_out()
        return None if draw is None else self.state(draw, self.scaled(spread_times(draw)))

    def scaled(self, t: torch.Tensor) -> torch.Tensor:
        """Times of [0, 1] on the run's interval [time_min, time_max]."""
        least, most = self.train.time_min, self.train.time_max
        most = getattr(get_path(self.train.path), "t_end", 1.0) if most is None else most
        return t if (least, most) == (0.0, 1.0) else least + t * (most - least)

    # Networks and losses

    def autocast(self) -> AbstractContextManager[None]:
        """The network's precision, as configured."""
        return torch.autocast(
            self.source.device.type,
            dtype=torch.bfloat16,
            enabled=self.train.autocast == "bfloat16",
        )

    def call(
        self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, **condition: torch.Tensor
    ) -> torch.Tensor:
        """model(x, t, **condition) in the configured precision, given back in that of x."""
        with self.autocast():
            return model(x, t, **condition).to(x.dtype)

    def velocity(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The network on a batch's own states."""
        return self.call(model, batch["xt"], batch["t"], **batch_condition(batch))

    def regression(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The configured loss between (b, ...) tensors, averaged over the samples."""
        return flow_loss(prediction, target, kind=self.train.loss, huber_c=self.train.huber_c)


def condition_of(draw: Draw) -> Batch:
    """A draw's condition as entries of a batch."""
    return {f"condition.{name}": value for name, value in draw.condition.items()}


def source_of(draw: Draw) -> torch.Tensor:
    """x0 of a draw, (b, ...) like x1: as it is given, or drawn again."""
    if draw.x0 is not None:
        return draw.x0
    noise = randn(*draw.x1.shape, seed=draw.seed, offset=draw.offset, device=draw.x1.device)
    return noise.to(draw.x1.dtype)


def spread_times(draw: Draw) -> torch.Tensor:
    """Times evenly over [0, 1] whatever the training draws, so that held-out losses compare."""
    return (torch.arange(len(draw.x1), device=draw.x1.device) + 0.5) / len(draw.x1)
