"""Denoisers and noise predictors of diffusion models as velocity networks, finite at both ends.

A variance-exploding state y = x1 + sigma n is the straight path's x_t = (1 - s) x1 + s n divided by
1 - s, with s = 1 - t and sigma = s / (1 - s). So a network trained on y, or on a variance-preserving
state of the same noise ratio, says what the velocity dx/dt is, and with its weights reflow and
2-rectified flow++ begin where the diffusion model stopped (Lee, Lin, Fanti, "Improving the Training
of Rectified Flows", 2024; the preconditioning of Karras et al., "Elucidating the Design Space of
Diffusion-Based Generative Models", 2022).

Every wrapper is called velocity(x, t, **condition) with t = 0 at the noise and t = 1 at the data,
and is a module whose only weights are the network's. Conditions reach the network under the names
they are given. Coefficients are computed in float64; input and output are one kernel each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rfkernels.flow.paths import VPPath
from rfkernels.ops.ode_step import linear_step

__all__ = ["DenoiserVelocity", "EDMVelocity", "NetworkWrapper", "VEVelocity", "VPVelocity"]

Network = nn.Module | Callable[..., torch.Tensor]


class NetworkWrapper(nn.Module):
    """A network called in another convention; it knows of the network what a run asks for.

    Args:
        network: a module, or any callable.
        options: the other keyword arguments of the wrapper, as JSON values.
    """

    def __init__(self, network: Network, **options: Any) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(
                f"network: must be a module or a callable; got {type(network).__name__}"
            )
        self.network = network
        self.options: Mapping[str, Any] = options
        self.null_label = getattr(network, "null_label", None)
        shape = getattr(network, "sample_shape", None)
        self.sample_shape = None if shape is None else tuple(shape)


class EDMVelocity(NetworkWrapper):
    """A network F with EDM's preconditioning, of which nothing is singular::

        q = sqrt(s^2 + g^2 (1 - s)^2),  s = 1 - t,  g = sigma_data
        v = -(s - g^2 (1 - s)) / q^2 x + g / q F(x / q, log(sigma) / 4)

    Inserting D = c_skip y + c_out F(c_in y, log(sigma) / 4) in v = (D - x) / s gives this form, in
    which neither 1 / s nor 1 / (1 - s) is left. At t = 0: v = g F - x; at t = 1: v = x + F.

    Args:
        network: F(x, noise label (B,), **condition), the raw network inside the preconditioning.
        sigma_data: g, the standard deviation of the data it was trained for; 0.5 is EDM's.
        sigma_min, sigma_max: the noise levels it was trained on, EDM's by default. The label stays
            between theirs, since its limits at both ends are infinite.
    """

    def __init__(
        self,
        network: Network,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        _check_levels(sigma_min, sigma_max)
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data: must be positive and finite; got {sigma_data!r}")
        super().__init__(network, sigma_data=sigma_data, sigma_min=sigma_min, sigma_max=sigma_max)
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max

    def forward(self, x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        level, remaining = _levels(t)
        square = self.sigma_data**2
        q = torch.sqrt(level.square() + square * remaining.square())
        label = _sigma(level, self.sigma_min, self.sigma_max).log() / 4
        predicted = self.network(_scaled(x, 1 / q), label.to(t.dtype), **condition)
        own = (square * remaining - level) / q.square()
        return _combined(x, own, predicted, self.sigma_data / q)


class VEVelocity(NetworkWrapper):
    """A network of the variance-exploding diffusion that predicts minus the noise::

        v = (x + F(x / (1 - s), log(sigma / 2))) / (1 - s),  s = 1 - t

    It is D = y + sigma F of Karras et al., whose label this is; F / sigma is the score, so F is the
    raw output of a Score-SDE network before the division by sigma. The noise says nothing of the
    data where there is nothing else, so up to the time of sigma_max the velocity is held at it.

    Args:
        network: F(y, label (B,), **condition).
        sigma_min, sigma_max: the noise levels it was trained on; the label stays between theirs.
    """

    def __init__(self, network: Network, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        _check_levels(sigma_min, sigma_max)
        super().__init__(network, sigma_min=sigma_min, sigma_max=sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        level, _ = _levels(t)
        level = level.clamp(max=_level_of(self.sigma_max))
        scale = 1 / (1 - level)
        label = (_sigma(level, self.sigma_min, self.sigma_max) / 2).log()
        predicted = self.network(_scaled(x, scale), label.to(t.dtype), **condition)
        return _combined(x, scale, predicted, scale)


class VPVelocity(NetworkWrapper):
    """A network of the variance-preserving diffusion with linear beta that predicts the noise::

        v = (x - F(x (alpha + sigma), label_scale u)) / (1 - s),  s = 1 - t

    where u is the diffusion time (0 = data, 1 = noise) at which sigma / alpha = s / (1 - s). The
    diffusion ends before pure noise, at sigma / alpha = 152 for the default betas: nearer to t = 0
    the velocity is held at that end, as in `VEVelocity`.

    Args:
        network: F(state, label (B,), **condition); of a score network, minus sigma times the score.
        beta_min, beta_max: as in `rfkernels.flow.VPPath`.
        label_scale: what the diffusion time is multiplied by; 999 is Score-SDE's.
    """

    def __init__(
        self,
        network: Network,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        label_scale: float = 999.0,
    ) -> None:
        path = VPPath(beta_min, beta_max)
        super().__init__(network, beta_min=beta_min, beta_max=beta_max, label_scale=label_scale)
        self._path, self.label_scale = path, label_scale
        alpha, sigma, _, _ = path.coefficients(0.0)
        self._most = _level_of((sigma / alpha).item())

    def forward(self, x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        level, _ = _levels(t)
        level = level.clamp(max=self._most)
        scale = 1 / (1 - level)
        sigma = level * scale
        label = self.label_scale * (1 - self._path.time_of_noise_ratio(sigma))
        state = _scaled(x, scale / torch.sqrt(1 + sigma.square()))
        predicted = self.network(state, label.to(t.dtype), **condition)
        return _combined(x, scale, predicted, -scale)


class DenoiserVelocity(NetworkWrapper):
    """Any denoiser D(y, sigma) = E[x1 | y = x1 + sigma n] of the straight path's states::

        v = (D(x / (1 - s), s / (1 - s)) - x) / s,  s = 1 - t

    s stays between the levels of sigma_min and sigma_max, so the velocity is held at their times
    nearer to the ends. Towards the data the difference loses digits as 1 / s; `EDMVelocity` does
    not, where the inside of the denoiser is at hand.

    Args:
        network: D(y, sigma (B,), **condition), in the data's units.
        sigma_min, sigma_max: the noise levels it is good for.
    """

    def __init__(self, network: Network, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        _check_levels(sigma_min, sigma_max)
        super().__init__(network, sigma_min=sigma_min, sigma_max=sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        level, _ = _levels(t)
        level = level.clamp(_level_of(self.sigma_min), _level_of(self.sigma_max))
        scale = 1 / (1 - level)
        estimate = self.network(_scaled(x, scale), (level * scale).to(t.dtype), **condition)
        return _combined(x, -1 / level, estimate, 1 / level)


def _check_levels(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            "sigma_min: noise levels must satisfy 0 < sigma_min < sigma_max; got "
            f"{sigma_min!r}, {sigma_max!r}"
        )


def _level_of(sigma: float) -> float:
    """s with s / (1 - s) = sigma."""
    return sigma / (1 + sigma)


def _levels(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, 1 - s) at times (B,), in float64 on devices that have it."""
    wide = t if t.device.type == "mps" else t.double()
    return 1 - wide, wide


def _sigma(level: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """s / (1 - s), kept in [least, most]."""
    level = level.clamp(_level_of(least), _level_of(most))
    return level / (1 - level)


def _scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x (B, ...) times factors (B,), in x's dtype."""
    return linear_step(x, (), (), x_coefficient=factor)


def _combined(
    x: torch.Tensor, own: torch.Tensor, predicted: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """own x + factor predicted with factors (B,), in x's dtype."""
    return linear_step(x, (predicted,), (factor,), x_coefficient=own)
