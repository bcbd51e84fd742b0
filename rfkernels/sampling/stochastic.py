"""Stochastic samplers: ancestral, sde and renoise. One evaluation and one kernel call a step, in which
the noise is drawn.

With exact velocities of the straight path from a standard normal source, the first two have the
flow's own distribution at every time as steps become many; renoise has not, and is named for what it
does. s = 1 - t is the noise level, s' and t' those of the step's end, z fresh standard normal noise.

========= ==========================================================================================
ancestral x' = a (x + (s - d) v) + sqrt(s'^2 - a^2 d^2) z, d = s' (1 + (s'/s - 1) eta), a = (1-s')/(1-d)
sde       x' = x + h (v + g^2/2 score) + g sqrt(h) z, score = (t v - x) / (1 - t), g = g(t)
renoise   x' = t' (x + (1 - t) v) + (1 - t') z
========= ==========================================================================================

The noise of a step is a function of (seed, step, sample). With one seed for all, an int, sample b is
the b-th of the batch, however large that is; with a (B,) tensor of seeds each sample draws what it
would draw alone. These samplers are not invertible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rfkernels.ops.random import derive_seed
from rfkernels.sampling.field import Field, State
from rfkernels.sampling.fixed import FixedStepSolver, Step
from rfkernels.sampling.run import Run

__all__ = ["SDE", "Ancestral", "Renoise", "noise_keys"]

_PURPOSE = derive_seed(0, "sampling noise")


def noise_keys(
    seed: int | torch.Tensor, batch: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The (B,) seeds and offsets of step 0's noise; step i adds i 2^32 to the offsets.

    One seed for all numbers the samples by the offset; seeds per sample tell them apart already. The
    seed's own numbers, those of ``rf.randn(seed=seed)``, which x0 may be, are not used again.
    """
    rows = torch.arange(batch, device=device)
    if isinstance(seed, torch.Tensor) and seed.ndim == 1:
        return seed.to(device) ^ _PURPOSE, torch.zeros_like(rows)
    if isinstance(seed, torch.Tensor):
        return (seed.to(device) ^ _PURPOSE).expand(batch).contiguous(), rows
    return torch.full((batch,), seed ^ _PURPOSE, dtype=torch.int64, device=device), rows


class StochasticSolver(FixedStepSolver):
    """A step with noise: subclasses give its coefficients."""

    stochastic: ClassVar[bool] = True

    def begin(self, field: Field, state: State, times: Sequence[float], run: Run) -> list[Any]:
        """Seeds and offsets of the first step's noise."""
        if run.times[-1] < run.times[0]:
            raise ValueError(
                f"invert: solver must be deterministic; got {self.name!r}, which draws noise"
            )
        if run.seed is None:
            raise ValueError(
                f"sample: seed must be given with solver {self.name!r}, which draws noise; got None"
            )
        return list(noise_keys(run.seed, field.batch, state.x.device))

    def coefficients(self, start: float, end: float) -> tuple[float, float, float]:
        """(of x, of v, of z) of the step from time ``start`` to ``end``."""
        raise NotImplementedError

    def step(self, field: Field, state: State, interval: Step, history: list[Any]) -> State:
        """a x + b v + c z."""
        seeds, offsets = history
        of_state, weight, scale = self.coefficients(interval.start, interval.end)
        term = (weight, field(state, interval.start))
        if scale == 0:
            return field.combine(state.x, of_state, [term])
        noise = (scale, seeds, offsets + (interval.index << 32))
        return field.combine(state.x, of_state, [term], noise=noise)


@dataclass(frozen=True)
class Ancestral(StochasticSolver):
    """An Euler step further than wanted, and noise back to the level wanted (ComfyUI's Euler ancestral
    for rectified flow).

    Args:
        eta: 0 is Euler; 1 the most noise. Values between 0 and 1.
    """

    name: ClassVar[str] = "ancestral"
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"Ancestral: eta must be in [0, 1]; got {self.eta}")

    def coefficients(self, start: float, end: float) -> tuple[float, float, float]:
        """a, a (s - d) and sqrt(s'^2 - a^2 d^2)."""
        level, wanted = 1 - start, 1 - end
        down = wanted * (1 + (wanted / level - 1) * self.eta)
        gain = (1 - wanted) / (1 - down)
        # s'^2 - a^2 d^2 as a product, so that eta = 0 leaves exactly nothing.
        left = (wanted - gain * down) * (wanted + gain * down)
        return gain, gain * (level - down), math.sqrt(max(left, 0.0))


@dataclass(frozen=True)
class SDE(StochasticSolver):
    """Euler-Maruyama for dx = (v + g^2/2 score) dt + g dW, which has the flow's marginals for every g.

    The score of the straight path from a standard normal source is (t v - x) / (1 - t) (Song et al.
    2021; Ma et al. 2024, "SiT"). Noise corrects errors of the model on the way and costs steps: the
    bias of the distribution is of first order in the step.

    Args:
        scale: a factor of g, not negative; 0 is Euler.
        diffusion: g(t) before that: "decreasing", sqrt(1 - t), which keeps the drift bounded;
            "constant", 1; or a function of the time as a float.
        noisy_end: whether the step that ends at t = 1 adds its noise; False leaves the mean, which is
            cleaner for images.
    """

    name: ClassVar[str] = "sde"
    scale: float = 1.0
    diffusion: str | Callable[[float], float] = "decreasing"
    noisy_end: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"SDE: scale must be finite and not negative; got {self.scale}")
        if not callable(self.diffusion) and self.diffusion not in ("decreasing", "constant"):
            raise ValueError(
                "SDE: diffusion must be 'decreasing', 'constant' or a function of the time; "
                f"got {self.diffusion!r}"
            )

    def coefficients(self, start: float, end: float) -> tuple[float, float, float]:
        """1 - h g^2 / (2 (1 - t)), h (1 + g^2 t / (2 (1 - t))) and g sqrt(h)."""
        h = end - start
        if callable(self.diffusion):
            g = self.scale * float(self.diffusion(start))
        else:
            g = self.scale * (1.0 if self.diffusion == "constant" else math.sqrt(1 - start))
        pull = g * g / (2 * (1 - start))
        noise = g * math.sqrt(h) if self.noisy_end or end < 1 else 0.0
        return 1 - h * pull, h * (1 + pull * start), noise


@dataclass(frozen=True)
class Renoise(StochasticSolver):
    """Noises the data estimate again with fresh noise at every step, as consistency models are sampled.

    Not a solver of the flow nor of its SDE: with an exact velocity the estimate is the mean of the data
    that are possible, so the spread of the samples is too small however many the steps (a Gaussian of
    standard deviation 0.5 comes out with 0.28 in 5 steps and 0.35 in 500). For networks whose estimate is
    a sample, distilled or consistency models, in a few steps.
    """

    name: ClassVar[str] = "renoise"

    def coefficients(self, start: float, end: float) -> tuple[float, float, float]:
        """t', t' (1 - t) and 1 - t'."""
        return end, end * (1 - start), 1 - end
