"""Noise levels of a run, on the host: the grids of diffusers' flow schedulers, number for number.

sigma is diffusers' time, 1 at noise and 0 at data (sigma = 1 - t). Every function keeps the order of operations and the
precision (float64 for grids made here, float32 for what the user gave) of the scheduler that it stands in for, so that
the float32 results are equal to the bit. Arrays are NumPy's, one entry a step, without the end of the last step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rfkernels.integrations.diffusers.schedulers.config import FLOW_MATCH, UNIPC

# Karras et al., "Elucidating the design space of diffusion-based generative models", 2022
_KARRAS_RHO = 7.0
_BETA = 0.6  # both parameters; Lee et al., "Beta sampling is all you need", 2024
_BEFORE_NOISE = 1e-6  # UniPC starts this far from sigma = 1, where its log-SNR would be infinite


def static_shift(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """s sigma / (1 + (s - 1) sigma). Esser et al., "Scaling rectified flow transformers", 2024, equation 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def time_shift(kind: str, mu: float, power: float, sigmas: Any) -> Any:
    """e^mu / (e^mu + (1/sigma - 1)^power) for the kind "exponential"; mu in the place of e^mu for "linear"."""
    factor = math.exp(mu) if kind == "exponential" else mu
    return factor / (factor + (1 / sigmas - 1) ** power)


def stretch_to_terminal(sigmas: Any, terminal: float) -> Any:
    """Scales 1 - sigma so that the last sigma is ``terminal`` (LTX-Video)."""
    complement = 1 - sigmas
    return 1 - (complement / (complement[-1] / (1 - terminal)))


def karras(largest: float, smallest: float, steps: int) -> np.ndarray:
    """Evenly spaced in sigma^(1/7)."""
    low, high = smallest ** (1 / _KARRAS_RHO), largest ** (1 / _KARRAS_RHO)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** _KARRAS_RHO


def exponential(largest: float, smallest: float, steps: int) -> np.ndarray:
    """Evenly spaced in log sigma."""
    return np.exp(np.linspace(math.log(largest), math.log(smallest), steps))


def beta(largest: float, smallest: float, steps: int) -> np.ndarray:
    """Quantiles of the Beta(0.6, 0.6) distribution; needs SciPy."""
    import scipy.stats

    quantiles = scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps), _BETA, _BETA)
    return smallest + quantiles * (largest - smallest)


def _resampled(config: dict[str, Any], sigmas: np.ndarray) -> np.ndarray:
    """The Karras, exponential or beta grid between the ends of ``sigmas``, where the config asks for one."""
    for flag, resample in (
        ("use_karras_sigmas", karras),
        ("use_exponential_sigmas", exponential),
        ("use_beta_sigmas", beta),
    ):
        if config[flag]:
            largest, smallest = config.get("sigma_max"), config.get("sigma_min")
            return resample(
                sigmas[0].item() if largest is None else largest,
                sigmas[-1].item() if smallest is None else smallest,
                len(sigmas),
            )
    return sigmas


def _shifted(
    config: dict[str, Any], shift: float, mu: float | None, levels: np.ndarray
) -> np.ndarray:
    """The dynamic shift by mu or the static one, then the stretch to a terminal level."""
    if config["use_dynamic_shifting"]:
        levels = time_shift(config["time_shift_type"], mu, 1.0, levels)
    else:
        levels = static_shift(levels, shift)
    if config["shift_terminal"]:
        levels = stretch_to_terminal(levels, config["shift_terminal"])
    return levels


def _flow_match(
    config: dict[str, Any],
    shift: float,
    ends: tuple[float, float],
    steps: int,
    sigmas: Sequence[float] | None,
    mu: float | None,
    timesteps: Sequence[float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    count = config["num_train_timesteps"]
    given = None if timesteps is None else np.asarray(timesteps).astype(np.float32)
    if sigmas is not None:
        levels = np.asarray(sigmas).astype(np.float32)
    elif given is not None:
        levels = given / count
    else:
        largest, smallest = ends
        if config["single_shift"] and not config["use_dynamic_shifting"]:
            largest, smallest = 1.0, 1 / count
        levels = np.linspace(largest * count, smallest * count, steps) / count
    levels = _resampled(config, _shifted(config, shift, mu, levels)).astype(np.float32)
    if given is not None and (config["explicit_timesteps"] == "keep" or sigmas is not None):
        times = given
    else:
        times = levels * np.float32(count)
    if config["invert_sigmas"]:
        levels = np.float32(1) - levels
        times = levels * np.float32(count)
    end = 1.0 if config["invert_sigmas"] else 0.0
    return np.append(levels, np.float32(end)), times


def _unipc(
    config: dict[str, Any],
    shift: float,
    steps: int,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    count = config["num_train_timesteps"]
    if config["use_karras_sigmas"]:  # between two ratios sigma / (1 - sigma), as Cosmos has it
        largest, smallest = config.get("sigma_max"), config.get("sigma_min")
        if largest is None or smallest is None:
            raise ValueError(
                "set_timesteps: use_karras_sigmas with grid='unipc' needs sigma_max and sigma_min in the config; "
                f"got {largest!r} and {smallest!r}"
            )
        ratios = karras(largest, smallest, steps)
        levels = ratios / (ratios + 1)
    else:
        if sigmas is None:
            levels = np.linspace(1, 1 / count, steps + 1)[:-1]
        else:
            levels = np.asarray(sigmas)  # np.array of a tensor warns with NumPy 2
        levels = _shifted(config, shift, mu, levels)
        if np.fabs(levels[0] - 1) < _BEFORE_NOISE:
            levels[0] -= _BEFORE_NOISE
    last = levels[-1] if config["final_sigmas_type"] == "sigma_min" else 0
    return np.concatenate([levels, [last]]).astype(np.float32), levels * count


def _dpm(
    config: dict[str, Any],
    shift: float,
    steps: int,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    count = config["num_train_timesteps"]
    if config["use_dynamic_shifting"] and mu is not None:
        shift = np.exp(mu)
    if sigmas is None:
        levels = 1.0 - np.linspace(1, 1 / count, steps + 1)
        levels = np.flip(static_shift(levels, shift))[:-1].copy()
    else:
        levels = static_shift(np.asarray(sigmas), shift)
    return np.concatenate([levels, [0]]).astype(np.float32), levels * count


def build(
    config: dict[str, Any],
    shift: float,
    ends: tuple[float, float],
    steps: int,
    *,
    sigmas: Sequence[float] | None,
    mu: float | None,
    timesteps: Sequence[float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Noise levels and the network's times of a run.

    Args:
        config: the scheduler's, complete.
        shift: the static shift in force.
        ends: the scheduler's sigma_max and sigma_min, between which the grid "flow-match" is laid.
        steps: how many.
        sigmas: given levels, before any shift; None for the default grid.
        mu: of the dynamic shift.
        timesteps: given times, sigma * num_train_timesteps; the grid "flow-match" alone takes them.

    Returns:
        (steps + 1) float32 levels, the last one being where the run ends, and (steps) float32 times, or int64 ones with
        the config's integer_timesteps.
    """
    if config["grid"] == FLOW_MATCH:
        levels, times = _flow_match(config, shift, ends, steps, sigmas, mu, timesteps)
    elif config["grid"] == UNIPC:
        levels, times = _unipc(config, shift, steps, sigmas, mu)
    else:
        levels, times = _dpm(config, shift, steps, sigmas, mu)
    # An int64 time is cut off, not rounded, as in diffusers.
    return levels, times.astype(np.int64 if config["integer_timesteps"] else np.float32)
