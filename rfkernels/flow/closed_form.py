"""A flow whose velocity is known exactly: standard Gaussian noise to a Gaussian mixture.

For independent x0 ~ N(0, I) and x1 ~ sum_k w_k N(m_k, c_k^2 I) on the straight path
x_t = (1-t) x0 + t x1, every component stays Gaussian, so E[x1 - x0 | x_t = x] has a closed form.
It is the truth that solvers, metrics and trained models are measured against, and a velocity
field to try things on without training anything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels.ops.random import derive_seed, rand, randn


class GaussianMixtureFlow:
    """The exact rectified flow from N(0, I) at t = 0 to a Gaussian mixture at t = 1.

    The coupling is the independent one. An instance is a velocity field: ``flow(x, t)`` and
    ``flow.velocity(x, t)`` are the same thing. With ``var_k(t) = (1-t)^2 + t^2 c_k^2`` and
    responsibilities ``r_k(x, t)`` proportional to ``w_k N(x; t m_k, var_k(t) I)``::

        velocity(x, t) = sum_k r_k [ m_k + (t c_k^2 - (1-t)) / var_k(t) * (x - t m_k) ]

    (conditioning jointly Gaussian variables on x_t, component by component). Components of width
    0 give the flow to an empirical distribution: its velocity is singular at t = 1, where NaN is
    returned, so stop a little earlier. Arithmetic is float32, or float64 when x is float64;
    memory is B * K * D numbers.

    Args:
        means: (K, D) component means.
        stds: component widths c_k >= 0, one number or K numbers.
        weights: K positive numbers, normalised here; equal by default.

    Raises:
        ValueError: for shapes that do not fit, negative widths, weights that are not positive, or
            non-finite values.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        stds: float | Sequence[float] | Tensor,
        weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64, device="cpu").clone()
        if self.means.ndim != 2 or self.means.numel() == 0:
            raise ValueError(
                f"GaussianMixtureFlow: means must have shape (K, D); got {tuple(self.means.shape)}"
            )
        count = self.means.shape[0]
        self.stds = self._per_component("stds", stds, count)
        self.weights = self._per_component("weights", 1.0 if weights is None else weights, count)
        if not torch.isfinite(self.means).all():
            raise ValueError("GaussianMixtureFlow: means must be finite; got inf or nan")
        if not bool((self.stds >= 0).all()):
            raise ValueError(f"GaussianMixtureFlow: stds must be >= 0; got {self.stds.tolist()}")
        if not bool((self.weights > 0).all()):
            raise ValueError(
                f"GaussianMixtureFlow: weights must be positive; got {self.weights.tolist()}"
            )
        self.weights = self.weights / self.weights.sum()

    @staticmethod
    def _per_component(name: str, values: float | Sequence[float] | Tensor, count: int) -> Tensor:
        result = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        if result.ndim == 0:
            result = result.expand(count)
        if result.shape != (count,):
            raise ValueError(
                f"GaussianMixtureFlow: {name} must be one number or {count} numbers; "
                f"got shape {tuple(result.shape)}"
            )
        if not torch.isfinite(result).all():
            raise ValueError(f"GaussianMixtureFlow: {name} must be finite; got {result.tolist()}")
        return result.clone()

    @classmethod
    def ring(cls, modes: int = 8, radius: float = 4.0, std: float = 0.5) -> GaussianMixtureFlow:
        """Equal Gaussians evenly spaced on a circle in the plane, the first one at angle 0."""
        if modes < 1:
            raise ValueError(f"GaussianMixtureFlow.ring: modes must be at least 1; got {modes}")
        angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        return cls(radius * torch.stack([angles.cos(), angles.sin()], dim=1), std)

    def to(self, device: torch.device | str) -> GaussianMixtureFlow:
        """The same flow with its parameters on the device, so that a call copies nothing to it."""
        moved = copy.copy(self)
        moved.means, moved.stds = self.means.to(device), self.stds.to(device)
        moved.weights = self.weights.to(device)
        return moved

    @property
    def dimension(self) -> int:
        """D, the number of coordinates of one sample."""
        return self.means.shape[1]

    def __repr__(self) -> str:
        return f"GaussianMixtureFlow(components={self.means.shape[0]}, dimension={self.dimension})"

    def __call__(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The velocity; see :meth:`velocity`."""
        return self.velocity(x, t, label)

    def velocity(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """E[x1 - x0 | x_t = x], or the same within one component when ``label`` is given.

        Args:
            x: (B, ...) states with D numbers per sample, floating point.
            t: float, 0-d or (B,) times; 0 is noise, 1 is data.
            label: (B,) integers in [0, K), the component each sample is conditioned on; None for
                the whole mixture.

        Returns:
            A tensor like x.
        """
        flat, times, means, variance, log_joint = self._terms(x, t)
        if label is None:
            responsibility = torch.softmax(log_joint, dim=1)
        else:
            responsibility = self._one_hot(label, flat)
        stds = self._parameters(flat)[1]
        gain = (times * stds.square() - (1 - times)) / variance  # (B, K)
        toward_means = (responsibility * (1 - times * gain)) @ means
        drift = toward_means + (responsibility * gain).sum(dim=1, keepdim=True) * flat
        return drift.to(x.dtype).reshape(x.shape)

    def log_density(self, x: Tensor, t: Tensor | float) -> Tensor:
        """(B,) log-density of x_t at x, a mixture of N(t m_k, var_k(t) I).

        Its gradient in x is the score.
        """
        _, _, _, _, log_joint = self._terms(x, t)
        return torch.logsumexp(log_joint, dim=1) - 0.5 * self.dimension * math.log(2 * math.pi)

    def sample_labels(
        self, n: int, *, seed: int, offset: int = 0, device: torch.device | str | None = None
    ) -> Tensor:
        """(n,) int64 components drawn with the mixture weights, a function of seed and offset."""
        uniform = rand(n, seed=derive_seed(seed, "component"), offset=offset).double()
        edges = self.weights.cpu().cumsum(0)[:-1]
        return torch.searchsorted(edges, uniform, right=True).to(device)

    def sample(
        self,
        n: int,
        *,
        seed: int,
        offset: int = 0,
        labels: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """(n, D) draws of the data x1.

        Row i comes from component ``labels[i]``; without labels they are those of
        ``sample_labels`` for the same seed and offset.
        """
        if labels is None:
            labels = self.sample_labels(n, seed=seed, offset=offset)
        elif labels.shape != (n,):
            raise ValueError(
                f"GaussianMixtureFlow.sample: labels must have shape ({n},); "
                f"got {tuple(labels.shape)}"
            )
        noise = randn(
            n, self.dimension, seed=derive_seed(seed, "data"), offset=offset, dtype=torch.float64
        )
        labels = labels.cpu()
        centre, width = self.means.cpu()[labels], self.stds.cpu()[labels, None]
        return (centre + width * noise).to(device, dtype)

    def _terms(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (B, D), t (B|1, 1), m (K, D), var (B|1, K), log w_k N(x; t m_k, var_k) + constant."""
        if not x.is_floating_point():
            raise TypeError(f"GaussianMixtureFlow: x must be floating point; got {x.dtype}")
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.dimension:
            raise ValueError(
                f"GaussianMixtureFlow: x must be (B, ...) with {self.dimension} numbers per "
                f"sample; got {tuple(x.shape)}"
            )
        flat = x.reshape(x.shape[0], self.dimension).to(torch.promote_types(x.dtype, torch.float32))
        times = torch.as_tensor(t, dtype=flat.dtype, device=flat.device)
        if times.shape not in ((), (x.shape[0],)):
            raise ValueError(
                f"GaussianMixtureFlow: t must be a number or have shape ({x.shape[0]},); "
                f"got {tuple(times.shape)}"
            )
        times = times.reshape(-1, 1)
        means, stds, weights = self._parameters(flat)
        variance = (1 - times).square() + (times * stds).square()
        distance = (flat[:, None, :] - times[:, :, None] * means).square().sum(dim=2)
        log_joint = (
            weights.log() - 0.5 * distance / variance - 0.5 * self.dimension * variance.log()
        )
        return flat, times, means, variance, log_joint

    def _parameters(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.means.to(like), self.stds.to(like), self.weights.to(like)

    def _one_hot(self, label: Tensor, flat: Tensor) -> Tensor:
        if label.shape != (flat.shape[0],):
            raise ValueError(
                f"GaussianMixtureFlow: label must have shape ({flat.shape[0]},); "
                f"got {tuple(label.shape)}"
            )
        return torch.nn.functional.one_hot(label.long(), self.means.shape[0]).to(flat)
