"""The explicit midpoint rule, which is RF-Solver of order 2, as a diffusers scheduler."""

from __future__ import annotations

import numpy as np
import torch

from rfkernels.integrations.diffusers.schedulers import updates
from rfkernels.integrations.diffusers.schedulers.base import FlowScheduler, SchedulerOutput
from rfkernels.integrations.diffusers.schedulers.kept import Kept
from rfkernels.integrations.diffusers.schedulers.layout import with_midpoints


class RFMidpointScheduler(FlowScheduler):
    """Second order, two calls of the network a step: x_mid = x + (h/2) v(x), then x + h v(x_mid).

    RF-Solver (Wang et al., "Taming rectified flow for inversion and editing", 2024) with its derivative taken over half a
    step, as in the released code, is this rule. `timesteps` is [t0, m0, t1, m1, ...], two entries a step, and `sigmas` has
    the levels of these calls and 0. `order` is 2, by which pipelines multiply steps to find entries, and 1 where `sigmas` or
    `timesteps` were given, since pipelines then count entries. A run may begin at any entry; at m_i by an Euler step to the
    end of that step.
    """

    order = 2

    def _restart(self) -> None:
        super()._restart()
        self._start: Kept | None = None  # the state at t_i while the call at m_i is awaited

    def _laid_out(self, levels: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return with_midpoints(levels, times, self._options["num_train_timesteps"])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The state at the next entry of `sigmas`.

        Args:
            model_output: the network's output at ``sample``, d x / d sigma.
            timestep: an entry of `timesteps`; looked up in the first step if no begin index is set, and then ignored.
            sample: what the step before returned. In the second half the state of the first half is stepped.
            generator: nothing is drawn; pipelines may pass it.
            return_dict: return an object with ``prev_sample``, else a tuple.

        Raises:
            ValueError: an integer timestep, or no `set_timesteps` yet.
            IndexError: a timestep that is not in the schedule, or a step after the last.
            RuntimeError: the first half's sample was written over.
        """
        index = self._stage(timestep)
        levels = self._sigmas.values()
        first = index % 2 == 0
        if first or self._start is None:
            state = updates.euler(sample, model_output, self._sigmas.steps()[index])
            self._start = Kept(sample) if first else None
        else:
            start = self._start.get(self)
            state = updates.euler(start, model_output, levels[index + 1] - levels[index - 1])
            self._start = None
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)
