"""The checks of ``sample`` and ``invert``: from what a caller wrote to what a solver works with.

``caller`` is the public function whose name opens the error messages.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rfkernels._dispatch import transforms_active
from rfkernels.ops._checks import FLOATS
from rfkernels.sampling.constant import constant
from rfkernels.sampling.field import Field
from rfkernels.sampling.grids import check_times, get_grid
from rfkernels.sampling.guidance import ClassifierFree, Guidance
from rfkernels.sampling.nested import leaves
from rfkernels.sampling.run import Solver
from rfkernels.sampling.solvers import get_solver

CUDAGRAPH = "cudagraph"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_samples(caller: str, name: str, x: object) -> None:
    """A floating point tensor with a batch dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{caller}: {name} must be float32, float64, bfloat16 or float16; got {x.dtype}"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{caller}: {name} must be a strided tensor; got layout {x.layout}")
    if x.ndim == 0:
        raise ValueError(
            f"{caller}: {name} must have a batch dimension, (B, ...); got a 0-d tensor"
        )


def check_callable(caller: str, name: str, value: object, call: str) -> None:
    """Something that can be called; ``call`` shows how it will be."""
    if not callable(value):
        raise TypeError(f"{caller}: {name} must be callable as {call}; got {type(value).__name__}")


def make_solver(
    caller: str,
    solver: str | Solver,
    rtol: float | None,
    atol: float | None,
    seed: int | Tensor | None,
) -> Solver:
    """The solver with the tolerances of the call; what it has no use for is refused."""
    solver = get_solver(solver)
    if getattr(solver, "stochastic", False):
        if caller == "invert":
            raise ValueError(
                f"invert: solver must be deterministic; got {solver.name!r}, which draws noise"
            )
        if seed is None:
            raise ValueError(
                f"{caller}: seed must be given with solver {solver.name!r}, which draws noise; got None"
            )
    elif seed is not None:
        raise ValueError(
            f"{caller}: seed must be left out, since solver {solver.name!r} draws no noise; "
            f"got {seed!r}"
        )
    if rtol is None and atol is None:
        return solver
    if not solver.adaptive:
        raise ValueError(
            f"{caller}: rtol and atol must be left out, since solver {solver.name!r} takes fixed "
            f"steps; got rtol={rtol}, atol={atol}"
        )
    return solver.with_tolerances(rtol, atol)


def check_seed(caller: str, seed: int | Tensor, x: Tensor) -> int | Tensor:
    """An int in [0, 2^63), or an int64 tensor, 0-d or (B,), on x's device."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{caller}: seed must be an int or an int64 tensor; got {seed.dtype}")
        if seed.shape not in ((), x.shape[:1]):
            raise ValueError(
                f"{caller}: seed must be an int, a 0-d or a ({x.shape[0]},) tensor; "
                f"got shape {tuple(seed.shape)}"
            )
        return seed.to(x.device)
    seed = check_integer(caller, "seed", seed, "an int or an int64 tensor")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{caller}: seed must be in [0, 2**63); got {seed}")
    return seed


def check_steps(caller: str, steps: object) -> int:
    """An integer from 1, bool excepted."""
    steps = check_integer(caller, "steps", steps, "an integer")
    if steps < 1:
        raise ValueError(f"{caller}: steps must be at least 1; got {steps}")
    return steps


def make_times(
    caller: str, grid: object, steps: int | None, t_start: float, t_end: float, solver: Solver
) -> tuple[float, ...]:
    """The ascending times of the run."""
    start, end = _number(caller, "t_start", t_start), _number(caller, "t_end", t_end)
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"{caller}: t_start and t_end must satisfy 0 <= t_start < t_end <= 1; "
            f"got {start} and {end}"
        )
    if steps is not None:
        steps = check_steps(caller, steps)
    elif grid is None:
        if not solver.adaptive:
            raise ValueError(f"{caller}: steps must be given with solver {solver.name!r}; got None")
        steps = 1
    times = tuple(float(t) for t in get_grid(grid).times(steps, start, end))
    check_times(times)
    return times


def make_field(
    caller: str,
    velocity: Callable[..., Tensor],
    x: Tensor,
    condition: Mapping[str, Any] | None,
    uncondition: Mapping[str, Any] | None,
    guidance_scale: float | Tensor | Guidance | None,
    compile: bool | str | None,
    solver: Solver,
    times: Sequence[float],
) -> Field:
    """The velocity with its conditions, guided and compiled as asked."""
    guidance = _guidance(caller, guidance_scale, x)
    if guidance is not None:
        guidance = guidance.begin(times)
        if guidance.remembers and solver.adaptive:
            raise ValueError(
                f"{caller}: guidance_scale must have no momentum with the adaptive solver "
                f"{solver.name!r}; got {guidance!r}"
            )
    if guidance is not None and uncondition is None:
        raise ValueError(
            f"{caller}: uncondition must be given with guidance_scale, the arguments of the "
            "unconditional call ({} for none); got None"
        )
    compiled = None
    if compile is not None and compile is not False and compile != CUDAGRAPH:
        if compile is not True and compile not in COMPILE_MODES:
            raise ValueError(
                f"{caller}: compile must be None, True or one of {', '.join(COMPILE_MODES)}, "
                f"{CUDAGRAPH}; got {compile!r}"
            )
        compiled = torch.compile(velocity, mode=None if compile is True else compile)
    return Field(
        velocity,
        x.dtype,
        x.shape[0],
        condition=check_condition(caller, "condition", condition),
        uncondition=check_condition(caller, "uncondition", uncondition),
        guidance=guidance,
        compiled=compiled,
        # These modes may replay CUDA graphs, whose outputs live until the next replay only.
        copy_outputs=compile in ("reduce-overhead", "max-autotune"),
    )


def wants_gradients(x: Tensor, field: Field) -> bool:
    """Whether torch.func is at work, or a tensor of the call (not a parameter) requires grad."""
    if transforms_active():
        return True
    if not torch.is_grad_enabled():
        return False
    scale = None if field.guidance is None else field.guidance.scale
    return requires_grad(x, scale, dict(field.condition), dict(field.uncondition))


def requires_grad(*values: Any) -> bool:
    """Whether a tensor among the values, or in the containers among them, requires grad."""
    return any(isinstance(v, Tensor) and v.requires_grad for v in leaves(values))


def check_integer(caller: str, name: str, value: object, rule: str) -> int:
    """An integer of any library's, bool excepted; ``rule`` says what it must be."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):  # what is none, and arrays of several
            return operator.index(value)
    raise TypeError(f"{caller}: {name} must be {rule}; got {type(value).__name__}")


def _number(caller: str, name: str, value: object) -> float:
    if type(value) in (int, float):
        return float(constant(value))
    if not isinstance(value, (bool, str)) and hasattr(value, "__float__"):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # arrays of several
            return float(value)
    raise TypeError(f"{caller}: {name} must be a number; got {type(value).__name__}")


def check_condition(caller: str, name: str, value: object) -> Mapping[str, Any]:
    """Keyword arguments of the velocity; {} for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{caller}: {name} must be a dict of keyword arguments of the velocity; "
            f"got {type(value).__name__}"
        )
    return value


def _guidance(caller: str, scale: float | Tensor | Guidance | None, x: Tensor) -> Guidance | None:
    """None when no unconditional call is needed, else an object whose scale fits x."""
    if isinstance(scale, ClassifierFree):
        scale = scale.scale
    if scale is None:
        return None

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.shape not in ((), x.shape[:1]):
            raise ValueError(
                f"{caller}: guidance_scale must be a number, a 0-d or a ({x.shape[0]},) tensor; "
                f"got shape {tuple(value.shape)}"
            )
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{caller}: guidance_scale must be real; got {value.dtype}")
        return value.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)

    if isinstance(scale, Guidance):
        return scale.per_sample(placed)
    if isinstance(scale, (bool, type)) or not (
        isinstance(scale, (int, float, Tensor)) or hasattr(scale, "__float__")
    ):
        raise TypeError(
            f"{caller}: guidance_scale must be a number, a tensor or a kind of guidance "
            f"of rfkernels.sampling; got {type(scale).__name__}"
        )
    if isinstance(scale, Tensor):
        return ClassifierFree(placed(scale))
    scale = _number(caller, "guidance_scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"{caller}: guidance_scale must be finite; got {scale}")
    return None if scale == 1.0 else ClassifierFree(scale)
