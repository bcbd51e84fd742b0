"""Distributions of the training time t on (0, 1), and the time shift; t = 0 is noise, 1 is data.

Draws are counter-based: a function of (seed, offset) alone, one random number per time, through the
exact inverse of the distribution function wherever there is one. Give the times a seed of their
own, ``derive_seed(run_seed, "time")``. Draws are float32 and never exactly 0 or 1, so that paths
with a singular end can take them.

Papers that count time from the data (FLUX, SD3, MeanFlow, 2-rectified flow++) write s = 1 - t.
The U-shaped, mode and cosmap distributions are symmetric, so nothing changes for them; each other
class says which end its parameters favour.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from rfkernels.ops.random import rand, randn

Time = TypeVar("Time", Tensor, float)

# Draws stay within these float32 numbers, half a step of a 24-bit uniform inside 0 and 1.
_SMALLEST, _LARGEST = 2.0**-25, 1 - 2.0**-24


class TimeDistribution(ABC):
    """A density on [0, 1] with draws. Subclasses define the formulas on the open interval."""

    name: ClassVar[str]

    def sample(
        self,
        n: int,
        *,
        seed: int | Tensor,
        offset: int | Tensor = 0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """(n,) float32 times in (0, 1); the same numbers for the same seed and offset.

        Args:
            n: how many.
            seed, offset: ints or int64 tensors as in ``rf.rand``; with (n,) tensors time i is what
                its own (seed, offset) would draw alone.
            device: where to draw.
        """
        times = self._draw(n, seed=seed, offset=offset, device=device)
        return times.to(torch.float32).clamp(_SMALLEST, _LARGEST)

    def pdf(self, t: Tensor | float) -> Tensor:
        """The density at t, float64, t's shape; 0 outside [0, 1]."""
        times = torch.as_tensor(t, dtype=torch.float64)
        density = torch.where((times < 0) | (times > 1), 0.0, self._pdf(times.clamp(0, 1)))
        return torch.where(times.isnan(), times, density)

    def cdf(self, t: Tensor | float) -> Tensor:
        """The probability of a time at most t, float64, t's shape."""
        return self._cdf(torch.as_tensor(t, dtype=torch.float64).clamp(0, 1))

    @abstractmethod
    def _draw(
        self, n: int, seed: int | Tensor, offset: int | Tensor, device: torch.device | str | None
    ) -> Tensor: ...

    @abstractmethod
    def _pdf(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _cdf(self, t: Tensor) -> Tensor: ...


class _ByInverse(TimeDistribution):
    """A distribution drawn through the inverse of its distribution function at a uniform."""

    def _draw(
        self, n: int, seed: int | Tensor, offset: int | Tensor, device: torch.device | str | None
    ) -> Tensor:
        # Uniforms at the middles of 2^24 equal cells: symmetric about 1/2 and inside (0, 1).
        uniform = _widen(rand(n, seed=seed, offset=offset, device=device)) + 2.0**-25
        return self._quantile(uniform)

    @abstractmethod
    def _quantile(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Uniform(_ByInverse):
    """Uniform on [eps, t_end].

    The original rectified flow has eps = 1e-3; t_end serves paths that stop short of 1.
    """

    eps: float = 0.0
    t_end: float = 1.0

    name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.eps < self.t_end <= 1:
            raise ValueError(
                f"Uniform: eps and t_end must satisfy 0 <= eps < t_end <= 1; "
                f"got {self.eps}, {self.t_end}"
            )

    def _quantile(self, u: Tensor) -> Tensor:
        return self.eps + (self.t_end - self.eps) * u

    def _pdf(self, t: Tensor) -> Tensor:
        inside = (t >= self.eps) & (t <= self.t_end)
        return torch.where(inside, 1 / (self.t_end - self.eps), 0.0).to(t)

    def _cdf(self, t: Tensor) -> Tensor:
        return ((t - self.eps) / (self.t_end - self.eps)).clamp(0, 1)


@dataclass(frozen=True)
class LogitNormal(TimeDistribution):
    """t = sigmoid(mean + std n), n standard normal (Esser et al. 2024, SD3: mean 0, std 1).

    mean > 0 favours t = 1, the data; a paper's mean on s = 1 - t changes sign here (MeanFlow's -0.4
    is mean = 0.4). A small std gathers the times around sigmoid(mean).
    """

    mean: float = 0.0
    std: float = 1.0

    name: ClassVar[str] = "logit-normal"

    def __post_init__(self) -> None:
        _check_finite("LogitNormal", "mean", self.mean)
        _check_positive("LogitNormal", "std", self.std)

    def _draw(
        self, n: int, seed: int | Tensor, offset: int | Tensor, device: torch.device | str | None
    ) -> Tensor:
        normal = _widen(randn(n, seed=seed, offset=offset, device=device))
        return torch.sigmoid(self.mean + self.std * normal)

    def _pdf(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        density = torch.exp(-0.5 * z.square()) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return torch.where((t == 0) | (t == 1), 0.0, density)

    def _cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(t) - self.mean) / self.std)


@dataclass(frozen=True)
class UShaped(_ByInverse):
    """Both ends more often than the middle (Lee, Lin, Fanti 2024, 2-rectified flow++; a = 4)::

        pdf(t) = a cosh(a (t - 1/2)) / (2 sinh(a/2))
        t      = 1/2 + asinh((2u - 1) sinh(a/2)) / a,   u uniform

    Symmetric, so it favours neither end; the weight of both grows with a, and a = 0 is uniform. The
    paper prints exp(at) + exp(-at), which on [0, 1] is monotone; its code and its figure are this.
    """

    a: float = 4.0

    name: ClassVar[str] = "u-shaped"

    def __post_init__(self) -> None:
        # Past 200 all mass is within 1/20 of the ends, and sinh(a/2)^2 would soon overflow.
        if not 0 <= self.a <= 200:
            raise ValueError(f"UShaped: a must lie in [0, 200]; got {self.a}")

    def _quantile(self, u: Tensor) -> Tensor:
        if self.a == 0:
            return u
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a

    def _pdf(self, t: Tensor) -> Tensor:
        if self.a == 0:
            return torch.ones_like(t)
        return self.a * torch.cosh(self.a * (t - 0.5)) / (2 * math.sinh(self.a / 2))

    def _cdf(self, t: Tensor) -> Tensor:
        if self.a == 0:
            return t
        return 0.5 + torch.sinh(self.a * (t - 0.5)) / (2 * math.sinh(self.a / 2))


@dataclass(frozen=True)
class Mode(_ByInverse):
    """SD3's mode sampling with heavy tails: t = u + scale (u - sin^2(pi u / 2)), u uniform.

    Symmetric. scale > 0 favours the middle, scale < 0 both ends, 0 is uniform; the map is monotone
    for -1 <= scale <= 2 / (pi - 2) = 1.7519 (Esser et al. 2024, where 1.29 does best). At those
    limits the density is infinite at both ends, or in the middle.
    """

    scale: float = 1.29

    name: ClassVar[str] = "mode"

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"Mode: scale must lie in [-1, 2 / (pi - 2)], about 1.7519; got {self.scale}"
            )

    def _quantile(self, u: Tensor) -> Tensor:
        return u + self.scale * (u - torch.sin(math.pi / 2 * u).square())

    def _pdf(self, t: Tensor) -> Tensor:
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * self._cdf(t))))

    def _cdf(self, t: Tensor) -> Tensor:
        # Bisection on the half next to 0, where float64 resolves the flat end of scale = -1.
        target = torch.minimum(t, 1 - t)
        low, high = torch.zeros_like(t), torch.full_like(t, 0.5)
        for _ in range(54):
            middle = (low + high) / 2
            below = self._quantile(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(t.isnan(), t, torch.where(t < 0.5, low, 1 - low))


@dataclass(frozen=True)
class CosMap(_ByInverse):
    """SD3's cosmap, uniform in the angle of the cosine schedule: t = 1 - 1 / (tan(pi u / 2) + 1).

    Symmetric, density 2 / (pi (1 - 2t + 2t^2)): twice as high in the middle as at the ends
    (Esser et al. 2024).
    """

    name: ClassVar[str] = "cosmap"

    def _quantile(self, u: Tensor) -> Tensor:
        # tan / (tan + 1) with the quarter turn's cosine taken as a sine, so that no term overflows.
        sine, cosine = torch.sin(math.pi / 2 * u), torch.sin(math.pi / 2 * (1 - u))
        return sine / (sine + cosine)

    def _pdf(self, t: Tensor) -> Tensor:
        return 2 / (math.pi * (t.square() + (1 - t).square()))

    def _cdf(self, t: Tensor) -> Tensor:
        return (2 / math.pi) * torch.atan2(t, 1 - t)


@dataclass(frozen=True)
class Beta(_ByInverse):
    """The beta distribution, density proportional to t^(a-1) (1-t)^(b-1).

    a > b favours t = 1, the data, b > a the noise; below 1 either piles up at its end. ``sample``
    and ``cdf`` need scipy, which comes with the extra ``train``; draws pass through the host.
    """

    a: float
    b: float

    name: ClassVar[str] = "beta"

    def __post_init__(self) -> None:
        _check_positive("Beta", "a", self.a)
        _check_positive("Beta", "b", self.b)

    def _quantile(self, u: Tensor) -> Tensor:
        inverse = _scipy_special().betaincinv(self.a, self.b, u.double().cpu().numpy())
        return torch.as_tensor(inverse).to(u)

    def _pdf(self, t: Tensor) -> Tensor:
        log_norm = math.lgamma(self.a) + math.lgamma(self.b) - math.lgamma(self.a + self.b)
        left = torch.special.xlogy(torch.full_like(t, self.a - 1), t)
        right = torch.special.xlogy(torch.full_like(t, self.b - 1), 1 - t)
        return torch.exp(left + right - log_norm)

    def _cdf(self, t: Tensor) -> Tensor:
        return torch.as_tensor(_scipy_special().betainc(self.a, self.b, t.cpu().numpy())).to(t)


@dataclass(frozen=True)
class Shifted(TimeDistribution):
    """Another distribution's times moved by :func:`time_shift`; shift > 1 favours the noise."""

    base: TimeDistribution = field(default_factory=Uniform)
    shift: float = 3.0

    name: ClassVar[str] = "shifted"

    def __post_init__(self) -> None:
        if not isinstance(self.base, TimeDistribution):
            raise TypeError(
                f"Shifted: base must be a TimeDistribution; got {type(self.base).__name__}"
            )
        _check_positive("Shifted", "shift", self.shift)

    def _draw(
        self, n: int, seed: int | Tensor, offset: int | Tensor, device: torch.device | str | None
    ) -> Tensor:
        times = self.base._draw(n, seed=seed, offset=offset, device=device)
        return time_shift(times, self.shift)

    def _pdf(self, t: Tensor) -> Tensor:
        slope = self.shift / (1 + (self.shift - 1) * t).square()
        return self.base._pdf(inverse_time_shift(t, self.shift)) * slope

    def _cdf(self, t: Tensor) -> Tensor:
        return self.base._cdf(inverse_time_shift(t, self.shift))


TIME_DISTRIBUTIONS: dict[str, type[TimeDistribution]] = {
    kind.name: kind for kind in (Uniform, LogitNormal, UShaped, Mode, CosMap, Beta, Shifted)
}


def get_time_distribution(distribution: str | TimeDistribution, **options: Any) -> TimeDistribution:
    """The distribution of that name with its options, or the object itself.

    ``get_time_distribution("logit-normal", mean=0.4)``; names are those of TIME_DISTRIBUTIONS.

    Raises:
        ValueError: for an unknown name or bad values of the options.
        TypeError: for another type, options beside an object, or unknown options.
    """
    if isinstance(distribution, TimeDistribution):
        if options:
            raise TypeError(
                "get_time_distribution: options are for names; "
                f"got {', '.join(options)} beside {distribution!r}"
            )
        return distribution
    if not isinstance(distribution, str):
        raise TypeError(
            "get_time_distribution: distribution must be a name or a TimeDistribution; "
            f"got {type(distribution).__name__}"
        )
    if distribution not in TIME_DISTRIBUTIONS:
        raise ValueError(
            "get_time_distribution: distribution must be one of "
            f"{', '.join(TIME_DISTRIBUTIONS)}; got {distribution!r}"
        )
    return TIME_DISTRIBUTIONS[distribution](**options)


def time_shift(t: Time, shift: float) -> Time:
    """t / (t + shift (1 - t)): times moved toward the noise for shift > 1, toward the data below 1.

    On the noise level s = 1 - t this is s' = shift s / (1 + (shift - 1) s), the shift of SD3 and,
    with shift = exp(mu), of FLUX (Esser et al. 2024, section 5.3.2). The ends stay exactly where
    they are, and shifting by a and then b is shifting by ab: apply it to a grid once.

    Raises:
        ValueError: unless shift is positive and finite.
    """
    _check_positive("time_shift", "shift", shift)
    return t / (t + shift * (1 - t))


def inverse_time_shift(t: Time, shift: float) -> Time:
    """The time that ``time_shift`` with the same shift takes to t."""
    _check_positive("inverse_time_shift", "shift", shift)
    return shift * t / (shift * t + (1 - t))


def _widen(values: Tensor) -> Tensor:
    """float64, on devices that have it."""
    return values if values.device.type == "mps" else values.double()


def _check_finite(owner: str, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be finite; got {value}")


def _check_positive(owner: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{owner}: {name} must be positive and finite; got {value}")


def _scipy_special() -> Any:
    try:
        from scipy import special
    except ImportError as error:
        raise ImportError(
            'Beta: scipy is needed; install it with pip install "rfkernels[train]"'
        ) from error
    return special
