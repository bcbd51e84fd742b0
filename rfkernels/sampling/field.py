"""The velocity field as a solver sees it: called, checked, counted, guided, and stepped along.

:class:`Field` is the only place where the user's velocity is called and the only place where the
state moves. Every move is one call of ``euler_step``, ``taylor_step`` or ``linear_step``, into
which classifier-free guidance is folded, and which also writes the low-precision copy that the
network reads next. No move writes into a tensor that the velocity has seen: a velocity may keep
what it was given (feature caches do), and may return its input or a view of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rfkernels.ops._checks import FLOATS
from rfkernels.ops.ode_step import MAX_TERMS, euler_step, linear_step, taylor_step
from rfkernels.sampling.guidance import Guidance, Part
from rfkernels.sampling.nested import map_leaves


class State(NamedTuple):
    """Where the integration is: ``x`` in float32 or float64, and the same rounded to the dtype the
    network reads."""

    x: Tensor
    model_input: Tensor


class Evaluation(NamedTuple):
    """The velocity at one point.

    ``conditional`` alone, or both velocities of classifier-free guidance, or ``parts``: the
    (coefficient, tensor) that another kind of guidance makes of them. ``writes`` says how often either
    had been written to when it was returned.
    """

    conditional: Tensor
    unconditional: Tensor | None = None
    parts: tuple[Part, ...] | None = None
    writes: tuple[int | None, ...] = ()


Term = tuple[float | Tensor, Evaluation]


def writes(tensor: Tensor) -> int | None:
    """How often the tensor's memory was written to in place; None where nobody counts."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


@dataclass
class Field:
    """A velocity field with its conditions and guidance, for a batch of ``batch`` samples.

    Args:
        velocity: ``velocity(x, t, **condition)``, x (B, ...), t (B,).
        dtype: what the network reads, the dtype of the caller's tensor.
        batch: B.
        condition: keyword arguments of the conditional call.
        uncondition: keyword arguments of the unconditional call.
        guidance: of ``rfkernels.sampling.guidance``; None: one call only.
        compiled: what to call instead of ``velocity``, except for forward derivatives.
        copy_outputs: keep copies of what the velocity returns, for compiled fields that overwrite
            it at the next call.
        calls: how often the velocity was called.
        compact: put the guidance into every velocity at once, by one more kernel call each; see
            :meth:`reserve`.
        memory: what guidance keeps between evaluations.
    """

    velocity: Callable[..., Tensor]
    dtype: torch.dtype
    batch: int
    condition: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    uncondition: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance: Guidance | None = None
    compiled: Callable[..., Tensor] | None = None
    copy_outputs: bool = False
    calls: int = 0
    compact: bool = False
    memory: dict[str, Tensor] = dataclasses.field(default_factory=dict)

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

    def moving(self, times: Sequence[float]) -> range:
        """Which steps of a grid, walked in either direction, are not left out by guidance: all, or
        those beyond a rest at the noisy end."""
        steps = range(len(times) - 1)
        if self.guidance is None:
            return steps
        kept = [i for i in steps if not self.guidance.rests_between(times[i], times[i + 1])]
        return range(kept[0], kept[-1] + 1) if kept else range(0)

    def reserve(self, evaluations: int, tensors: int = 0) -> None:
        """Prepare for updates that sum this many velocities and other tensors besides x.

        A kernel sums at most 8 tensors. Where guided velocities would be more, each is combined to
        one tensor when it is evaluated.
        """
        if self.guidance is not None:
            self.compact = evaluations * self.guidance.tensors + tensors > MAX_TERMS

    def __call__(self, state: State, t: float | Tensor) -> Evaluation:
        """The velocity at (state, t): one call, or two under guidance.

        t is one time for all, or a (B,) tensor.
        """
        guidance = self._guidance_at(t)
        if guidance is not None and not isinstance(t, Tensor) and guidance.rests_at(t):
            return Evaluation(torch.zeros_like(state.x))
        conditional = self._call(state, self._times(t, state), self.condition)
        if guidance is None:
            return Evaluation(conditional, writes=(writes(conditional),))
        before = writes(conditional)
        unconditional = self._call(state, self._times(t, state), self.uncondition)
        evaluation = Evaluation(conditional, unconditional, writes=(before, writes(unconditional)))
        self._refuse_overwritten(evaluation)
        parts = guidance.parts(conditional, unconditional, state.x, t, self.memory)
        evaluation = evaluation._replace(parts=parts)
        return self._in_one(state.x, evaluation) if self.compact else evaluation

    def combined(self, state: State, t: float | Tensor) -> Evaluation:
        """The velocity at (state, t) with the guidance already in it, in the state's precision when
        guided.

        For solvers that keep many velocities: half the memory, at the price of one ``linear_step``
        an evaluation.
        """
        return self._in_one(state.x, self(state, t))

    def derivative(self, state: State, t: float, direction: Tensor) -> Tensor:
        """d velocity / dt along the flow, J direction + dv/dt, exactly, by one forward-mode call
        per velocity.

        ``direction`` is the velocity at (state, t) itself. Attention takes its plain form inside,
        since the fused ones have no forward derivative.
        """
        self._refuse_memory()
        x, times = state.model_input, self._times(t, state)
        tangents = (direction.to(x.dtype), torch.ones_like(times))
        whole = functools.partial(self._whole, self._guidance_at(t))
        with sdpa_kernel(SDPBackend.MATH):
            _, change = torch.func.jvp(whole, (x, times), tangents)
        return change

    def two_derivatives(self, state: State, t: float, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second derivative along the flow, by nested forward-mode calls."""
        self._refuse_memory()
        x, times = state.model_input, self._times(t, state)
        one = torch.ones_like(times)
        whole = functools.partial(self._whole, self._guidance_at(t))

        def change(x: Tensor, times: Tensor) -> Tensor:
            along = whole(x, times).to(x.dtype)
            return torch.func.jvp(whole, (x, times), (along, one))[1]

        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(change, (x, times), (direction.to(x.dtype), one))

    def advance(self, x: Tensor, terms: Sequence[Term]) -> State:
        """x + sum of coefficient * velocity, in one kernel call. Coefficients are floats or (B,)
        tensors.

        One term is an ``euler_step``; several are a ``linear_step``, where a term under guidance is
        two tensors with the coefficients c g and c (1 - g), or what its parts are.
        """
        if len(terms) == 1 and terms[0][1].parts is None:
            (dt, evaluation) = terms[0]
            self._refuse_overwritten(evaluation)
            conditional, unconditional, *_ = evaluation
            cast = self._cast()
            if unconditional is None:
                return self._state(euler_step(x, conditional, dt, cast=cast))
            guided = euler_step(
                x,
                conditional,
                dt,
                v_uncond=unconditional,
                guidance_scale=self.guidance.scale,
                cast=cast,
            )
            return self._state(guided)
        return self.combine(x, 1.0, terms)

    def combine(
        self,
        x: Tensor,
        x_coefficient: float | Tensor,
        terms: Sequence[Term],
        tensors: Sequence[Part] = (),
        *,
        noise: tuple[float, Tensor, Tensor] | None = None,
    ) -> State:
        """x_coefficient x + sum of coefficient * velocity + sum of coefficient * tensor, in one
        ``linear_step``; ``noise`` is (scale, seeds (B,), offsets (B,)) of normal numbers to add."""
        parts = [
            (coefficient * share, tensor)
            for coefficient, evaluation in terms
            for share, tensor in self.parts(evaluation)
        ]
        parts.extend(tensors)
        scale, seed, offset = (None, None, 0) if noise is None else noise
        moved = linear_step(
            x,
            tuple(tensor for _, tensor in parts),
            tuple(coefficient for coefficient, _ in parts),
            x_coefficient=x_coefficient,
            noise_scale=scale,
            seed=seed,
            offset=offset,
            cast=self._cast(),
        )
        return self._state(moved)

    def taylor(self, x: Tensor, derivatives: Sequence[Tensor], dt: float) -> State:
        """x + dt v + dt^2 / 2 dv/dt + ..., in one kernel call."""
        return self._state(taylor_step(x, tuple(derivatives), dt, cast=self._cast()))

    def parts(self, evaluation: Evaluation) -> tuple[Part, ...]:
        """(coefficient, tensor) of a velocity, guidance included.

        Raises:
            ValueError: a later call wrote into it.
        """
        self._refuse_overwritten(evaluation)
        conditional, unconditional, parts, _ = evaluation
        if parts is not None:
            return parts
        if unconditional is None:
            return ((1.0, conditional),)
        g = self.guidance.scale
        return (g, conditional), (1 - g, unconditional)

    def select(self, rows: Tensor) -> Field:
        """The field of the samples named by ``rows``, an index tensor on the device.

        Per-sample things are cut: a (B,) guidance scale, and every tensor of the conditions, in dicts
        and lists too, whose first size is B.
        """

        def cut(value: Any) -> Any:
            per_sample = (
                isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.batch
            )
            return value.index_select(0, rows.to(value.device)) if per_sample else value

        return dataclasses.replace(
            self,
            batch=rows.shape[0],
            condition=map_leaves(cut, dict(self.condition)),
            uncondition=map_leaves(cut, dict(self.uncondition)),
            guidance=None if self.guidance is None else self.guidance.per_sample(cut),
        )

    def _guidance_at(self, t: float | Tensor) -> Guidance | None:
        """None also at a time at which no sample is guided."""
        guidance = self.guidance
        if guidance is None or isinstance(t, Tensor):
            return guidance
        return guidance if guidance.rests_at(t) or guidance.guides_at(t) else None

    def _refuse_memory(self) -> None:
        if self.guidance is not None and self.guidance.remembers:
            raise ValueError(
                "guidance_scale: momentum has no derivative along the flow; take derivative='finite' "
                f"or momentum=0; got {self.guidance!r}"
            )

    def _cast(self) -> torch.dtype | None:
        return None if self.dtype == self.state_dtype else self.dtype

    def _state(self, result: Tensor | tuple[Tensor, Tensor]) -> State:
        return State(*result) if isinstance(result, tuple) else State(result, result)

    def _times(self, t: float | Tensor, state: State) -> Tensor:
        """(B,) times for one call, its own: a network may scale them in place."""
        return t.clone() if isinstance(t, Tensor) else self.time(t, state)

    def _in_one(self, x: Tensor, evaluation: Evaluation) -> Evaluation:
        """The same velocity as one tensor; the zero coefficient brings in x's shape and precision."""
        if evaluation.unconditional is None:
            return evaluation
        return Evaluation(self._sum(x, self.parts(evaluation)))

    def _sum(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        shares, tensors = zip(*parts, strict=True)
        return linear_step(x, tensors, shares, x_coefficient=0.0)

    def _whole(self, guidance: Guidance | None, x: Tensor, times: Tensor) -> Tensor:
        """The velocity under this guidance as a function of tensors, for torch.func."""
        self.calls += 1
        conditional = self.velocity(x, times, **self.condition)
        if guidance is None:
            return conditional
        self.calls += 1
        unconditional = self.velocity(x, times, **self.uncondition)
        wide = x.to(self.state_dtype)
        parts = guidance.parts(conditional, unconditional, wide, times, {})
        return self._sum(wide, self.parts(Evaluation(conditional, unconditional, parts)))

    def _call(self, state: State, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        self.calls += 1
        call = self.velocity if self.compiled is None else self.compiled
        x = state.model_input
        before = writes(x)
        value = call(x, t, **condition)
        if writes(x) != before:
            raise ValueError("velocity: must not write into x; got x changed in place by the call")
        check_answer(value, state.x, x.dtype)
        return value.clone() if self.copy_outputs else value

    def _refuse_overwritten(self, evaluation: Evaluation) -> None:
        """A velocity that answers in the same memory every time would change earlier answers."""
        velocities = (evaluation.conditional, evaluation.unconditional)
        for velocity, before in zip(velocities, evaluation.writes, strict=False):
            if velocity is not None and writes(velocity) != before:
                raise ValueError(
                    "velocity: must not overwrite what it returned before; got an answer changed in "
                    "place by a later call (return a tensor of its own each time)"
                )


def check_answer(value: object, x: Tensor, read: torch.dtype) -> None:
    """Refuse what a velocity must not return for the state x, read by it in the dtype ``read``."""
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
    if value.dtype not in FLOATS:
        raise TypeError(
            "velocity: must return a floating point tensor, of float32, float64, bfloat16 or "
            f"float16; got {value.dtype}"
        )
    if value.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(
            f"velocity: may return float64 only if x is float64; got {value.dtype} for x in {read} "
            "(pass float64 samples, or return v.to(x.dtype))"
        )
