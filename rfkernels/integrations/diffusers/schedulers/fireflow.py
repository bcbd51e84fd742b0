"""FireFlow: second order at one call of the network a step, as a diffusers scheduler."""

from __future__ import annotations

import numpy as np
import torch

from rfkernels.integrations.diffusers.schedulers import updates
from rfkernels.integrations.diffusers.schedulers.base import FlowScheduler, SchedulerOutput
from rfkernels.integrations.diffusers.schedulers.kept import KeptOutput
from rfkernels.integrations.diffusers.schedulers.layout import midpoints


class RFFireFlowScheduler(FlowScheduler):
    """The midpoint rule with the output of the last midpoint in the place of the one at t_i; N + 1 calls for N steps.

    Deng et al., "FireFlow: fast inversion of rectified flow for image semantic editing", 2024: x_mid = x + (h/2) u,
    x <- x + h v(x_mid), u <- v(x_mid), where u = v(x) in the first step. Between two calls lie the end of one step and the
    midpoint of the next, which is one update of the midpoint state m,

        m_next = m + (h + h_next / 2) v - (h / 2) v_previous

    so `timesteps` is [t0, m0, m1, ..., m_{N-1}] and the samples between are states at midpoints. A run may begin at any
    entry: its first step then has v for v_previous.
    """

    def _restart(self) -> None:
        super()._restart()
        self._previous: KeptOutput | None = None  # the output of the last call

    def _laid_out(self, levels: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        middle, middle_times = midpoints(levels, times, self._options["num_train_timesteps"])
        return np.concatenate([levels[:1], middle, levels[-1:]]), np.append(times[:1], middle_times)

    def _half(self, index: int) -> float:
        """Half of the interval whose midpoint `sigmas` has at this entry: the ends of intervals follow from the first
        level and the midpoints."""
        levels = self._sigmas.values()
        start = levels[0]
        for middle in levels[1:index]:
            start = 2 * middle - start
        return levels[index] - start

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The state at the next midpoint; after the last call, at the end of the run.

        Args:
            model_output: the network's output at ``sample``, d x / d sigma; kept until the next call.
            timestep: an entry of `timesteps`; looked up in the first step if no begin index is set, and then ignored.
            sample: what the step before returned.
            generator: nothing is drawn; pipelines may pass it.
            return_dict: return an object with ``prev_sample``, else a tuple.

        Raises:
            ValueError: an integer timestep, or no `set_timesteps` yet.
            IndexError: a timestep that is not in the schedule, or a step after the last.
            RuntimeError: the network wrote its output over the last one.
        """
        index = self._stage(timestep)
        step, previous = self._sigmas.steps()[index], self._previous
        if previous is None or index == 0:
            state = updates.euler(sample, model_output, step)
        else:
            half, outputs = self._half(index), (model_output, previous.get(self, model_output))
            state = updates.linear(sample, outputs, (step + half, -half), dtype=model_output.dtype)
        self._previous = KeptOutput(model_output)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)
