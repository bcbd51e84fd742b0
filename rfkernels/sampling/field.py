"""The velocity field as a solver sees it: called, checked, counted, guided, and stepped along.

:class:`Field` is the only place where the user's velocity is called and the only place where the
state moves. Every move is one call of ``euler_step``, ``taylor_step`` or ``linear_step``, into
which classifier-free guidance is folded, and which also writes the low-precision copy that the
network reads next. No move writes into a tensor that the velocity has seen: a velocity may keep
what it was given (feature caches do), and may return its input or a view of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rfkernels.ops.ode_step import euler_step, linear_step, taylor_step


class State(NamedTuple):
    """Where the integration is: ``x`` in float32 or float64, and the same rounded to the dtype the
    network reads."""

    x: Tensor
    model_input: Tensor


class Evaluation(NamedTuple):
    """The velocity at one point; ``unconditional`` is None when no guidance is at work."""

    conditional: Tensor
    unconditional: Tensor | None = None


Term = tuple[float | Tensor, Evaluation]


@dataclass
class Field:
    """A velocity field with its conditions and guidance, for a batch of ``batch`` samples.

    Args:
        velocity: ``velocity(x, t, **condition)``, x (B, ...), t (B,).
        dtype: what the network reads, the dtype of the caller's tensor.
        batch: B.
        condition: keyword arguments of the conditional call.
        uncondition: keyword arguments of the unconditional call.
        guidance_scale: g in v = v_uncond + g (v - v_uncond), a float or a 0-d or (B,) tensor; None:
            one call only.
        compiled: what to call instead of ``velocity``, except for forward derivatives.
        copy_outputs: keep copies of what the velocity returns, for compiled fields that overwrite
            it at the next call.
        calls: how often the velocity was called.
    """

    velocity: Callable[..., Tensor]
    dtype: torch.dtype
    batch: int
    condition: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    uncondition: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance_scale: float | Tensor | None = None
    compiled: Callable[..., Tensor] | None = None
    copy_outputs: bool = False
    calls: int = 0

    @property
    def state_dtype(self) -> torch.dtype:
        """float64 for float64 samples, else float32; times have the same dtype."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def start(self, x0: Tensor) -> State:
        """The state at the caller's tensor."""
        if 0 in x0.stride():  # expanded: no memory of its own, which forward derivatives refuse
            x0 = x0.contiguous()
        return State(x0.to(self.state_dtype), x0)

    def time(self, t: float, state: State) -> Tensor:
        """t for every sample, (B,); a fresh tensor, since a network may scale its times in
        place."""
        return torch.full((self.batch,), t, dtype=self.state_dtype, device=state.x.device)

    def __call__(self, state: State, t: Tensor) -> Evaluation:
        """The velocity at (state, t): one call, or two under guidance. t is (B,)."""
        conditional = self._call(state, t, self.condition)
        if self.guidance_scale is None:
            return Evaluation(conditional)
        return Evaluation(conditional, self._call(state, t, self.uncondition))

    def combined(self, state: State, t: Tensor) -> Evaluation:
        """The velocity at (state, t) with the guidance already in it, in the state's precision when
        guided.

        For solvers that keep many velocities: half the memory, at the price of one ``linear_step``
        an evaluation.
        """
        conditional, unconditional = self(state, t)
        if unconditional is None:
            return Evaluation(conditional)
        g = self.guidance_scale
        return Evaluation(
            linear_step(state.x, [conditional, unconditional], [g, 1 - g], x_coefficient=0.0)
        )

    def derivative(self, state: State, t: Tensor, direction: Tensor) -> Evaluation:
        """d velocity / dt along the flow, J direction + dv/dt, exactly, by one forward-mode call
        per velocity.

        ``direction`` is the velocity at (state, t) itself. Attention takes its plain form inside,
        since the fused ones have no forward derivative.
        """
        tangents = (direction.to(state.model_input.dtype), torch.ones_like(t))

        def along(condition: Mapping[str, Any]) -> Tensor:
            def call(x: Tensor, t: Tensor) -> Tensor:
                return self.velocity(x, t, **condition)

            self.calls += 1
            with sdpa_kernel(SDPBackend.MATH):
                _, change = torch.func.jvp(call, (state.model_input, t), tangents)
            return change

        if self.guidance_scale is None:
            return Evaluation(along(self.condition))
        return Evaluation(along(self.condition), along(self.uncondition))

    def advance(self, x: Tensor, terms: Sequence[Term]) -> State:
        """x + sum of coefficient * velocity, in one kernel call. Coefficients are floats or (B,)
        tensors.

        One term is an ``euler_step``; several are a ``linear_step``, where a guided term is two
        tensors with the coefficients c g and c (1 - g).
        """
        cast = self._cast()
        if len(terms) == 1:
            (dt, (conditional, unconditional)) = terms[0]
            if unconditional is None:
                return self._state(euler_step(x, conditional, dt, cast=cast))
            guided = euler_step(
                x,
                conditional,
                dt,
                v_uncond=unconditional,
                guidance_scale=self.guidance_scale,
                cast=cast,
            )
            return self._state(guided)
        return self.combine(x, 1.0, terms)

    def combine(
        self,
        x: Tensor,
        x_coefficient: float | Tensor,
        terms: Sequence[Term],
        tensors: Sequence[tuple[float | Tensor, Tensor]] = (),
    ) -> State:
        """x_coefficient x + sum of coefficient * velocity + sum of coefficient * tensor, in one
        ``linear_step``."""
        parts: list[tuple[float | Tensor, Tensor]] = []
        for coefficient, (conditional, unconditional) in terms:
            if unconditional is None:
                parts.append((coefficient, conditional))
            else:
                parts.append((coefficient * self.guidance_scale, conditional))
                parts.append((coefficient * (1 - self.guidance_scale), unconditional))
        parts.extend(tensors)
        coefficients = [coefficient for coefficient, _ in parts]
        moved = linear_step(
            x,
            [tensor for _, tensor in parts],
            coefficients,
            x_coefficient=x_coefficient,
            cast=self._cast(),
        )
        return self._state(moved)

    def taylor(self, x: Tensor, velocity: Evaluation, change: Evaluation, dt: float) -> State:
        """x + dt velocity + dt^2 / 2 change, in one kernel call; ``velocity`` comes from
        :meth:`combined`."""
        if change.unconditional is not None:
            return self.advance(x, [(dt, velocity), (dt * dt / 2, change)])
        derivatives = (velocity.conditional, change.conditional)
        return self._state(taylor_step(x, derivatives, dt, cast=self._cast()))

    def select(self, rows: Tensor) -> Field:
        """The field of the samples named by ``rows``, an index tensor on the device.

        Per-sample things are cut: a (B,) guidance scale, and every tensor of the conditions whose
        first size is B.
        """

        def cut(value: Any) -> Any:
            per_sample = (
                isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.batch
            )
            return value.index_select(0, rows.to(value.device)) if per_sample else value

        return dataclasses.replace(
            self,
            batch=rows.shape[0],
            condition={name: cut(value) for name, value in self.condition.items()},
            uncondition={name: cut(value) for name, value in self.uncondition.items()},
            guidance_scale=cut(self.guidance_scale),
        )

    def _cast(self) -> torch.dtype | None:
        return None if self.dtype == self.state_dtype else self.dtype

    def _state(self, result: Tensor | tuple[Tensor, Tensor]) -> State:
        return State(*result) if isinstance(result, tuple) else State(result, result)

    def _call(self, state: State, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        self.calls += 1
        call = self.velocity if self.compiled is None else self.compiled
        x = state.model_input
        version = None if x.is_inference() else x._version
        value = call(x, t, **condition)
        if version is not None and x._version != version:
            raise ValueError("velocity: must not write into x; got x changed in place by the call")
        self._check(value, state)
        return value.clone() if self.copy_outputs else value

    def _check(self, value: object, state: State) -> None:
        x = state.x
        if not isinstance(value, Tensor):
            raise TypeError(f"velocity: must return a tensor; got {type(value).__name__}")
        if value.shape != x.shape:
            raise ValueError(
                f"velocity: must return a tensor of the shape of x, {tuple(x.shape)}; "
                f"got {tuple(value.shape)}"
            )
        if value.device != x.device:
            raise ValueError(
                f"velocity: must return a tensor on the device of x, {x.device}; got {value.device}"
            )
        if not value.is_floating_point():
            raise TypeError(f"velocity: must return a floating point tensor; got {value.dtype}")
        if value.dtype == torch.float64 and x.dtype != torch.float64:
            raise TypeError(
                f"velocity: may return float64 only if x is float64; got {value.dtype} for x in "
                f"{state.model_input.dtype} (pass float64 samples, or return v.to(x.dtype))"
            )
