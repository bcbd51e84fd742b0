"""Discrete noise schedules of diffusion models: alpha and sigma at the indices k = 0 .. steps - 1.

A pretrained diffusion network knows the states x_k = alpha_k x1 + sigma_k x0 of one such table, k =
0 next to the data and the last index next to noise: the opposite direction of the library's time t.
A schedule is its table of log(sigma / alpha) in float64, and the rule that gives alpha from the
noise ratio sigma / alpha; between two indices the logarithm of the ratio is interpolated linearly.

    LinearBetas, ScaledLinearBetas, CosineBetas    alpha_bar_k = (1 - beta_0) ... (1 - beta_k)
    VPSchedule, SubVPSchedule                      Song et al.'s continuous ones at (k + 1) / steps

With alpha_bar = alpha^2 the first four keep alpha^2 + sigma^2 = 1; sub-VP has sigma = 1 - alpha^2.

A state on a schedule and one on the straight path x_t = (1-t) x0 + t x1 are multiples of each
other at equal noise ratio: t = alpha / (alpha + sigma), x_t = x_k / (alpha + sigma).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CosineBetas",
    "LinearBetas",
    "NoiseSchedule",
    "ScaledLinearBetas",
    "SubVPSchedule",
    "VPSchedule",
    "describe_schedule",
    "get_schedule",
]


class NoiseSchedule(ABC):
    """What the schedules share. Subclasses are frozen dataclasses with a field ``steps``.

    Tables are float64 tensors (steps,) on the CPU, computed once.
    """

    steps: int

    @cached_property
    @abstractmethod
    def log_alpha_bar(self) -> Tensor:
        """log(alpha^2) at every index, strictly decreasing."""

    @cached_property
    def log_noise_ratio(self) -> Tensor:
        """log(sigma / alpha) at every index, strictly increasing."""
        # sigma^2 = 1 - alpha^2 through expm1: near the data it is small against 1.
        return 0.5 * (torch.log(-torch.expm1(self.log_alpha_bar)) - self.log_alpha_bar)

    def alpha_of_noise_ratio(self, ratio: Tensor) -> Tensor:
        """alpha where sigma / alpha = ratio, ratio in [0, inf): 1 / sqrt(1 + ratio^2)."""
        return torch.rsqrt(1 + ratio.square())

    @property
    def alpha_bar(self) -> Tensor:
        """alpha^2, the product of the 1 - beta; diffusers calls it alphas_cumprod."""
        return self.log_alpha_bar.exp()

    @property
    def alpha(self) -> Tensor:
        """The data's coefficient."""
        return (0.5 * self.log_alpha_bar).exp()

    @property
    def noise_ratio(self) -> Tensor:
        """sigma / alpha (NSR)."""
        return self.log_noise_ratio.exp()

    @property
    def sigma(self) -> Tensor:
        """The noise's coefficient."""
        return self.alpha * self.noise_ratio

    @property
    def linear_times(self) -> Tensor:
        """alpha / (alpha + sigma): the straight path's time of every index, decreasing in k."""
        return 1 / (1 + self.noise_ratio)

    def coefficients(self, k: Tensor | int) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at indices k.

        Args:
            k: integers, or floating point numbers that are interpolated between; of any shape, in
                [0, steps - 1]. What lies outside is taken as the end next to it.

        Returns:
            Two float64 (float32 on devices without it) tensors of k's shape on its device.
        """
        ratio = self.noise_ratio_at(torch.as_tensor(k))
        alpha = self.alpha_of_noise_ratio(ratio)
        return alpha, alpha * ratio

    def noise_ratio_at(self, k: Tensor) -> Tensor:
        """sigma / alpha at indices k, as in :meth:`coefficients`."""
        table = self._on(k.device)
        if not k.is_floating_point():
            return table[k.clamp(0, self.steps - 1)].exp()
        k = k.to(table.dtype).clamp(0, self.steps - 1)
        lower = k.detach().floor().long().clamp(0, self.steps - 2)
        return torch.lerp(table[lower], table[lower + 1], k - lower).exp()

    def noise_ratio_ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """sigma / alpha at the first and the last index, 0-d on a device."""
        table = self._on(device)
        return table[0].exp(), table[-1].exp()

    def index_of_noise_ratio(self, ratio: Tensor) -> Tensor:
        """The index, a real number in [0, steps - 1], at which sigma / alpha = ratio.

        The inverse of :meth:`noise_ratio_at`, differentiable; ratios outside the table give its
        ends. Same shape as ``ratio``, float64 (float32 on devices without it).
        """
        table = self._on(ratio.device)
        wanted = ratio.to(table.dtype).clamp_min(torch.finfo(table.dtype).tiny).log()
        wanted = wanted.clamp(table[0], table[-1])
        lower = torch.searchsorted(table, wanted.detach().contiguous(), right=True) - 1
        lower = lower.clamp(0, self.steps - 2)
        return lower + (wanted - table[lower]) / (table[lower + 1] - table[lower])

    def _on(self, device: torch.device) -> Tensor:
        """The table on a device, kept there: a copy at every call would wait for the device."""
        kept = self.__dict__.setdefault("_tables", {})
        if device not in kept:
            wide = torch.float32 if device.type == "mps" else torch.float64
            with torch.inference_mode(False):  # else backward passes could not use it later
                kept[device] = self.log_noise_ratio.to(device, wide)
        return kept[device]

    def __getstate__(self) -> dict[str, object]:
        """The options: a copy makes its own tables."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class _Betas(NoiseSchedule):
    """alpha_bar as a running product of 1 - beta."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000

    def __post_init__(self) -> None:
        _check_steps(type(self).__name__, self.steps)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"{type(self).__name__}: betas must satisfy 0 < beta_start <= beta_end < 1; got "
                f"{self.beta_start}, {self.beta_end}"
            )

    @property
    def betas(self) -> Tensor:
        raise NotImplementedError

    @cached_property
    def log_alpha_bar(self) -> Tensor:
        return torch.log1p(-self.betas).cumsum(0)


@dataclass(frozen=True)
class LinearBetas(_Betas):
    """beta rises linearly from ``beta_start`` to ``beta_end`` (Ho, Jain, Abbeel 2020: 1e-4, 0.02).

    The defaults are those that Rectified Diffusion (Wang et al. 2024) trains with: the last
    alpha_bar is 0.001579.
    """

    @property
    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)


@dataclass(frozen=True)
class ScaledLinearBetas(_Betas):
    """sqrt(beta) rises linearly: Stable Diffusion 1, 2 and XL (Rombach et al. 2022), whose last
    alpha_bar is 0.004660."""

    @property
    def betas(self) -> Tensor:
        ends = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        return torch.linspace(*ends, self.steps, dtype=torch.float64).square()


@dataclass(frozen=True)
class CosineBetas(NoiseSchedule):
    """alpha_bar follows cos^2((u + offset) / (1 + offset) pi / 2), u = k / steps (Nichol, Dhariwal
    2021), each beta at most ``beta_max``; diffusers calls it squaredcos_cap_v2."""

    offset: float = 0.008
    beta_max: float = 0.999
    steps: int = 1000

    def __post_init__(self) -> None:
        _check_steps("CosineBetas", self.steps)
        if not (0 <= self.offset < math.inf and 0 < self.beta_max < 1):
            raise ValueError(
                "CosineBetas: offset must be finite and >= 0, beta_max in (0, 1); got "
                f"{self.offset}, {self.beta_max}"
            )

    @cached_property
    def log_alpha_bar(self) -> Tensor:
        u = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        curve = torch.cos((u + self.offset) / (1 + self.offset) * (math.pi / 2)).square()
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=self.beta_max)
        return torch.log1p(-betas).cumsum(0)


@dataclass(frozen=True)
class VPSchedule(NoiseSchedule):
    """The continuous variance-preserving diffusion of Song et al. 2021 at u = (k + 1) / steps.

    log alpha = -(beta_max - beta_min) u^2 / 4 - beta_min u / 2, as in
    :class:`rfkernels.flow.VPPath` at t = 1 - u.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    steps: int = 1000

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check_steps(name, self.steps)
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"{name}: betas must satisfy 0 < beta_min <= beta_max; got {self.beta_min}, "
                f"{self.beta_max}"
            )

    @cached_property
    def log_alpha_bar(self) -> Tensor:
        u = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        return -(self.beta_max - self.beta_min) / 2 * u.square() - self.beta_min * u


@dataclass(frozen=True)
class SubVPSchedule(VPSchedule):
    """alpha as in :class:`VPSchedule`, sigma = 1 - alpha^2 (Song et al. 2021)."""

    @cached_property
    def log_noise_ratio(self) -> Tensor:
        """log((1 - alpha^2) / alpha)."""
        return torch.log(-torch.expm1(self.log_alpha_bar)) - 0.5 * self.log_alpha_bar

    def alpha_of_noise_ratio(self, ratio: Tensor) -> Tensor:
        """The root of alpha^2 + ratio alpha = 1 without cancellation: 2 / (r + sqrt(r^2 + 4))."""
        return 2 / (ratio + torch.sqrt(ratio.square() + 4))


_NAMED: dict[str, type[NoiseSchedule]] = {
    "linear": LinearBetas,
    "scaled-linear": ScaledLinearBetas,
    "cosine": CosineBetas,
    "vp": VPSchedule,
    "sub-vp": SubVPSchedule,
}


def describe_schedule(schedule: NoiseSchedule) -> dict[str, Any] | None:
    """{"name": ..., its options}, which `get_schedule` takes; None for a class of the user's own."""
    name = next((name for name, cls in _NAMED.items() if type(schedule) is cls), None)
    return None if name is None else {"name": name, **dataclasses.asdict(schedule)}


def get_schedule(schedule: str | Mapping[str, Any] | NoiseSchedule) -> NoiseSchedule:
    """The schedule of that name ("linear", "scaled-linear", "cosine", "vp", "sub-vp") with its
    default options, of `describe_schedule`'s description, or the object itself.

    Raises:
        ValueError: for an unknown name. TypeError: for anything else.
    """
    if isinstance(schedule, Mapping):
        options = dict(schedule)
        return type(get_schedule(options.pop("name", None)))(**options)
    if isinstance(schedule, str):
        if schedule not in _NAMED:
            raise ValueError(f"schedule: must be one of {', '.join(_NAMED)}; got {schedule!r}")
        return _NAMED[schedule]()
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule: must be a name or a NoiseSchedule; got {type(schedule).__name__}"
        )
    return schedule


def _check_steps(owner: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{owner}: steps must be a whole number; got {steps!r}")
    if steps < 2:
        raise ValueError(f"{owner}: steps must be at least 2; got {steps}")
