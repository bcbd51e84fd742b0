"""Euler steps: diffusers' FlowMatchEulerDiscreteScheduler, one kernel call a step."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

import rfkernels as rf
from rfkernels.integrations.diffusers.schedulers import updates
from rfkernels.integrations.diffusers.schedulers.base import FlowScheduler, SchedulerOutput

_BELOW = 1e-6  # a token's next level lies at least this far below its own


class RFEulerScheduler(FlowScheduler):
    """First order: sample + (sigma_next - sigma) * output. One call of the network a step.

    Config and schedule are those of the base class. It alone has ``stochastic_sampling`` and times of their own for the
    tokens of a sample.
    """

    _stochastic = True

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
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The sample at the next level.

        With ``stochastic_sampling``: x0 = sample - sigma * output, then (1 - sigma_next) * x0 + sigma_next * noise, in one
        call, within two units in the last place of diffusers' separate operations (equal with ``bit_exact``).

        Args:
            model_output: the network's output, d x / d sigma.
            timestep: an entry of `timesteps`; looked up in the first step if no begin index is set, and then ignored.
            sample: the state, of the same shape.
            s_churn, s_tmin, s_tmax, s_noise: have no effect, here as in diffusers' scheduler.
            generator: of the noise of ``stochastic_sampling``.
            per_token_timesteps: (B, T) times for a sample (B, T, C): every token goes from its own level to the next lower
                one of the schedule, by a *positive* step, sigma - sigma_next. So the caller passes minus the network's
                output, as diffusers' LTX pipelines do. The result is float32.
            return_dict: return an object with ``prev_sample``, else a tuple.

        Raises:
            ValueError: an integer timestep, or shapes that do not fit.
            IndexError: a timestep that is not in the schedule, or a step after the last.
        """
        index = self._step_index
        if index is None or not isinstance(timestep, torch.Tensor):
            index = self._now(timestep)
        elif not timestep.is_floating_point():
            self._refuse_index(timestep)
        config = self._internal_dict.__dict__  # `_options`, without a call
        if per_token_timesteps is not None:
            state = self._token_step(model_output, sample, per_token_timesteps, generator)
        elif config["stochastic_sampling"]:
            state = self._noisy_step(model_output, sample, index, generator)
        else:
            step = self._sigmas.steps()[index]
            if config["bit_exact"]:
                state = updates.euler_as_diffusers(sample, model_output, step)
            elif sample.dtype is model_output.dtype:
                state = rf.euler_step(sample, model_output, step)
            else:
                state = updates.euler(sample, model_output, step)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)

    def _noisy_step(self, output, sample, index, generator) -> torch.Tensor:
        levels = self._sigmas.values()
        level, after = levels[index], levels[index + 1]
        noise = self._noise(sample, generator)
        if self._options["bit_exact"]:
            clean = sample.float() - output * updates.rounded(level, output.dtype)
            return ((1.0 - np.float32(after)).item() * clean + after * noise).to(output.dtype)
        kept = 1.0 - after
        return updates.linear(
            sample, (output, noise), (-kept * level, after), kept, dtype=output.dtype
        )

    def _noise(self, sample, generator) -> torch.Tensor:
        return randn_tensor(
            sample.shape, generator=generator, device=sample.device, dtype=torch.float32
        )

    def _token_step(self, output, sample, times, generator) -> torch.Tensor:
        if sample.ndim != 3 or times.ndim != 2:
            raise ValueError(
                "RFEulerScheduler.step: per_token_timesteps must be (B, T) for a sample (B, T, C); "
                f"got {tuple(times.shape)} for {tuple(sample.shape)}"
            )
        # All on the device; the levels number some dozens, so the table of comparisons is small.
        config = self._options
        level = times / config["num_train_timesteps"]
        levels = self.sigmas.to(level.device)[:, None, None]
        after = ((levels < level[None] - _BELOW) * levels).amax(dim=0)
        noise = self._noise(sample, generator) if config["stochastic_sampling"] else None
        if config["bit_exact"]:
            level, after = level[..., None], after[..., None]
            if noise is None:
                return sample.float() + (level - after) * output
            return (1.0 - after) * (sample.float() - level * output) + after * noise
        level, after = (t.expand(sample.shape[:2]).reshape(-1) for t in (level, after))
        dtype = torch.promote_types(output.dtype, torch.float32)
        rows, outputs = sample.flatten(0, 1).to(dtype), output.flatten(0, 1)
        if noise is None:
            state = updates.linear(rows, (outputs,), (level - after,), dtype=dtype)
        else:
            kept, noises = 1.0 - after, noise.flatten(0, 1)
            state = updates.linear(
                rows, (outputs, noises), (-kept * level, after), kept, dtype=dtype
            )
        return state.view(sample.shape)
