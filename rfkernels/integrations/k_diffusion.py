"""Samplers in the style of k-diffusion and ComfyUI: f(model, x, sigmas, extra_args, callback, disable) -> x.

`model(x, sigma, **extra_args)` returns the denoised data, sigma being (B,); for flow models (ComfyUI's CONST sampling) sigma
is 1 at noise and 0 at data, and x + (sigma_next - sigma) (x - denoised) / sigma is an Euler step. `sigmas` descends and
usually ends at 0. Every update is one kernel call; the levels are read to the host once a run. No gradients are recorded.

    =================== ===== ====================== =========================================
    function            order calls for N intervals
    =================== ===== ====================== =========================================
    sample_rf_euler     1     N
    sample_rf_heun      2     2 N - 1                Euler into 0, where the slope has no value
    sample_rf_midpoint  2     2 N                    RF-Solver of order 2
    sample_rf_fireflow  2     N + 1
    sample_rf_ab2       2     N                      Adams-Bashforth, an Euler step first
    sample_rf_dpmpp_2m  2     N                      DPM-Solver++ in flow form
    sample_rf_unipc     2     N                      UniPC in flow form
    =================== ===== ====================== =========================================

In ComfyUI, `KSAMPLER(rf.integrations.k_diffusion.sample_rf_midpoint)` is a sampler. Needs neither package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

import rfkernels as rf
from rfkernels.sampling import multistep as rules
from rfkernels.sampling.field import writes

Model = Callable[..., torch.Tensor]
Callback = Callable[[dict[str, Any]], None]
_OF_FLOWS = 1 + 1e-4  # a shifted level of 1 may be off by rounding

__all__ = [
    "sample_rf_ab2",
    "sample_rf_dpmpp_2m",
    "sample_rf_euler",
    "sample_rf_fireflow",
    "sample_rf_heun",
    "sample_rf_midpoint",
    "sample_rf_unipc",
]


class _Run:
    """A model along a descending list of levels, with its callback and its progress bar."""

    def __init__(
        self,
        name: str,
        model: Model,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None,
        callback: Callback | None,
        disable: bool | None,
        greatest: float = math.inf,
    ) -> None:
        if not isinstance(sigmas, torch.Tensor) or sigmas.ndim != 1 or len(sigmas) < 1:
            raise ValueError(f"{name}: sigmas must be a 1-D tensor of levels; got {sigmas!r}")
        self.levels: list[float] = sigmas.tolist()
        descending = all(after < before < math.inf for before, after in pairwise(self.levels))
        if not descending or not self.levels[-1] >= 0:
            raise ValueError(f"{name}: sigmas must descend to 0 or above; got {self.levels}")
        if self.levels[0] > greatest:
            raise ValueError(
                f"{name}: sigmas must be those of a flow, from 1 at noise; got {self.levels}"
            )
        self._name, self._model, self._extra = name, model, extra_args or {}
        self._callback = callback
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._ones, self._sigmas = x.new_ones([x.shape[0]], dtype=wide), sigmas
        self._disable = disable

    def intervals(self) -> Iterable[tuple[int, float, float]]:
        """(index, level, next level), under a progress bar if tqdm is there and not disabled."""
        steps = [(i, *pair) for i, pair in enumerate(pairwise(self.levels))]
        if self._disable:
            return steps
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return steps
        return tqdm(steps, disable=self._disable)

    def denoised(self, x: torch.Tensor, sigma: float, *kept: torch.Tensor) -> torch.Tensor:
        """The model's answer; ``kept`` are earlier ones that are still needed."""
        before = [writes(old) for old in kept]
        answer = self._model(x, self._ones * sigma, **self._extra)
        if [writes(old) for old in kept] != before:
            raise ValueError(
                f"{self._name}: model must not overwrite what it returned before; got the same memory again "
                "(return a copy)"
            )
        return answer

    def report(self, index: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
        """k-diffusion's callback, before the step."""
        if self._callback is not None:
            sigma = self._sigmas[index]
            self._callback(
                {"x": x, "i": index, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised}
            )


def _along(
    x: torch.Tensor, *terms: tuple[torch.Tensor, torch.Tensor, float, float]
) -> torch.Tensor:
    """x + the sum of step * (state - denoised) / sigma over terms (state, denoised, sigma, step).

    A state that is x itself is no tensor of its own.
    """
    own, tensors, coefficients = 1.0, [], []
    for state, denoised, sigma, step in terms:
        slope = step / sigma
        if state is x:
            own += slope
        else:
            tensors.append(state)
            coefficients.append(slope)
        tensors.append(denoised)
        coefficients.append(-slope)
    return rf.linear_step(x, tuple(tensors), tuple(coefficients), x_coefficient=own)


@torch.no_grad()
def sample_rf_euler(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """Euler's rule.

    Args:
        model: (x, sigma (B,), **extra_args) -> denoised, like x; sigma is float32, float64 for float64 x.
        x: (B, ...) at the level sigmas[0].
        sigmas: (N + 1,) descending, >= 0. Above 1, levels of other than flows, they suit the rules in slopes:
            all but dpmpp_2m and unipc.
        extra_args: for the model.
        callback: called in every step with a dict of x, i, sigma, sigma_hat (= sigma, 0-d) and denoised.
        disable: no progress bar; None shows it on a terminal only.

    Returns:
        x at the level sigmas[-1].

    Raises:
        ValueError: sigmas that do not descend, or do not suit the rule; a model that overwrites answers still needed.
    """
    run = _Run("sample_rf_euler", model, x, sigmas, extra_args, callback, disable)
    for i, sigma, after in run.intervals():
        denoised = run.denoised(x, sigma)
        run.report(i, x, denoised)
        x = _along(x, (x, denoised, sigma, after - sigma))
    return x


@torch.no_grad()
def sample_rf_heun(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """Heun's rule, with an Euler step into 0; arguments as for `sample_rf_euler`."""
    run = _Run("sample_rf_heun", model, x, sigmas, extra_args, callback, disable)
    for i, sigma, after in run.intervals():
        step = after - sigma
        denoised = run.denoised(x, sigma)
        run.report(i, x, denoised)
        end = _along(x, (x, denoised, sigma, step))
        if after > 0:
            second = run.denoised(end, after, denoised)
            end = _along(x, (x, denoised, sigma, step / 2), (end, second, after, step / 2))
        x = end
    return x


@torch.no_grad()
def sample_rf_midpoint(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """The midpoint rule (RF-Solver of order 2); arguments as for `sample_rf_euler`."""
    run = _Run("sample_rf_midpoint", model, x, sigmas, extra_args, callback, disable)
    for i, sigma, after in run.intervals():
        middle = (sigma + after) / 2
        denoised = run.denoised(x, sigma)
        run.report(i, x, denoised)
        half = _along(x, (x, denoised, sigma, middle - sigma))
        x = _along(x, (half, run.denoised(half, middle), middle, after - sigma))
    return x


@torch.no_grad()
def sample_rf_fireflow(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """FireFlow: the midpoint rule with the slope of the last midpoint in the place of the one at the start of the step.

    Arguments as for `sample_rf_euler`.
    """
    run = _Run("sample_rf_fireflow", model, x, sigmas, extra_args, callback, disable)
    known = None  # (state, denoised, level) whose slope starts the step
    for i, sigma, after in run.intervals():
        if known is None:
            known = (x, run.denoised(x, sigma), sigma)
        run.report(i, x, known[1])
        middle = (sigma + after) / 2
        half = _along(x, (*known, middle - sigma))
        known = (half, run.denoised(half, middle), middle)
        x = _along(x, (*known, after - sigma))
    return x


@torch.no_grad()
def sample_rf_ab2(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """Adams-Bashforth of order 2; arguments as for `sample_rf_euler`."""
    run = _Run("sample_rf_ab2", model, x, sigmas, extra_args, callback, disable)
    last, previous = None, None
    for i, sigma, after in run.intervals():
        kept = () if last is None else (last[1],)
        denoised = run.denoised(x, sigma, *kept)
        run.report(i, x, denoised)
        now, *then = rules.ab2(after - sigma, previous)
        terms = [(x, denoised, sigma, now)] + [(*last, step) for step in then]
        last, previous = (x, denoised, sigma), after - sigma
        x = _along(x, *terms)
    return x


@torch.no_grad()
def sample_rf_dpmpp_2m(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """DPM-Solver++ (2M) in flow form; arguments as for `sample_rf_euler`."""
    run = _Run("sample_rf_dpmpp_2m", model, x, sigmas, extra_args, callback, disable, _OF_FLOWS)
    past: list[torch.Tensor] = []
    for i, sigma, after in run.intervals():
        past = [run.denoised(x, sigma, *past[:1]), *past[:1]]
        run.report(i, x, past[0])
        levels = [after, sigma, *run.levels[max(i - 1, 0) : i]]
        of_state, *weights = rules.dpm(levels, len(past), "midpoint")
        x = rf.linear_step(x, tuple(past[: len(weights)]), tuple(weights), x_coefficient=of_state)
    return x


@torch.no_grad()
def sample_rf_unipc(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """UniPC of order 2 (B2) in flow form, corrector and predictor in one update; arguments as for `sample_rf_euler`."""
    run = _Run("sample_rf_unipc", model, x, sigmas, extra_args, callback, disable, _OF_FLOWS)
    past: list[torch.Tensor] = []
    order = 0
    for i, sigma, after in run.intervals():
        past = [run.denoised(x, sigma, *past[:2]), *past[:2]]
        run.report(i, x, past[0])
        levels = [after, *run.levels[i::-1][:3]]
        predicted = order
        order = min(2, len(past), len(run.levels) - 1 - i)
        of_state, *weights = rules.unipc(levels, order, "bh2", predicted=predicted)
        weights += [0.0] * (len(past) - len(weights))
        x = rf.linear_step(x, tuple(past), tuple(weights), x_coefficient=of_state)
    return x
