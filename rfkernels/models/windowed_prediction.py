"""A noise prediction that is exact over windows of a schedule (PeRFlow), as a velocity field."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rfkernels.flow.schedules import NoiseSchedule
from rfkernels.models.noise_prediction import NoisePrediction
from rfkernels.ops.ode_step import linear_step

__all__ = ["WindowedNoisePrediction", "window_coefficients"]

EPSILON_TARGETS = ("ddim", "diffused")


def window_coefficients(
    schedule: NoiseSchedule, start: Tensor, end: Tensor, epsilon_target: str
) -> tuple[Tensor, Tensor]:
    """l and n of a window: its end state is z_e = l z_a + n noise*, z_a its start.

    With alpha_a, sigma_a at the start and alpha_e, sigma_e at the end,

        "ddim"       l = alpha_e / alpha_a      n = sigma_e - (alpha_e / alpha_a) sigma_a
        "diffused"   l = alpha_e / alpha_a      n = -sqrt(1 - g^2) / g,  g = alpha_a / alpha_e

    The first is the DDIM step over the window; the second asks for the noise that diffusing z_e to
    the start's level would have added.

    Args:
        start, end: window ends as whole multiples (B,) of 1 / steps, in noise level: start > end.

    Returns:
        Two (B,) float64 tensors.
    """
    alpha_a, sigma_a = schedule.coefficients((start - 1).clamp(min=0))
    alpha_e, sigma_e = schedule.coefficients((end - 1).clamp(min=0))
    ratio = alpha_e / alpha_a
    if epsilon_target == "ddim":
        return ratio, sigma_e - ratio * sigma_a
    return ratio, -torch.sqrt(ratio.square() - 1)


class WindowedNoisePrediction(nn.Module):
    """PeRFlow's velocity field of a noise-predicting network: velocity(x, t, **condition).

    Within each of ``windows`` equal windows of time the flow of states z of the schedule is a straight
    line from z_a to z_e = l z_a + n noise*, and the network, asked anywhere in the window, predicts
    noise*. At noise level s = 1 - t, a and e the window's ends, solving for the line through (z, s)
    leaves

        dz/dt = -((l - 1) z + n network(z, K s)) / (l (s - a) + (e - s)).

    z runs from unit noise at t = 0 to the schedule's first index at t = 1; it is no state of the
    straight path. A time at the border of two windows belongs to the one that begins there. Sample
    with ``grid=rfkernels.sampling.windows.WindowGrid(windows)``.

    Args:
        prediction: the network with its schedule; it must predict epsilon, and is asked at the index
            K s, real-valued, K at pure noise (K - 1 is the index of that state; this is how PeRFlow
            trains and samples).
        windows: how many, a divisor of K.
        epsilon_target: "ddim" or "diffused", as in :func:`window_coefficients`; that of the training.

    Raises:
        TypeError, ValueError: for what is no such network, number or name.
    """

    def __init__(
        self, prediction: NoisePrediction, windows: int = 4, epsilon_target: str = "ddim"
    ) -> None:
        super().__init__()
        check_windows(prediction, windows, epsilon_target)
        self.prediction, self.windows, self.epsilon_target = prediction, windows, epsilon_target

    @property
    def null_label(self) -> Any:
        """The label that stands for no condition; None without one."""
        return self.prediction.null_label

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample; None where the network does not say."""
        return self.prediction.sample_shape

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The velocity at x (B, ...) and t (B,), 0 = noise."""
        schedule, total = self.prediction.schedule, self.prediction.schedule.steps
        length = total // self.windows
        level = total * (1 - t.to(torch.float32 if t.device.type == "mps" else torch.float64))
        # A tenth of an index of slack, since the borders are rounded in float32.
        window = ((total - level + 0.1) / length).floor().clamp(0, self.windows - 1)
        start = (total - window * length).long()
        end = start - length
        keep, gain = window_coefficients(schedule, start, end, self.epsilon_target)
        answer = self.prediction.predict(x, level, **condition)
        rate = -total / (keep * (level - start) + (end - level))
        return linear_step(x, (answer,), (gain * rate,), x_coefficient=(keep - 1) * rate)


def check_windows(prediction: nn.Module, windows: object, epsilon_target: object) -> None:
    """Refuses networks, numbers of windows and names that do not fit."""
    if not isinstance(prediction, NoisePrediction):
        raise TypeError(f"prediction: must be a NoisePrediction; got {type(prediction).__name__}")
    if prediction.prediction != "epsilon":
        raise ValueError(f"prediction: must predict epsilon; got {prediction.prediction!r}")
    if isinstance(windows, bool) or not isinstance(windows, int):
        raise TypeError(f"windows: must be a whole number; got {windows!r}")
    if windows < 1 or prediction.schedule.steps % windows:
        raise ValueError(
            f"windows: must divide the schedule's steps, {prediction.schedule.steps}; got {windows}"
        )
    if epsilon_target not in EPSILON_TARGETS:
        raise ValueError(
            f"epsilon_target: must be one of {', '.join(EPSILON_TARGETS)}; got {epsilon_target!r}"
        )
