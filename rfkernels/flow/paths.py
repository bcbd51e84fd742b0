"""Probability paths x_t = alpha(t) x1 + sigma(t) x0 from a source x0 (t = 0) to data x1 (t = 1).

A path is its four coefficients. Everything else (the interpolation kernel, the conversions between
velocity, end points and score) is algebra on them, so a new path needs nothing but alpha and sigma.
The regression target of a path is the time derivative dalpha x1 + dsigma x0.

Coefficients are computed in float64 (float32 on devices without it) and returned in t's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

ScalarFunction = Callable[[Tensor], "Tensor | float"]


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives at t, each with t's shape and dtype."""

    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    dsigma: Tensor


@runtime_checkable
class Path(Protocol):
    """What the library asks of a path.

    ``name`` is how configurations and errors call it. ``t_end`` is the largest time at which the
    velocity target is finite: train and sample on [0, t_end].
    """

    @property
    def name(self) -> str: ...

    @property
    def t_end(self) -> float: ...

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """The four coefficients at times t in [0, 1] of any shape; a float gives 0-d float64."""
        ...


@dataclass(frozen=True)
class LinearPath:
    """The straight path of rectified flow: alpha = t, sigma = 1 - t (Liu, Gong, Liu 2022)."""

    name: ClassVar[str] = "linear"
    t_end: ClassVar[float] = 1.0

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """(t, 1 - t, 1, -1)."""
        wide, dtype = _wide_times(t)
        one = torch.ones_like(wide)
        return _narrow(dtype, wide, 1 - wide, one, -one)


@dataclass(frozen=True)
class TrigonometricPath:
    """The spherical path: alpha = sin(pi t / 2), sigma = cos(pi t / 2).

    It keeps the variance of independent unit-variance ends at 1 (Albergo, Vanden-Eijnden 2022).
    """

    name: ClassVar[str] = "trigonometric"
    t_end: ClassVar[float] = 1.0

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """(sin, cos, pi/2 cos, -pi/2 sin) of pi t / 2; cos is taken as the sine of pi (1-t) / 2."""
        wide, dtype = _wide_times(t)
        quarter = math.pi / 2
        # cos(pi/2) in floating point is 6e-17; the sine of the angle that remains is exactly 0.
        sine, cosine = torch.sin(quarter * wide), torch.sin(quarter * (1 - wide))
        return _narrow(dtype, sine, cosine, quarter * cosine, -quarter * sine)


@dataclass(frozen=True)
class VPPath:
    """The variance-preserving diffusion with linear beta, seen in flow time (Song et al. 2021)::

        log alpha = -(beta_max - beta_min)/4 (1-t)^2 - beta_min/2 (1-t)
        sigma     = sqrt(1 - alpha^2)

    Two things to know. The source end is not reached exactly: with the default betas
    alpha(0) = 0.0066. And sigma behaves like sqrt(beta_min (1-t)) near the data, so dsigma and with
    it the velocity target grow without bound: ``coefficients(1)`` returns dsigma = -inf, its limit,
    and the target there is infinite or, where x0 is 0, NaN. Stay on [0, ``t_end``].

    Args:
        beta_min, beta_max: noise rates at the data and the noise end, 0 < beta_min <= beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    name: ClassVar[str] = "vp"
    t_end: ClassVar[float] = 1 - 1e-5

    def __post_init__(self) -> None:
        _check_betas(type(self).__name__, self.beta_min, self.beta_max)

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """alpha, sqrt(1 - alpha^2) (through expm1, no cancellation), and derivatives."""
        wide, dtype = _wide_times(t)
        log_alpha, rate = _log_alpha(1 - wide, self.beta_min, self.beta_max)
        alpha = log_alpha.exp()
        sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
        dalpha = rate * alpha
        return _narrow(dtype, alpha, sigma, dalpha, -alpha * dalpha / sigma)

    def time_of_noise_ratio(self, ratio: Tensor | float) -> Tensor:
        """The flow time at which sigma / alpha equals ``ratio`` >= 0: the inverse of the schedule.

        1 - t solves (beta_max - beta_min)/2 u^2 + beta_min u = log(1 + ratio^2). Ratios above
        sigma(0)/alpha(0) give a negative time, since the path does not hold that much noise.
        """
        wide, dtype = _wide_times(ratio)
        return _remaining_time(torch.log1p(wide.square()), self.beta_min, self.beta_max).to(dtype)


@dataclass(frozen=True)
class SubVPPath:
    """The sub-VP diffusion: alpha as in :class:`VPPath`, sigma = 1 - alpha^2 (Song et al. 2021).

    sigma vanishes linearly at t = 1, so the velocity target is finite everywhere.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    name: ClassVar[str] = "sub-vp"
    t_end: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_betas(type(self).__name__, self.beta_min, self.beta_max)

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """alpha, 1 - alpha^2 (through expm1, no cancellation), and derivatives."""
        wide, dtype = _wide_times(t)
        log_alpha, rate = _log_alpha(1 - wide, self.beta_min, self.beta_max)
        alpha = log_alpha.exp()
        dalpha = rate * alpha
        return _narrow(dtype, alpha, -torch.expm1(2 * log_alpha), dalpha, -2 * alpha * dalpha)


@dataclass(frozen=True)
class CustomPath:
    """A path from two functions of time.

    Args:
        alpha, sigma: elementwise functions of a tensor of times; alpha(1) = 1 and sigma(1) = 0 for
            a path that ends at the data. They are called with float64 times.
        dalpha, dsigma: their derivatives. One that is not given is taken by forward-mode automatic
            differentiation, so its function must be made of differentiable torch operations.
        name: what errors and configurations call it.
        t_end: the largest time with a finite velocity target.
    """

    alpha: ScalarFunction
    sigma: ScalarFunction
    dalpha: ScalarFunction | None = None
    dsigma: ScalarFunction | None = None
    name: str = "custom"
    t_end: float = 1.0

    def __post_init__(self) -> None:
        for field in ("alpha", "sigma", "dalpha", "dsigma"):
            function = getattr(self, field)
            optional = field.startswith("d")
            if not (callable(function) or (optional and function is None)):
                raise TypeError(
                    f"CustomPath: {field} must be a function of time; got {type(function).__name__}"
                )

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """The given functions, or their forward-mode derivatives, at t."""
        wide, dtype = _wide_times(t)
        alpha, dalpha = self._value_and_derivative("alpha", wide)
        sigma, dsigma = self._value_and_derivative("sigma", wide)
        return _narrow(dtype, alpha, sigma, dalpha, dsigma)

    def _value_and_derivative(self, field: str, wide: Tensor) -> tuple[Tensor, Tensor]:
        function, derivative = getattr(self, field), getattr(self, f"d{field}")

        def evaluate(times: Tensor) -> Tensor:
            return _like_times(f"CustomPath: {field}", function(times), times)

        if derivative is None:
            value, tangent = torch.func.jvp(evaluate, (wide,), (torch.ones_like(wide),))
            return value, tangent
        return evaluate(wide), _like_times(f"CustomPath: d{field}", derivative(wide), wide)


PATHS: dict[str, type] = {
    "linear": LinearPath,
    "straight": LinearPath,
    "trigonometric": TrigonometricPath,
    "spherical": TrigonometricPath,
    "vp": VPPath,
    "sub-vp": SubVPPath,
    "subvp": SubVPPath,
}


def get_path(path: str | Path) -> Path:
    """The path of that name with its default options, or the object itself when it is a path.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an object without ``coefficients(t)``.
    """
    if isinstance(path, str):
        if path not in PATHS:
            raise ValueError(f"path: must be one of {', '.join(PATHS)}; got {path!r}")
        return PATHS[path]()
    if isinstance(path, type) or not callable(getattr(path, "coefficients", None)):
        raise TypeError(
            "path: must be a name or an object with coefficients(t); "
            f"got {path.__name__ if isinstance(path, type) else type(path).__name__}"
        )
    return path


def _wide_times(t: Tensor | float) -> tuple[Tensor, torch.dtype]:
    """t in the widest floating type of its device, and the dtype to give results back in."""
    times = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
    if not times.is_floating_point():
        raise TypeError(f"path: t must be floating point; got {times.dtype}")
    wide = torch.float32 if times.device.type == "mps" else torch.float64
    return times.to(wide), times.dtype


def _narrow(dtype: torch.dtype, *values: Tensor) -> Coefficients:
    return Coefficients(*(value.to(dtype) for value in values))


def _log_alpha(remaining: Tensor, beta_min: float, beta_max: float) -> tuple[Tensor, Tensor]:
    """log alpha and its flow-time derivative at 1 - t = remaining."""
    slope = beta_max - beta_min
    log_alpha = -(slope / 4) * remaining.square() - (beta_min / 2) * remaining
    return log_alpha, (slope / 2) * remaining + beta_min / 2


def _remaining_time(twice_log: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """t with -2 log alpha(t) = twice_log: the root without cancellation, exact at 0."""
    slope = beta_max - beta_min
    root = torch.sqrt(beta_min**2 + 2 * slope * twice_log)
    return 1 - 2 * twice_log / (beta_min + root)


def _check_betas(owner: str, beta_min: float, beta_max: float) -> None:
    if not 0 < beta_min <= beta_max < math.inf:
        raise ValueError(
            f"{owner}: betas must satisfy 0 < beta_min <= beta_max; got {beta_min}, {beta_max}"
        )


def _like_times(owner: str, value: Tensor | float, times: Tensor) -> Tensor:
    """The value of a user's function of time, which may be a constant, with the shape of times."""
    if not isinstance(value, Tensor):
        return torch.full_like(times, float(value))
    if value.shape != times.shape:
        raise ValueError(
            f"{owner} must return a tensor of the shape of its times, {tuple(times.shape)}; "
            f"got {tuple(value.shape)}"
        )
    return value.to(times.dtype)
