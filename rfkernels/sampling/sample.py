"""``sample`` and ``invert``: carry a batch along a velocity field, from source to data or back.

Both share everything but the direction in which the grid is walked, so what is said of one holds
for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfkernels.sampling import arguments
from rfkernels.sampling.cuda_graph import replayed
from rfkernels.sampling.grids import Grid
from rfkernels.sampling.guidance import Guidance
from rfkernels.sampling.run import Callback, Run, Solution, Solver, progress_bar


@dataclass(frozen=True)
class SampleInfo:
    """What ``sample`` and ``invert`` return with ``return_info=True``.

    Attributes:
        x: (B, ...) the result, what would be returned without ``return_info``.
        nfe: evaluations of the velocity per sample: an int, or for adaptive solvers a (B,) int64
            tensor on the CPU. Guidance counts twice, a forward derivative as one more evaluation.
        times: (N+1,) the grid in the order of integration, float32 (float64 when x is), on x's
            device.
        trajectory: (N+1, B, ...) the states at ``times``, in x's dtype; the first is the input, the
            last is ``x``.
    """

    x: Tensor
    nfe: int | Tensor
    times: Tensor
    trajectory: Tensor


def sample(
    velocity: Callable[..., Tensor],
    x0: Tensor,
    *,
    steps: int | None = None,
    solver: str | Solver = "euler",
    grid: str | float | Sequence[float] | Tensor | Grid | None = None,
    guidance_scale: float | Tensor | Guidance | None = None,
    condition: Mapping[str, Any] | None = None,
    uncondition: Mapping[str, Any] | None = None,
    t_start: float = 0.0,
    t_end: float = 1.0,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int | Tensor | None = None,
    compile: bool | str | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    return_info: bool = False,
) -> Tensor | SampleInfo:
    """Solve dx/dt = velocity(x, t) from x0 at ``t_start`` to ``t_end``; 0 is source, 1 is data.

    The state is float32 (float64 for float64 x0). For a bfloat16 or float16 x0 the velocity reads a
    copy of the state in that dtype, and the result has that dtype too. The velocity may answer in
    any floating dtype, float64 only if x0 is. It gets tensors that nobody writes to afterwards,
    must not write into them, and must not overwrite what it returned before. Its training mode is
    not touched: call ``model.eval()``. With adaptive solvers it also meets smaller batches, see
    :class:`rfkernels.sampling.Dopri5`.

    Gradients are recorded when grad mode is on and one of the tensors given here requires grad: x0,
    ``guidance_scale`` or one in the conditions. Parameters of the velocity alone do not count
    (else sampling a model would keep every step's activations): to differentiate with respect to
    them, pass ``x0.requires_grad_()``. Inside ``torch.func`` transforms they always are.

    Args:
        velocity: ``velocity(x, t, **condition)`` with x (B, ...) and t (B,) float32 (float64 when
            x0 is), returning a tensor of the shape of x. ``nn.Module`` objects qualify.
        x0: (B, ...) the source, floating point; never modified.
        steps: number of intervals, at least 1. Required unless the grid lists its times or the
            solver is adaptive; for an adaptive solver it is the number of reported intervals, 1 by
            default.
        solver: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"``, ``"taylor"``; with the past
            ``"ab2"``, ``"ab3"``, ``"fireflow"``, ``"uni-inv"``, ``"dpm++"``, ``"unipc"``; adaptive
            ``"dopri5"``; with noise ``"ancestral"``, ``"sde"``, ``"renoise"``; of other paths
            ``"curved-euler"``; ``"rf++"`` (few steps of a reflowed model only); ``"flow-map"`` (a
            network of average velocities, called with ``span``); or an object such as
            ``Taylor(derivative="jvp")`` or ``Dopri5(max_steps=100)``.
        grid: None or ``"uniform"``; ``"shifted"`` (shift 3) or a number, the time shift; ``"karras"``,
            ``"exponential"``, ``"beta"``; ascending times, which then fix ``steps``, ``t_start`` and
            ``t_end``; or an object with a ``times`` method, such as the grid that ``optimise_grid``
            found for a model.
        guidance_scale: classifier-free guidance, v = v_uncond + g (v - v_uncond), g a float or a
            0-d or (B,) tensor. None and the number 1.0 skip the unconditional call; a tensor is not
            read, so its 1.0 does not. Or one of the objects ``Rescaled``, ``Interval``, ``CFGZero``,
            ``Projected``.
        condition: keyword arguments of the velocity: tensors with the batch first, also in dicts,
            lists and tuples, or anything else passed as it is.
        uncondition: those of the unconditional call; required by guidance, {} for none. A negative
            prompt goes here.
        t_start: where x0 is, in [0, 1).
        t_end: where to stop, in (t_start, 1].
        rtol: relative tolerance of an adaptive solver; None keeps the solver's own, 1e-5.
        atol: absolute tolerance of an adaptive solver; None keeps the solver's own, 1e-5.
        seed: of a stochastic solver's noise, which needs it: an int for the batch, or an int64 tensor
            (B,), with which each sample draws what it would draw alone. Deterministic solvers refuse
            it: there the result depends on x0 alone, whose seed is chosen where x0 is drawn.
        compile: True, or a mode of ``torch.compile``, to compile the velocity; or ``"cudagraph"`` to
            capture the whole loop of a fixed-step solver in one CUDA graph, which is kept with the
            velocity and replayed by calls that differ in values alone.
        progress: show a bar with the time left, on standard error.
        callback: ``callback(step_index, t, x)`` after every step, or every attempted one of an
            adaptive solver: t (B,) the time each sample has reached, x (B, ...) in x0's dtype. x
            may be kept, not written into; what the callback returns is ignored.
        return_info: return a :class:`SampleInfo`.

    Returns:
        (B, ...) the state at ``t_end`` in the dtype of x0, or a :class:`SampleInfo`.

    Raises:
        TypeError: for an argument, or an answer of the velocity, of the wrong type.
        ValueError: for an argument out of range, an unknown name, guidance without ``uncondition``,
            tolerances for a solver that has none, or an answer of the velocity of the wrong shape
            or on the wrong device.
        RuntimeError: when an adaptive solver cannot reach its tolerances.
    """
    return _integrate(
        "sample", "x0", velocity, x0, steps=steps, solver=solver, grid=grid,
        guidance_scale=guidance_scale, condition=condition, uncondition=uncondition,
        t_start=t_start, t_end=t_end, rtol=rtol, atol=atol, seed=seed, compile=compile,
        progress=progress, callback=callback, return_info=return_info,
    )  # fmt: skip


def invert(
    velocity: Callable[..., Tensor],
    x1: Tensor,
    *,
    steps: int | None = None,
    solver: str | Solver = "euler",
    grid: str | float | Sequence[float] | Tensor | Grid | None = None,
    guidance_scale: float | Tensor | Guidance | None = None,
    condition: Mapping[str, Any] | None = None,
    uncondition: Mapping[str, Any] | None = None,
    t_start: float = 0.0,
    t_end: float = 1.0,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int | Tensor | None = None,
    compile: bool | str | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    return_info: bool = False,
) -> Tensor | SampleInfo:
    """Solve the equation of ``sample`` backwards, from the data x1 at ``t_end`` to ``t_start``.

    Takes the arguments of :func:`sample`, the ascending grid included, which is walked from its end
    to its start; so ``invert`` after ``sample`` with the same arguments returns to x0 up to the
    error of the solver; :func:`rfkernels.sampling.reconstruct` does both. The leading error of a
    one-step solver of even order, of ab2 and of fireflow cancels on the way back, so that their round
    trip has one order more than a single trip. Stochastic solvers are refused.
    ``SampleInfo.times`` descends, and ``trajectory[0]`` is x1.

    Returns:
        (B, ...) the state at ``t_start`` in the dtype of x1, or a :class:`SampleInfo`.
    """
    return _integrate(
        "invert", "x1", velocity, x1, steps=steps, solver=solver, grid=grid,
        guidance_scale=guidance_scale, condition=condition, uncondition=uncondition,
        t_start=t_start, t_end=t_end, rtol=rtol, atol=atol, seed=seed, compile=compile,
        progress=progress, callback=callback, return_info=return_info,
    )  # fmt: skip


def _integrate(
    caller: str,
    name: str,
    velocity: Callable[..., Tensor],
    x: Tensor,
    *,
    steps: int | None,
    solver: str | Solver,
    grid: object,
    guidance_scale: float | Tensor | None,
    condition: Mapping[str, Any] | None,
    uncondition: Mapping[str, Any] | None,
    t_start: float,
    t_end: float,
    rtol: float | None,
    atol: float | None,
    seed: int | Tensor | None,
    compile: bool | str | None,
    progress: bool,
    callback: Callback | None,
    return_info: bool,
) -> Tensor | SampleInfo:
    """Check the arguments, run the solver, pack the result; ``name`` is what the caller calls x."""
    arguments.check_callable(caller, "velocity", velocity, "velocity(x, t, **condition)")
    arguments.check_samples(caller, name, x)
    if callback is not None:
        arguments.check_callable(caller, "callback", callback, "callback(step_index, t, x)")
    solver = arguments.make_solver(caller, solver, rtol, atol, seed)
    times = arguments.make_times(caller, grid, steps, t_start, t_end, solver)
    if seed is not None:
        seed = arguments.check_seed(caller, seed, x)
    if caller == "invert":
        times = times[::-1]
    field = arguments.make_field(
        caller, velocity, x, condition, uncondition, guidance_scale, compile, solver, times
    )
    recorded = arguments.wants_gradients(x, field)
    if not recorded:
        x = x.detach()
    # Plain context managers, which torch.compile can follow.
    with (
        torch.set_grad_enabled(recorded and torch.is_grad_enabled()),
        progress_bar(progress, f"{caller} ({solver.name})") as bar,
    ):
        run = Run(times, return_info, callback, bar, seed)
        if not x.numel():
            solution = _nothing_to_do(x, run, solver)
        elif compile == arguments.CUDAGRAPH:
            solution = replayed(caller, solver, field, x, run)
        else:
            solution = solver.integrate(field, x, run)
        if callback is not None:  # which may have kept the last state
            solution = solution._replace(x=solution.x.clone())
    if not return_info:
        return solution.x
    grid_times = torch.tensor(times, dtype=field.state_dtype, device=x.device)
    return SampleInfo(solution.x, solution.nfe, grid_times, solution.trajectory)


def _nothing_to_do(x: Tensor, run: Run, solver: Solver) -> Solution:
    """The result for a batch without elements, for which no velocity is called."""
    trajectory = x.expand(len(run.times), *x.shape).clone() if run.keep_trajectory else None
    nfe = torch.zeros(x.shape[0], dtype=torch.int64, device="cpu") if solver.adaptive else 0
    return Solution(x.clone(), nfe, trajectory)
