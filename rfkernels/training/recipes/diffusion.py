"""What the recipes for diffusion networks share: their calls, and a teacher's DDIM steps.

These recipes train a `rfkernels.models.NoisePrediction` in its own form: states x_k = alpha_k x1 +
sigma_k x0 at whole indices k of its schedule, 0 next to the data.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from rfkernels.models.noise_prediction import NoisePrediction
from rfkernels.ops.flow_loss import flow_loss
from rfkernels.training.objective import (
    Batch,
    Setting,
    SourceObjective,
    condition_of,
    source_of,
    spread_times,
)
from rfkernels.training.option_checks import number, require
from rfkernels.training.sources import Draw

__all__ = ["DiffusionObjective", "check_diffusion_network", "check_guidance", "check_huber"]


def check_diffusion_network(name: str, network: nn.Module | None) -> NoisePrediction:
    """The network, if it is a NoisePrediction."""
    if not isinstance(network, NoisePrediction):
        raise TypeError(
            f"{name}: must be a rfkernels.models.NoisePrediction; got {type(network).__name__}"
        )
    return network


def check_teacher_grid(teacher: nn.Module | None, grid_steps: int) -> int:
    """The steps of the teacher's schedule, which a DDIM grid of `grid_steps` must divide."""
    total = check_diffusion_network("teacher", teacher).schedule.steps
    require(
        total % grid_steps == 0,
        "grid_steps",
        f"must divide the steps of the teacher's schedule, {total}",
        grid_steps,
    )
    return total


def check_huber(value: object) -> None:
    """Refuses what is no constant of a pseudo-Huber distance."""
    require(number("huber_c", value) > 0, "huber_c", "must be positive", value)


def check_guidance(value: object) -> None:
    """Refuses what is neither None nor a number."""
    if value is not None:
        number("guidance_scale", value)


class DiffusionObjective(SourceObjective):
    """Batches of both ends with a uniform number, and calls and losses in the form of a
    NoisePrediction.

    Batches hold x0, x1 and, as "t", the number in [0, 1) that a subclass makes an index or a time
    of; `purpose` is what it is drawn for.
    """

    purpose: ClassVar[str]

    def batch(self, step: int) -> Batch:
        return self.both_ends(self.draw(step), self.uniform(self.purpose, step))

    def held_out(self) -> Batch | None:
        draw = self.source.held_out()
        return None if draw is None else self.both_ends(draw, spread_times(draw))

    def both_ends(self, draw: Draw, u: torch.Tensor) -> Batch:
        """The batch of a draw and its uniform numbers (b,)."""
        return {"x0": source_of(draw), "x1": draw.x1, "t": u, **condition_of(draw)}

    def check_same_schedule(self, student: nn.Module) -> None:
        """Refuses a student of another schedule than the teacher's, whose states it would misread."""
        if student.schedule != self.teacher.schedule:
            raise ValueError(
                f"model: must have the teacher's schedule, {self.teacher.schedule}; got "
                f"{student.schedule}"
            )

    def noise(
        self, model: NoisePrediction, x_k: torch.Tensor, k: torch.Tensor, condition: Batch
    ) -> torch.Tensor:
        """The noise estimate x0^ of a network at states and indices (b,), differentiable."""
        answer = self.call(model, x_k, None, index=k, **condition)
        return model.estimates(x_k, k, answer)[1]

    @torch.no_grad()
    def teacher_step(
        self,
        x_a: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        condition: Batch,
        guidance_scale: float | None,
    ) -> torch.Tensor:
        """The teacher's DDIM step from indices a to b (b,), guided: x0^ = x0^_none + g (x0^_y -
        x0^_none), and x1^ alike, since it is linear in x0^."""
        noise = self.noise(self.teacher, x_a, a, condition)
        if guidance_scale not in (None, 1.0):
            free = self.noise(self.teacher, x_a, a, {})
            noise = free + guidance_scale * (noise - free)
        return self.teacher.ddim_step(x_a, a, b, noise)

    def teacher_steps(
        self,
        x: torch.Tensor,
        start: torch.Tensor,
        length: int,
        steps: int,
        condition: Batch,
        guidance_scale: float | None,
    ) -> torch.Tensor:
        """`steps` DDIM steps of the teacher from indices start (b,) to start - length, but not below
        index 0."""
        at = start
        for i in range(1, steps + 1):
            after = (start - round(i * length / steps)).clamp(min=0)
            x, at = self.teacher_step(x, at, after, condition, guidance_scale), after
        return x

    def huber(self, prediction: torch.Tensor, target: torch.Tensor, huber_c: float) -> torch.Tensor:
        """mean of sqrt((prediction - target)^2 + c^2) - c over all elements."""
        return flow_loss(prediction, target, kind="pseudo_huber_elementwise", huber_c=huber_c)


def refuse_unguidable(setting: Setting, guidance_scale: float | None) -> None:
    """Guidance needs conditions in the data; the call without them is the unconditional one."""
    if guidance_scale in (None, 1.0):
        return
    if not setting.source.draw(0, 2).condition:
        raise ValueError(
            f"guidance_scale: needs a conditional network and labels; got {guidance_scale} without"
        )


def whole_below(u: torch.Tensor, count: int) -> torch.Tensor:
    """Whole numbers 0 .. count - 1, int64, from uniform numbers u in [0, 1)."""
    return (u.double() * count).long().clamp_(max=count - 1)
