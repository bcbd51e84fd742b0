"""Conversions between the quantities a flow network may predict, and between time conventions.

At a state x = alpha x1 + sigma x0 the velocity, the data estimate x1, the source (noise) estimate
x0 and, for a standard Gaussian source drawn independently of the data, the score say the same:

    velocity = dalpha x1 + dsigma x0        score = -x0 / sigma

``convert`` and the named functions turn one into another for every path and per-sample times.
With D = alpha dsigma - dalpha sigma (-1 for the straight path, -pi/2 for the spherical one):

    from velocity:  x1 = (dsigma x - sigma v) / D        x0 = (alpha v - dalpha x) / D
    from x1:        x0 = (x - alpha x1) / sigma          velocity = (dsigma x - D x1) / sigma
    from x0:        x1 = (x - sigma x0) / alpha          velocity = (dalpha x + D x0) / alpha
    score = -x0 / sigma,  x0 = -sigma score

**End points.** Where the answer is not determined, every element of that sample is NaN, and no
other sample is touched. Where sigma = 0 (t = 1): x0 and velocity from x1, and the score from
anything. Where alpha = 0 (t = 0 of the straight and spherical paths): x1 and velocity from x0 or
from the score. What is determined stays finite: x1 = x + (1-t) v and x0 = x - t v on the straight
path hold at both ends. On the VP path dsigma is infinite at t = 1: there x1 = x whatever the
velocity, and x0 and velocity are NaN.

Times here are flow times, 0 = noise and 1 = data, unless a function's name says otherwise.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from rfkernels.flow.paths import Path, VPPath, get_path

Quantity = Literal["velocity", "x1", "x0", "score"]
Time = TypeVar("Time", Tensor, float)


def convert(
    value: Tensor,
    x: Tensor,
    t: Tensor | float,
    *,
    source: Quantity,
    target: Quantity,
    path: str | Path = "linear",
) -> Tensor:
    """Turn one predicted quantity into another at the state x and time t.

    Args:
        value: (B, ...) the quantity named by ``source``, shape of x.
        x: (B, ...) states on the path.
        t: float, 0-d or (B,) flow times.
        source, target: "velocity", "x1", "x0" or "score".
        path: a name or a path object.

    Returns:
        (B, ...) the quantity named by ``target``, in value's dtype; arithmetic in float32, or
        float64 when value or x is float64. See the module's text for the end points.

    Raises:
        ValueError: for an unknown quantity or shapes that do not fit.
    """
    for name, quantity in (("source", source), ("target", target)):
        if quantity not in get_args(Quantity):
            raise ValueError(
                f"convert: {name} must be one of {', '.join(get_args(Quantity))}; got {quantity!r}"
            )
    if value.shape != x.shape:
        raise ValueError(
            f"convert: the {source} must have the shape of x, {tuple(x.shape)}; "
            f"got {tuple(value.shape)}"
        )
    if source == target:
        return value
    dtype = torch.promote_types(torch.promote_types(value.dtype, x.dtype), torch.float32)
    return _Algebra(x.to(dtype), t, path).convert(value.to(dtype), source, target).to(value.dtype)


class _Algebra:
    """The conversions at one (x, t): coefficients broadcast over the samples' elements."""

    def __init__(self, x: Tensor, t: Tensor | float, path: str | Path) -> None:
        self.x = x
        times = _per_sample(t, x)
        coefficients = get_path(path).coefficients(times)
        self.alpha, self.sigma, self.dalpha, self.dsigma = (c.to(x.dtype) for c in coefficients)
        self.determinant = self.alpha * self.dsigma - self.dalpha * self.sigma
        self.at_infinite_rate = torch.isinf(self.dsigma)

    def convert(self, value: Tensor, source: Quantity, target: Quantity) -> Tensor:
        if source == "score":
            value, source = -self.sigma * value, "x0"
        if target == "score":
            return -_divide(self._x0(value, source), self.sigma)
        if target == "x0":
            return self._x0(value, source)
        if target == "x1":
            return self._x1(value, source)
        return self._velocity(value, source)

    def _x0(self, value: Tensor, source: Quantity) -> Tensor:
        if source == "x0":
            return value
        if source == "x1":
            return _divide(self.x - self.alpha * value, self.sigma)
        result = _divide(self.alpha * value - self.dalpha * self.x, self.determinant)
        return torch.where(self.at_infinite_rate, math.nan, result)

    def _x1(self, value: Tensor, source: Quantity) -> Tensor:
        if source == "x0":
            return _divide(self.x - self.sigma * value, self.alpha)
        result = _divide(self.dsigma * self.x - self.sigma * value, self.determinant)
        return torch.where(self.at_infinite_rate, _divide(self.x, self.alpha), result)

    def _velocity(self, value: Tensor, source: Quantity) -> Tensor:
        if source == "x0":
            return _divide(self.dalpha * self.x + self.determinant * value, self.alpha)
        return _divide(self.dsigma * self.x - self.determinant * value, self.sigma)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, NaN where the denominator is 0: nothing there tells what the answer is."""
    return torch.where(denominator == 0, math.nan, numerator / denominator)


def _per_sample(t: Tensor | float, x: Tensor) -> Tensor:
    """t, a number or (B,), as a float64 (float32 without it) tensor that broadcasts over x."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    times = torch.as_tensor(t, dtype=wide, device=x.device)
    if times.ndim == 0:
        return times
    if x.ndim == 0 or times.shape != x.shape[:1]:
        raise ValueError(
            f"convert: t must be a number or have shape ({x.shape[0] if x.ndim else 1},); "
            f"got {tuple(times.shape)}"
        )
    return times.reshape(-1, *([1] * (x.ndim - 1)))


def x1_from_velocity(
    velocity: Tensor, x: Tensor, t: Tensor | float, path: str | Path = "linear"
) -> Tensor:
    """The data estimate; x + (1 - t) v on the straight path. See :func:`convert`."""
    return convert(velocity, x, t, source="velocity", target="x1", path=path)


def x0_from_velocity(
    velocity: Tensor, x: Tensor, t: Tensor | float, path: str | Path = "linear"
) -> Tensor:
    """The source (noise) estimate; x - t v on the straight path. See :func:`convert`."""
    return convert(velocity, x, t, source="velocity", target="x0", path=path)


def score_from_velocity(
    velocity: Tensor, x: Tensor, t: Tensor | float, path: str | Path = "linear"
) -> Tensor:
    """The score; (t v - x) / (1 - t) on the straight path. See :func:`convert`."""
    return convert(velocity, x, t, source="velocity", target="score", path=path)


def velocity_from_x1(
    x1: Tensor, x: Tensor, t: Tensor | float, path: str | Path = "linear"
) -> Tensor:
    """The velocity of a data prediction (a denoiser); (x1 - x) / (1 - t) on the straight path."""
    return convert(x1, x, t, source="x1", target="velocity", path=path)


def velocity_from_x0(
    x0: Tensor, x: Tensor, t: Tensor | float, path: str | Path = "linear"
) -> Tensor:
    """The velocity of a noise prediction; (x - x0) / t on the straight path."""
    return convert(x0, x, t, source="x0", target="velocity", path=path)


def velocity_from_score(
    score: Tensor, x: Tensor, t: Tensor | float, path: str | Path = "linear"
) -> Tensor:
    """The velocity of a score; (x + (1 - t) score) / t on the straight path."""
    return convert(score, x, t, source="score", target="velocity", path=path)


def guided_velocity(
    conditional: Tensor, unconditional: Tensor, guidance_scale: Tensor | float
) -> Tensor:
    """Classifier-free guidance, u + g (c - u) (Ho, Salimans 2022).

    g = 1 is the conditional field, 0 the unconditional one; papers that write
    cond + w (cond - uncond) mean g = 1 + w. ``guidance_scale`` is a number, 0-d or (B,).
    """
    if conditional.shape != unconditional.shape:
        raise ValueError(
            "guided_velocity: unconditional must have the shape of conditional, "
            f"{tuple(conditional.shape)}; got {tuple(unconditional.shape)}"
        )
    scale = _per_sample(guidance_scale, conditional).to(conditional.dtype)
    return unconditional + scale * (conditional - unconditional)


# --- diffusers, FLUX, SD3: sigma = 1 - t, the velocity pointing from data to noise ---------------


def diffusers_sigma_from_time(t: Time) -> Time:
    """sigma = 1 - t: noise level 1 at the source, 0 at the data."""
    return 1 - t


def time_from_diffusers_sigma(sigma: Time) -> Time:
    """t = 1 - sigma."""
    return 1 - sigma


def diffusers_timestep_from_time(t: Time, num_train_timesteps: int = 1000) -> Time:
    """The number those networks are fed: sigma times num_train_timesteps, not rounded."""
    return (1 - t) * num_train_timesteps


def time_from_diffusers_timestep(timestep: Time, num_train_timesteps: int = 1000) -> Time:
    """t = 1 - timestep / num_train_timesteps."""
    return 1 - timestep / num_train_timesteps


def velocity_from_diffusers(output: Tensor) -> Tensor:
    """-output: those networks predict x0 - x1, noise minus data."""
    return -output


def diffusers_from_velocity(velocity: Tensor) -> Tensor:
    """-velocity, what a diffusers scheduler expects from its network."""
    return -velocity


# --- Gaussian diffusions onto the straight path ---------------------------------------------------
# A state alpha x1 + sigma x0 divided by alpha + sigma lies on the straight path at
# t = alpha / (alpha + sigma), and a denoiser's estimate of x1 is the same on both.


def linear_time_from_path(t: Tensor | float, path: str | Path) -> Tensor:
    """The straight path's time with the signal-to-noise ratio that ``path`` has at t."""
    alpha, sigma, _, _ = get_path(path).coefficients(t)
    return alpha / (alpha + sigma)


def linear_state_from_path(x: Tensor, t: Tensor | float, path: str | Path) -> Tensor:
    """The state of ``path`` at t, rescaled onto the straight path: x / (alpha + sigma)."""
    alpha, sigma, _, _ = get_path(path).coefficients(_per_sample(t, x))
    return x / (alpha + sigma).to(x.dtype)


def path_state_from_linear(x: Tensor, path_t: Tensor | float, path: str | Path) -> Tensor:
    """A straight-path state rescaled onto ``path`` at its own time path_t: x (alpha + sigma)."""
    alpha, sigma, _, _ = get_path(path).coefficients(_per_sample(path_t, x))
    return x * (alpha + sigma).to(x.dtype)


def vp_time_from_linear(t: Tensor | float, path: VPPath | None = None) -> Tensor:
    """The VP path's flow time with the noise ratio (1-t)/t of the straight path at t in (0, 1]."""
    return (path or VPPath()).time_of_noise_ratio((1 - t) / t)


def edm_sigma_from_time(t: Time) -> Time:
    """sigma = (1-t)/t of the variance-exploding state y = x1 + sigma x0; t in (0, 1]."""
    return (1 - t) / t


def time_from_edm_sigma(sigma: Time) -> Time:
    """t = 1 / (1 + sigma)."""
    return 1 / (1 + sigma)


def edm_state_from_linear(x: Tensor, t: Tensor | float) -> Tensor:
    """y = x / t: what a VE or EDM denoiser takes, with sigma = (1-t)/t; t in (0, 1]."""
    return x / _per_sample(t, x).to(x.dtype)


def linear_state_from_edm(y: Tensor, sigma: Tensor | float) -> Tensor:
    """x = y / (1 + sigma), at t = 1 / (1 + sigma)."""
    return y / (1 + _per_sample(sigma, y)).to(y.dtype)


def trigflow_angle_from_time(t: Tensor | float) -> Tensor:
    """TrigFlow's angle arctan((1-t)/t), data of unit scale: pi/2 at the source, 0 at the data."""
    times = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
    return torch.atan2(1 - times, times)


def trigflow_state_from_linear(x: Tensor, t: Tensor | float) -> Tensor:
    """x / sqrt((1-t)^2 + t^2) = cos(angle) x1 + sin(angle) x0."""
    times = _per_sample(t, x)
    return x / torch.hypot(1 - times, times).to(x.dtype)
