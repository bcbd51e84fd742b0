"""How straight a flow is, how much its training pairs cross, and what its coupling costs.

For a rectified flow Z trained on the coupling (x0, x1) the three are one identity (Liu, Gong,
Liu 2022):

    E|x1 - x0|^2 - E|Z1 - Z0|^2 = crossing + straightness.

All sum over the numbers of a sample and average over samples; time runs from 0 (source) to 1
(data).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rfkernels.flow.couplings import optimal_assignment
from rfkernels.flow.paths import Path
from rfkernels.metrics._pairwise import as_matrix
from rfkernels.ops.interpolate import interpolate
from rfkernels.ops.ode_step import euler_step
from rfkernels.ops.random import derive_seed, rand

Velocity = Callable[..., Tensor]
Cost = Callable[[Tensor], Tensor]

# (B, d) differences in float64 -> (B,) costs.
COSTS: dict[str, Cost] = {
    "squared-euclidean": lambda difference: difference.square().sum(1),
    "euclidean": lambda difference: difference.norm(dim=1),
    "manhattan": lambda difference: difference.abs().sum(1),
}


@torch.no_grad()
def straightness(
    velocity: Velocity,
    x0: Tensor,
    steps: int = 100,
    *,
    condition: Mapping[str, Any] | None = None,
) -> float:
    """S = integral over t of E|(Z1 - Z0) - velocity(Z_t, t)|^2, zero exactly for straight paths.

    The flow is run by ``steps`` equal Euler steps from x0, and S is the mean over steps and samples
    of |(z_{i+1} - z_i) steps - (z_N - z_0)|^2, within O(1 / steps) of the integral.

    Args:
        velocity: ``velocity(x, t, **condition)``, t of shape (B,).
        x0: (B, ...) draws of the source, B at least 1; the state keeps its dtype.
        steps: number of Euler steps, at least 1 (one step is straight by definition).
        condition: keyword arguments of the velocity.

    Raises:
        ValueError: for fewer than 1 step or no samples.
    """
    if steps < 1:
        raise ValueError(f"straightness: steps must be at least 1; got {steps}")
    flat = as_matrix("straightness", "x0", x0)
    mean = torch.zeros_like(flat)
    spread = torch.zeros((), dtype=flat.dtype, device=flat.device)
    x = x0.detach()
    # Welford's recurrence: the spread of the velocities around their mean, which is Z1 - Z0,
    # without keeping them and without the cancellation of a difference of squares.
    for step in range(steps):
        t = torch.full((len(x),), step / steps, dtype=_time_dtype(x), device=x.device)
        v = _evaluate("straightness", velocity, x, t, condition)
        deviation = v.reshape(flat.shape).to(flat) - mean
        mean += deviation / (step + 1)
        spread += deviation.square().sum() * (step / (step + 1))
        x = euler_step(x, v, 1 / steps)
    return (spread / (steps * len(flat))).item()


def straightness_of_trajectory(times: Tensor, trajectory: Tensor) -> float:
    """The same measure of recorded states, on any grid: what ``rf.sample`` returns with info.

    The mean over samples of the sum over intervals of
    dt |(z_{i+1} - z_i) / dt - (z_N - z_0) / T|^2, divided by the total time T.

    Args:
        times: (N+1,) strictly ascending or strictly descending times.
        trajectory: (N+1, B, ...) states at those times.

    Raises:
        ValueError: for shapes that do not fit or times that are not strictly monotone.
    """
    owner = "straightness_of_trajectory"
    states = as_matrix(owner, "trajectory", trajectory, minimum=2)
    grid = times.detach().to(states)
    if times.ndim != 1 or len(times) != len(states):
        raise ValueError(
            f"{owner}: times must have shape ({len(states)},) like the trajectory; "
            f"got {tuple(times.shape)}"
        )
    intervals = grid.diff()
    if not bool((intervals > 0).all() or (intervals < 0).all()):
        raise ValueError(f"{owner}: times must be strictly monotone; got {times.tolist()}")
    span = grid[-1] - grid[0]
    velocities = states.diff(dim=0) / intervals[:, None]
    residual = (velocities - (states[-1] - states[0]) / span).square().sum(1)
    return ((residual * intervals).sum() / (span * trajectory.shape[1])).item()


@torch.no_grad()
def crossing(
    velocity: Velocity,
    x0: Tensor,
    x1: Tensor,
    *,
    draws: int = 16,
    seed: int = 0,
    path: str | Path = "linear",
    condition: Mapping[str, Any] | None = None,
) -> float:
    """V = integral over t of E|target - velocity(x_t, t)|^2 over the pairs (x0, x1).

    With the exact velocity E[x1 - x0 | x_t] this is the irreducible loss: 0 when the straight lines
    between the pairs do not cross. With a trained field its own squared error comes on top. Each
    pair is evaluated at ``draws`` times, one in each of that many equal intervals.

    Args:
        velocity: ``velocity(x, t, **condition)``, t of shape (B,).
        x0, x1: (B, ...) pairs of source and data.
        draws: times per pair, at least 1.
        seed: of the times.
        path: the path between the pairs; its target takes the place of x1 - x0. On the VP path the
            integral diverges at t = 1.
        condition: keyword arguments of the velocity.

    Raises:
        ValueError: for fewer than 1 draw, no samples, or shapes that differ.
    """
    if draws < 1:
        raise ValueError(f"crossing: draws must be at least 1; got {draws}")
    _pair_matrices("crossing", x0, x1)
    key = derive_seed(seed, "time")
    total = 0.0
    for draw in range(draws):
        uniform = rand(len(x1), seed=key, offset=draw, device=x1.device, dtype=_time_dtype(x1))
        t = (draw + uniform) / draws
        point = interpolate(x1, t, x0=x0, path=path)
        v = _evaluate("crossing", velocity, point.xt, t, condition)
        target = as_matrix("crossing", "target", point.target)
        total += (target - as_matrix("crossing", "velocity", v)).square().sum().item()
    return total / (draws * len(x1))


def transport_cost(x0: Tensor, x1: Tensor, *, cost: str | Cost = "squared-euclidean") -> float:
    """Mean cost of moving x0 (B, ...) to x1 (B, ...), row by row.

    Rectifying a coupling lowers it, or leaves it, for every convex cost of x1 - x0.

    Args:
        cost: "squared-euclidean", "euclidean", "manhattan", or a function from (B, d) float64
            differences to (B,) costs.

    Raises:
        ValueError: for an unknown cost, no samples or shapes that differ.
    """
    source, data = _pair_matrices("transport_cost", x0, x1)
    if isinstance(cost, str) and cost not in COSTS:
        raise ValueError(f"transport_cost: cost must be one of {', '.join(COSTS)}; got {cost!r}")
    function = COSTS[cost] if isinstance(cost, str) else cost
    costs = function(data - source)
    if costs.shape != (len(data),):
        raise ValueError(
            f"transport_cost: cost must return shape ({len(data)},), one cost a row; "
            f"got {tuple(costs.shape)}"
        )
    return costs.mean().item()


def relative_transport_cost(x0: Tensor, x1: Tensor) -> float:
    """Mean squared distance minus that of the optimal assignment of the same samples, >= 0.

    Exact for the samples given, so cubic in B. In high dimension an assignment of few samples gains
    nothing on any coupling, and the number says little (Liu, Gong, Liu 2022).

    Raises:
        ValueError: for no samples, shapes that differ, or values that are not finite.
        ImportError: when scipy is not installed; the extra ``train`` brings it.
    """
    source, data = _pair_matrices("relative_transport_cost", x0, x1)
    best = transport_cost(source[optimal_assignment(source, data)], data)
    return max(0.0, transport_cost(source, data) - best)


def _pair_matrices(owner: str, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    source, data = as_matrix(owner, "x0", x0), as_matrix(owner, "x1", x1)
    if x0.shape != x1.shape:
        raise ValueError(
            f"{owner}: x0 must have the shape of x1, {tuple(x1.shape)}; got {tuple(x0.shape)}"
        )
    return source, data


def _time_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _evaluate(
    owner: str,
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    condition: Mapping[str, Any] | None,
) -> Tensor:
    """The velocity at x (B, ...) and t (B,), its shape checked."""
    v = velocity(x, t, **(condition or {}))
    if not isinstance(v, Tensor) or v.shape != x.shape:
        got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(
            f"{owner}: velocity must return a tensor of the shape of x, {tuple(x.shape)}; got {got}"
        )
    return v
