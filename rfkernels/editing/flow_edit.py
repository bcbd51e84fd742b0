"""FlowEdit: from source to target directly, without going through noise."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

from torch import Tensor

from rfkernels.editing.setting import Setting
from rfkernels.ops.ode_step import linear_step
from rfkernels.sampling.field import Field, State
from rfkernels.training.option_checks import whole

__all__ = ["FlowEdit"]


@dataclass(frozen=True)
class FlowEdit:
    """Moves x1 by the difference of the two velocities at noisy points that move along with it.

    With d = z - x1 the edit so far, at first 0, one step of the grid from t to t + h is, for n_avg
    fresh normal noises n (Kulikov et al. 2025, "FlowEdit: inversion-free text-based editing using
    pre-trained flow models")::

        x_s = t x1 + (1 - t) n        x_t = x_s + d
        d  <- d + h mean[ v(x_t, t | target) - v(x_s, t | source) ]

    The state is d itself and not z, so that equal prompts and scales give back x1 to the bit. Cost:
    2 evaluations a step and noise, more with guidance.

    Args:
        n_max: how many of the last steps are taken; those before are skipped, so that fewer keep more
            of the source. None is 6/7 of the steps. Published with FLUX 24 of 28 (scales 1.5 and
            5.5), with SD3 33 of 50 (3.5 and 13.5).
        n_min: how many of the very last are plain Euler sampling under the target, which frees
            small details of the source; published 0.
        n_avg: noises a step; published 1.
    """

    name: ClassVar[str] = "flowedit"
    shares_features: ClassVar[bool] = False
    n_max: int | None = None
    n_min: int = 0
    n_avg: int = 1

    def __post_init__(self) -> None:
        if self.n_max is not None:
            whole("n_max", self.n_max, 0)
        whole("n_min", self.n_min, 0)
        whole("n_avg", self.n_avg, 1)

    def run(self, setting: Setting) -> Tensor:
        """The edited samples; see :class:`rfkernels.editing.Method`."""
        steps, times = setting.steps, setting.times
        taken = round(steps * 6 / 7) if self.n_max is None else self.n_max
        if not self.n_min <= taken <= steps:
            raise ValueError(
                f"FlowEdit: n_min <= n_max <= steps must hold; got n_min={self.n_min}, "
                f"n_max={taken}, steps={steps}"
            )
        source, target = setting.source_field(), setting.target_field()
        x1 = source.start(setting.x1).x
        edit = x1.new_zeros(x1.shape)
        first, last = steps - taken, steps - self.n_min
        for index in range(first, last):
            dt = times[index + 1] - times[index]
            moved = edit
            for draw in range(self.n_avg):
                key = index * self.n_avg + draw
                noisy = _noised(setting, source, x1, times[index], key)
                beside = target.combine(noisy.x, 1.0, [], [(1.0, edit)])
                weight = dt / self.n_avg
                after, before = target(beside, times[index]), source(noisy, times[index])
                there, here = target.parts(after), source.parts(before)
                # In turn, so that equal velocities cancel term by term, exactly.
                pairs = zip_longest(there, here)
                parts = [
                    (sign * weight * share, v)
                    for pair in pairs
                    for sign, part in zip((1, -1), pair, strict=True)
                    if part is not None
                    for share, v in (part,)
                ]
                moved = linear_step(moved, [v for _, v in parts], [k for k, _ in parts])
            edit = moved
            setting.progress((index + 1 - first) / max(taken, 1))
        if last == steps:
            return target.combine(x1, 1.0, [], [(1.0, edit)]).model_input
        noisy = _noised(setting, source, x1, times[last], last * self.n_avg)
        state = target.combine(noisy.x, 1.0, [], [(1.0, edit)])
        for index in range(last, steps):
            velocity = target(state, times[index])
            state = target.advance(state.x, [(times[index + 1] - times[index], velocity)])
            setting.progress((index + 1 - first) / taken)
        return state.model_input


def _noised(setting: Setting, field: Field, x1: Tensor, t: float, key: int) -> State:
    """t x1 + (1 - t) n, the noise drawn in the kernel."""
    return field.combine(x1, t, [], noise=setting.noise(1 - t, key))
