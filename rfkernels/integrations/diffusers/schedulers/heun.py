"""Heun's rule: diffusers' FlowMatchHeunDiscreteScheduler with every way to lay out a schedule, one kernel call a stage."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from rfkernels.integrations.diffusers.schedulers import updates
from rfkernels.integrations.diffusers.schedulers.base import FlowScheduler, SchedulerOutput
from rfkernels.integrations.diffusers.schedulers.kept import Kept, KeptOutput

_MAX_CHURN = 2**0.5 - 1


class RFHeunScheduler(FlowScheduler):
    """Second order, two calls a step: x_end = x + h v(x), then x + (h/2) (v(x) + v(x_end)); the last step is Euler's.

    `timesteps` is [t0, t1, t1, t2, t2, ...], 2 N - 1 entries for N steps; a run may begin at any entry, and at the first of
    two for one level the first call changes nothing. `order` is as in `RFMidpointScheduler`. diffusers' own scheduler takes
    no sigmas, mu or timesteps.
    """

    order = 2

    def _restart(self) -> None:
        super()._restart()
        # Of the first call: its sample and output, the output's share, the step, noise and its strength.
        self._first: tuple[Kept, KeptOutput, float, float, torch.Tensor | None, float] | None = None

    def _laid_out(self, levels: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inner = np.repeat(levels[1:-1], 2)
        return np.concatenate([levels[:1], inner, levels[-1:]]), np.append(
            times[:1], times[1:].repeat(2)
        )

    @property
    def state_in_first_order(self) -> bool:
        """Whether the coming call is a step's first."""
        return self._first is None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The Euler step's end, or the end of Heun's step.

        Args:
            model_output: the network's output at ``sample``, d x / d sigma; that of the first call is kept for the second.
            timestep: an entry of `timesteps`; looked up in the first step if no begin index is set, and then ignored.
            sample: what the step before returned. In the second half the state of the first half is stepped.
            s_churn: how much noise is added first, raising the level to sigma (1 + min(s_churn / (entries of sigmas - 1),
                sqrt(2) - 1)); of Karras et al., 2022, algorithm 2.
            s_tmin, s_tmax: only at levels between these.
            s_noise: scales that noise.
            generator: of the noise.
            return_dict: return an object with ``prev_sample``, else a tuple.

        Raises:
            ValueError: an integer timestep, or no `set_timesteps` yet.
            IndexError: a timestep that is not in the schedule, or a step after the last.
            RuntimeError: the first output or sample was written over.
        """
        index = self._stage(timestep)
        levels = self._sigmas.values()
        first = index % 2 == 0
        level, after = (
            (levels[index], levels[index + 1]) if first else (levels[index - 1], levels[index])
        )
        gamma = min(s_churn / (len(levels) - 1), _MAX_CHURN) if s_tmin <= level <= s_tmax else 0.0
        noise = None
        if gamma > 0:
            # Drawn in second calls too, where nothing is done with it: a generator stays in step with diffusers'.
            noise = randn_tensor(
                model_output.shape,
                generator=generator,
                device=model_output.device,
                dtype=model_output.dtype,
            )
        if first:
            step = after - level * (1 + gamma)
            share = step / (1 + gamma)  # diffusers divides the output by the raised level
            strength = s_noise * level * (gamma * (2 + gamma)) ** 0.5 if gamma > 0 else 0.0
            state = _moved(sample, (model_output,), (share,), noise, strength)
            self._first = (Kept(sample), KeptOutput(model_output), share, step, noise, strength)
        elif self._first is None:  # the run begins here; the level comes again, so the step is 0
            state = updates.euler(sample, model_output, self._sigmas.steps()[index])
        else:
            kept, output, share, step, noise, strength = self._first
            outputs = (output.get(self, model_output), model_output)
            state = _moved(kept.get(self), outputs, (share / 2, step / 2), noise, strength)
            self._first = None
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)


def _moved(sample, outputs, steps, noise, strength) -> torch.Tensor:
    """sample + the outputs' shares + strength * noise, in the outputs' dtype."""
    dtype = outputs[-1].dtype
    if noise is not None:
        outputs, steps = (*outputs, noise), (*steps, strength)
    elif len(outputs) == 1:
        return updates.euler(sample, *outputs, *steps)
    return updates.linear(sample, outputs, steps, dtype=dtype)
