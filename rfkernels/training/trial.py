"""A trial of an objective on a few samples before a run is written: a teacher, a distance, a
decoder or a schedule that does not fit is found while nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from rfkernels.ops.random import randn
from rfkernels.training.checks import evaluating
from rfkernels.training.config import TrainConfig
from rfkernels.training.objective import Objective, Setting
from rfkernels.training.processes import Processes
from rfkernels.training.sources import ALL, Draw
from rfkernels.training.trainer import device_of

__all__ = ["TRIAL", "noise_draw", "try_objective"]

TRIAL = 8  # samples; a recipe's fraction of them is one at least from an eighth on


class _Few:
    """A source that has these samples and no others, over and over."""

    def __init__(self, draw: Draw) -> None:
        self.sample_shape, self.device = tuple(draw.x1.shape[1:]), draw.x1.device
        self._draw = draw

    def draw(self, start: int, count: int, part: slice = ALL) -> Draw:
        rows = torch.arange(start, start + count, device=self.device)[part] % len(self._draw.x1)

        def picked(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value[rows]

        condition = {name: value[rows] for name, value in self._draw.condition.items()}
        return Draw(
            self._draw.x1[rows],
            picked(self._draw.x0),
            self._draw.seed,
            picked(self._draw.offset),
            condition,
        )

    def held_out(self) -> Draw:
        return self.draw(0, len(self._draw.x1))


def noise_draw(
    count: int, sample_shape: tuple[int, ...], labels: torch.Tensor | None, device: torch.device
) -> Draw:
    """Stands for the first `count` pairs where they are still to be made: noise at both ends."""
    index = torch.arange(count, device=device)
    x1 = randn(count, *sample_shape, seed=1, offset=index, device=device)
    condition = {} if labels is None else {"y": labels[:count].to(device)}
    return Draw(x1, None, 0, index, condition)


def try_objective(
    name: str,
    make: Callable[[Setting], Objective],
    model: nn.Module,
    draw: Draw,
    train: TrainConfig,
    null_label: int | float | None,
    teacher: nn.Module | None = None,
) -> None:
    """The losses of the first and the last step, and of held-out samples, on the samples of `draw`.

    Neither weights nor the caller's random state change. Here `model` is also its own average.

    Args:
        name: the public function or recipe, for messages.
        make: the objective of a setting.

    Raises:
        ValueError: an evaluation fails. Others: what the objective itself refuses.
    """
    train = replace(train, batch_size=min(TRIAL, train.batch_size), accumulate=1)
    setting = Setting(_Few(draw), train, null_label, teacher, Processes())
    device = device_of(model)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        evaluating(model),
        torch.no_grad(),
    ):
        objective = make(setting)
        objective.attach(model)
        for batch in (objective.batch(0), objective.batch(train.steps - 1), objective.held_out()):
            try:
                objective.loss(model, batch)
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"{name}: cannot be trained with what it was given: {error}"
                ) from error
