"""The whole loop of a run as one CUDA graph: nothing of it is launched from Python again.

A run of fixed steps reads nothing back from the device, so it can be captured: all network calls and
kernel calls from x0 to the result. The graph is kept with the velocity object and replayed for calls
that differ in the values of x0, of tensors in the conditions, of guidance scales and of the seed, which
are copied into the memory that was captured. Whatever else differs (shapes, grid, solver, numbers,
autocast, training mode) is another graph. Weights may change in place between replays, as an optimizer
changes them. Pass the same velocity object every time: a bound method is a new one at each mention.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfkernels.sampling.field import Field
from rfkernels.sampling.nested import map_leaves
from rfkernels.sampling.run import Run, Solution, Solver

__all__ = ["forget_graphs", "replayed"]

_kept: weakref.WeakKeyDictionary[Any, dict[Hashable, _Captured]] = weakref.WeakKeyDictionary()
# A graph has one memory: threads take turns to fill it, replay and copy what came out.
_turn = threading.RLock()


@dataclass
class _Captured:
    graph: Any
    inputs: list[Tensor]
    solution: Solution
    done: Any = None  # of the last replay, for one that comes on another stream


def replayed(caller: str, solver: Solver, field: Field, x0: Tensor, run: Run) -> Solution:
    """What ``solver.integrate`` would return, from a graph captured now or before.

    Raises:
        ValueError: no CUDA device, an adaptive solver, a callback, or gradients.
    """
    _refuse(caller, solver, x0, run)
    inputs, rebuilt = _inputs(field, x0, run)
    device = x0.device.type
    around = (
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        getattr(field.velocity, "training", None),
    )
    key = (solver, run.times, run.keep_trajectory, tuple(map(_shape, inputs)), rebuilt.key, around)
    with _turn, torch.cuda.device_of(x0):  # streams and graphs are made on the current device
        graphs = _kept.setdefault(field.velocity, {})
        if key not in graphs:
            graphs[key] = _capture(solver, inputs, rebuilt.build)
        return _replay(graphs[key], inputs)


def forget_graphs(velocity: Callable[..., Tensor] | None = None) -> None:
    """Free the graphs of one velocity, or all, with their memory."""
    with _turn:
        if velocity is None:
            _kept.clear()
        else:
            _kept.pop(velocity, None)


def _refuse(caller: str, solver: Solver, x0: Tensor, run: Run) -> None:
    rule = None
    if x0.device.type != "cuda":
        rule = f"samples on a CUDA device; got {x0.device}"
    elif solver.adaptive:
        rule = f"a solver of fixed steps; got {solver.name!r}"
    elif run.callback is not None:
        rule = "no callback, which a replay would not call; got one"
    elif torch.is_grad_enabled():
        rule = "no gradients, which a replay does not record; got a tensor that requires grad"
    if rule is not None:
        raise ValueError(f"{caller}: compile='cudagraph' needs {rule}")


@dataclass(frozen=True)
class _Rebuilt:
    """How to make the field and the run from the input tensors, and what else they consist of."""

    key: Hashable
    build: Callable[[list[Tensor]], tuple[Field, Tensor, Run]]


@dataclass(frozen=True)
class _Place:
    """Stands for one of the input tensors."""

    index: int


def _inputs(field: Field, x0: Tensor, run: Run) -> tuple[list[Tensor], _Rebuilt]:
    """Every tensor whose values may differ from call to call, and the rest."""
    inputs = [x0]

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.device != x0.device:
            # A number read from host memory would be captured as it is now, and replayed for every other.
            raise ValueError(
                f"condition: compile='cudagraph' needs tensors on the device of x0, {x0.device}; "
                f"got one on {value.device}"
            )
        inputs.append(value)
        return _Place(len(inputs) - 1)

    seed = run.seed
    if seed is not None and not isinstance(seed, Tensor):
        seed = torch.tensor(seed, device=x0.device)
    scale = None if field.guidance is None else field.guidance.scale
    scale = scale if isinstance(scale, Tensor) else None
    given = map_leaves(place, (dict(field.condition), dict(field.uncondition), seed, scale))
    constants = [_constant(given)]
    if field.guidance is not None:
        fixed = field.guidance.per_sample(lambda value: 0.0)
        constants.append(field.guidance if scale is None else repr(fixed))

    def build(tensors: list[Tensor]) -> tuple[Field, Tensor, Run]:
        condition, uncondition, seeds, scales = map_leaves(
            lambda value: tensors[value.index] if isinstance(value, _Place) else value, given
        )
        guidance = field.guidance
        if scales is not None:
            guidance = guidance.per_sample(lambda _: scales)
        copy = dataclasses.replace(
            field,
            condition=condition,
            uncondition=uncondition,
            guidance=guidance,
            memory={},
            calls=0,
        )
        silent = dataclasses.replace(run, seed=seeds, progress=lambda fraction: None)
        return copy, tensors[0], silent

    return inputs, _Rebuilt(tuple(constants), build)


def _capture(
    solver: Solver,
    inputs: list[Tensor],
    build: Callable[[list[Tensor]], tuple[Field, Tensor, Run]],
) -> _Captured:
    """Run once on a side stream, so that libraries set themselves up, and then under capture."""
    static = _static(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        solver.integrate(*build(static))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Autocast's copies of the weights live as long as it does: the graph must make its own, and nobody
    # else may use those.
    torch.clear_autocast_cache()
    # Of this device: torch's own stream for captures is of the first one's, where nothing of this is seen.
    with torch.cuda.graph(graph, stream=stream):
        solution = solver.integrate(*build(static))
    torch.clear_autocast_cache()
    return _Captured(graph, static, solution)


def _replay(captured: _Captured, inputs: list[Tensor]) -> Solution:
    """The solution for these inputs, in memory of its own."""
    if captured.done is not None:
        torch.cuda.current_stream().wait_event(captured.done)
    for static, given in zip(captured.inputs, inputs, strict=True):
        static.copy_(given)
    captured.graph.replay()
    x, nfe, trajectory = captured.solution
    result = Solution(x.clone(), nfe, None if trajectory is None else trajectory.clone())
    if x.is_cuda:
        captured.done = torch.cuda.current_stream().record_event()
    return result


def _static(inputs: list[Tensor]) -> list[Tensor]:
    """Memory for a graph to read. Made outside of inference mode, so that later calls may write to it
    outside of it too."""
    with torch.inference_mode(False), torch.no_grad():
        return [tensor.detach().clone() for tensor in inputs]


def _shape(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _constant(value: Any) -> Hashable:
    """The value as part of a key, which keeps it alive, so that an equal key means the same; with the
    types, since 1 and True are equal."""
    if isinstance(value, dict):
        return dict, tuple((name, _constant(inner)) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_constant, value))
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            "condition: compile='cudagraph' needs tensors and hashable values; "
            f"got {type(value).__name__}"
        ) from None
    return type(value), value
