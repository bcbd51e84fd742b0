"""DDIM (Song, Meng, Ermon 2021) on a discrete noise schedule.

With the estimates x1^ and x0^ at index a, the step to index b is x_b = alpha_b x1^ + sigma_b x0^.
Divided by alpha + sigma, the states of a schedule lie on the straight path, and there this is the
Euler step: so DDIM is the solver "euler" on the times of the schedule's indices, which `DDIMGrid`
gives, for any velocity field of the straight path; `rfkernels.models.NoisePrediction` makes one of
a diffusion network. `ddim` also scales both ends, to start from unit noise and to stop at a state
of the schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rfkernels.flow.schedules import NoiseSchedule, get_schedule
from rfkernels.ops.ode_step import linear_step
from rfkernels.sampling.sample import SampleInfo, sample

__all__ = ["DDIMGrid", "ddim"]

ENDS = ("data", "first-index")


@dataclass(frozen=True)
class DDIMGrid:
    """The straight path's times of the indices that DDIM visits; pass it as ``grid=``.

    Of n indices out of K, index i is round(K - i K / n) - 1: "trailing" spacing, which begins at
    the last index, as few steps need it (Lin et al. 2024). The first time is that of the last
    index, which is above 0; ``t_start`` and ``t_end`` must be left out.

    Args:
        schedule: a name or object of ``rfkernels.flow``.
        end: "data", where alpha is 1; or "first-index", where it is that of index 0 (diffusers'
            set_alpha_to_one=False, which Stable Diffusion and Rectified Diffusion use). The last
            network evaluation is the same for both.
    """

    schedule: str | NoiseSchedule = "scaled-linear"
    end: str = "data"

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", get_schedule(self.schedule))
        if self.end not in ENDS:
            raise ValueError(f"DDIMGrid: end must be one of {', '.join(ENDS)}; got {self.end!r}")

    def indices(self, steps: int) -> list[int]:
        """The ``steps`` indices at which the network is evaluated, descending."""
        total = self.schedule.steps
        # The step from index 0 to index 0 would not move.
        most = total if self.end == "data" else total - 1
        if not 1 <= steps <= most:
            raise ValueError(f"DDIMGrid: steps must be in [1, {most}]; got {steps}")
        return [round(total - i * total / steps) - 1 for i in range(steps)]

    def times(self, steps: int | None, t_start: float, t_end: float) -> list[float]:
        """The ``steps + 1`` times."""
        if steps is None:
            raise ValueError("DDIMGrid: steps must be given; got None")
        if (t_start, t_end) != (0.0, 1.0):
            raise ValueError(
                f"DDIMGrid: t_start and t_end must be left out; got {t_start} and {t_end}"
            )
        table = self.schedule.linear_times
        last = 1.0 if self.end == "data" else float(table[0])
        return [*(float(table[k]) for k in self.indices(steps)), last]

    def scales(self) -> tuple[float, float]:
        """alpha + sigma at the first time and at the last: state of the schedule / state here."""
        total = self.schedule.alpha + self.schedule.sigma
        return float(total[-1]), 1.0 if self.end == "data" else float(total[0])


def ddim(
    velocity: Callable[..., Tensor],
    noise: Tensor,
    *,
    steps: int,
    schedule: str | NoiseSchedule | None = None,
    end: str = "data",
    guidance_scale: float | Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    uncondition: Mapping[str, Any] | None = None,
    return_info: bool = False,
    **options: Any,
) -> Tensor | SampleInfo:
    """Sample a diffusion network by DDIM, from unit noise taken as the state at the first index.

    Args:
        velocity: a velocity field of the straight path, such as
            ``rfkernels.models.NoisePrediction``.
        noise: (B, ...) standard normal numbers.
        steps: network evaluations, at most as many as there are indices.
        schedule: a name or object; None for the network's own, its attribute ``schedule``.
        end: as in :class:`DDIMGrid`.
        guidance_scale, condition, uncondition: as in ``rf.sample``. Guidance of velocities is that
            of noise and data estimates, since all are linear in the network's answer.
        return_info: return a :class:`SampleInfo`, whose times and trajectory are those of the
            straight path.
        options: of ``rf.sample``: compile, progress, callback.

    Returns:
        (B, ...) like ``noise``, or a :class:`SampleInfo`.

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    if schedule is None:
        schedule = getattr(velocity, "schedule", None)
        if schedule is None:
            raise ValueError(
                f"ddim: schedule must be given for a {type(velocity).__name__}; got None"
            )
    grid = DDIMGrid(schedule, end)
    first, last = grid.scales()
    found = sample(
        velocity,
        linear_step(noise, (), (), x_coefficient=1 / first),
        grid=grid,
        steps=steps,
        guidance_scale=guidance_scale,
        condition=condition,
        uncondition=uncondition,
        return_info=return_info,
        **options,
    )
    if last == 1.0:
        return found
    if isinstance(found, SampleInfo):
        return dataclasses.replace(found, x=linear_step(found.x, (), (), x_coefficient=last))
    return linear_step(found, (), (), x_coefficient=last)
