"""A diffusion network, which predicts noise (or v, or data) on a schedule, as a velocity field."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rfkernels.flow.schedules import NoiseSchedule, describe_schedule, get_schedule
from rfkernels.models.denoisers import NetworkWrapper
from rfkernels.ops.ode_step import linear_step

__all__ = ["PREDICTIONS", "NoisePrediction"]

PREDICTIONS = ("epsilon", "v", "x1")

# How exactly float32 and float64 times carry an index. What is this near to a whole number is that
# number, so that a network is asked at the indices it was trained on.
_NARROW, _WIDE = 3e-4, 1e-6


class NoisePrediction(NetworkWrapper):
    """The velocity field of a diffusion network: velocity(x, t, **condition) on the straight path.

    The network is called as ``network(x_k, k, **condition)`` at states x_k = alpha_k x1 + sigma_k
    x0 of its schedule. With F its answer, the estimates of data and noise are

        "epsilon"   x0^ = F                                  x1^ = (x_k - sigma F) / alpha
        "v"         x0^ = (sigma x_k + alpha F) / n          x1^ = (alpha x_k - sigma F) / n
        "x1"        x0^ = (x_k - alpha F) / sigma            x1^ = F

    with n = alpha^2 + sigma^2 (v = alpha x0 - sigma x1; Salimans, Ho 2022), and the velocity is x1^
    - x0^. At time t the network is asked at the real-valued index k of noise ratio sigma / alpha =
    (1 - t) / t, and x_k = (alpha + sigma) x_t. An Euler step from t to s then lands on s x1^ + (1 -
    s) x0^, which is the DDIM step (Song, Meng, Ermon 2021).

    **Ends.** No schedule reaches noise ratios 0 and infinity; beyond its ends the network is asked
    at the end index, with the state scaled as the path says. Toward noise the data estimate counts
    and the velocity is (x1^ - x) / (1 - t): one Euler step from noise gives x1^, as one DDIM step
    from unit noise at the last index does. Toward the data the noise estimate counts, (x - x0^) /
    t. Everywhere the velocity is A x + B F with numbers A and B that stay finite on [0, 1].

    Args:
        network: ``network(x_k, k, **condition)`` like x_k; k (B,) is float32, float64 for float64
            states, a real number in [0, steps - 1], and whole wherever t is the time of an index.
        schedule: a name or object of ``rfkernels.flow``.
        prediction: "epsilon", "v" or "x1".

    Raises:
        ValueError: for an unknown name. TypeError: for what is no network or schedule.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: str | NoiseSchedule = "scaled-linear",
        prediction: str = "epsilon",
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"network: must be a torch.nn.Module; got {type(network).__name__}")
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction: must be one of {', '.join(PREDICTIONS)}; got {prediction!r}"
            )
        schedule = get_schedule(schedule)
        super().__init__(network, schedule=describe_schedule(schedule), prediction=prediction)
        self.schedule, self.prediction = schedule, prediction

    def with_schedule(self, schedule: str | NoiseSchedule) -> NoisePrediction:
        """This network, not copied, on another schedule: to train and sample it with that one."""
        return NoisePrediction(self.network, schedule, self.prediction)

    def extra_repr(self) -> str:
        return f"schedule={self.schedule}, prediction={self.prediction!r}"

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        *,
        index: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        """The velocity at (x, t); with ``index`` instead of t the network's own answer.

        Args:
            x: (B, ...) states, of the straight path; with ``index`` of the schedule.
            t: (B,) times in [0, 1], 0 = noise.
            index: (B,) indices k, handed to the network as floating point numbers.
            condition: keyword arguments of the network.

        Returns:
            A tensor like x; with ``index`` in the network's dtype.
        """
        if (t is None) == (index is None):
            raise ValueError("NoisePrediction: give t or index, one of the two")
        if index is not None:
            return self.network(x, _numbers(index, x), **condition)
        k, scale, keep, gain = self._plan(t)
        x_k = linear_step(x, (), (), x_coefficient=scale)
        answer = self.network(x_k, _numbers(k, x), **condition)
        return linear_step(x, (answer,), (gain,), x_coefficient=keep)

    def predict(self, x_k: Tensor, k: Tensor, **condition: Any) -> Tensor:
        """The network's answer at states x_k (B, ...) of the schedule and indices k (B,)."""
        return self(x_k, index=k, **condition)

    def add_noise(self, x1: Tensor, x0: Tensor, k: Tensor) -> Tensor:
        """x_k = alpha_k x1 + sigma_k x0 at indices k (B,), for x1 and x0 (B, ...)."""
        alpha, sigma = self.schedule.coefficients(k)
        return linear_step(x1, (x0,), (sigma,), x_coefficient=alpha)

    def estimates(self, x_k: Tensor, k: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """(x1^, x0^), data and noise, from the network's answer at states x_k and indices k (B,).

        Differentiable in the answer; in x_k's dtype.
        """
        alpha, sigma = self.schedule.coefficients(k)
        of_x1, of_x0 = self._estimators(alpha, sigma)
        return tuple(
            linear_step(x_k, (answer,), (gain,), x_coefficient=keep)
            for keep, gain in (of_x1, of_x0)
        )

    def ddim_step(self, x_a: Tensor, a: Tensor, b: Tensor, noise: Tensor) -> Tensor:
        """The state at indices b (B,) of the path through x_a at indices a with constant noise.

        (alpha_b / alpha_a) x_a + alpha_b (sigma_b / alpha_b - sigma_a / alpha_a) noise: the DDIM
        step, exact for every b where the flow is first-order (Wang et al. 2024).
        """
        ratio_a, ratio_b = self.schedule.noise_ratio_at(a), self.schedule.noise_ratio_at(b)
        alpha_a, alpha_b = (self.schedule.alpha_of_noise_ratio(r) for r in (ratio_a, ratio_b))
        gain = alpha_b * (ratio_b - ratio_a)
        return linear_step(x_a, (noise,), (gain,), x_coefficient=alpha_b / alpha_a)

    def _estimators(
        self, alpha: Tensor, sigma: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Coefficients of (x_k, answer) in x1^ and in x0^."""
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.prediction == "epsilon":
            return (1 / alpha, -sigma / alpha), (zero, one)
        if self.prediction == "x1":
            return (zero, one), (1 / sigma, -alpha / sigma)
        norm = alpha.square() + sigma.square()
        return (alpha / norm, -sigma / norm), (sigma / norm, alpha / norm)

    def _plan(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At times (B,): k, the scale of x_k = scale x, and velocity = keep x + gain F."""
        schedule = self.schedule
        nearly = _WIDE if t.dtype == torch.float64 else _NARROW
        t = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        # Below, the noise ratio is infinite for every purpose here; its square stays finite in float32.
        ratio = (1 - t) / t.clamp_min(1e-18)
        k = schedule.index_of_noise_ratio(ratio)
        whole = k.detach().round()
        k = torch.where((k.detach() - whole).abs() < nearly, whole + (k - k.detach()), k)
        on_path = schedule.alpha_of_noise_ratio(ratio)
        scale = on_path / t.clamp_min(1e-18)  # alpha + sigma, as alpha / t
        least, most = schedule.noise_ratio_ends(t.device)
        noisy, clean = ratio > most, ratio < least
        known = ratio.clamp(least, most)
        alpha = schedule.alpha_of_noise_ratio(known)
        sigma = alpha * known
        (x1_keep, x1_gain), (x0_keep, x0_gain) = self._estimators(alpha, sigma)
        x1_keep, x0_keep = scale * x1_keep, scale * x0_keep
        # v = x1^ - x0^, where the estimate that the end does not determine is replaced by what the
        # other one and the state imply.
        noise_side, data_side = torch.where(noisy, 1 - t, 1.0), torch.where(clean, t, 1.0)
        keep = torch.where(noisy, (x1_keep - 1) / noise_side, x1_keep - x0_keep)
        gain = torch.where(noisy, x1_gain / noise_side, x1_gain - x0_gain)
        keep = torch.where(clean, (1 - x0_keep) / data_side, keep)
        gain = torch.where(clean, -x0_gain / data_side, gain)
        return k, scale, keep, gain


def _numbers(k: Tensor, x: Tensor) -> Tensor:
    """Indices as networks read them."""
    return k.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
