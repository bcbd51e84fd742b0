"""Multistep rules in flow form as one diffusers scheduler: AB2, DPM-Solver++ and UniPC, one kernel call a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from rfkernels.integrations.diffusers.schedulers import updates
from rfkernels.integrations.diffusers.schedulers.base import FlowScheduler, SchedulerOutput
from rfkernels.integrations.diffusers.schedulers.config import (
    DPM,
    FLOW_MATCH,
    KINDS,
    UNIPC,
    solver,
)
from rfkernels.integrations.diffusers.schedulers.kept import Kept, KeptOutput
from rfkernels.sampling import multistep as rules
from rfkernels.sampling.constant import constant

AB2 = "ab2"
ALGORITHMS = (AB2, DPM, UNIPC)
_MAX_ORDER = 3
# What diffusers' multistep schedulers have besides; None where a config has no such field.
_TAKEN = {
    "predict_x0": (True, None),
    "solver_p": (None,),
    "algorithm_type": ("dpmsolver++", "deis", "data_prediction", None),
}


class RFMultistepScheduler(FlowScheduler):
    """Second order or higher at one call of the network a step, from outputs that were kept.

    ========= =================================================================================
    algorithm step
    ========= =================================================================================
    "ab2"     Adams-Bashforth in sigma, x + h (1 + r/2) v - (h r/2) v_previous, r = h / h_previous
    "dpm++"   DPM-Solver++ multistep, orders 1 to 3 (Lu et al. 2022)
    "unipc"   UniPC, predictor and corrector in one update, orders 1 to 3 (Zhao et al. 2023)
    ========= =================================================================================

    The last two are diffusers' `DPMSolverMultistepScheduler` and `UniPCMultistepScheduler` with ``use_flow_sigmas``, whose
    configs `from_config` takes with solver and grid. The network is given exact times; theirs are cut off to integers
    (``integer_timesteps=True`` brings that back), which stops their error from falling below 1e-3 of the result.

    Those two integrate in log((1 - sigma) / sigma). The last interval of FlowMatch's default grid before the one to 0 is a
    long one there, and they lose much of their order on it: give them their own, ``grid="unipc"`` or ``"dpm++"``. "ab2" is
    at home on every grid.

    Args:
        algorithm: see the table; `from_config` takes that of a multistep config.
        solver_order: of "dpm++" and "unipc", 1 to 3; "ab2" is of order 2.
        solver_type: "midpoint" or "heun" for "dpm++", "bh2" or "bh1" for "unipc"; None is the first of the two. "ab2"
            only keeps it, for the way back.
        lower_order_final: lower the order of the last steps: of "unipc" always, of "dpm++" in runs of under 15 steps.
        euler_at_final: end "dpm++" by a step of order 1.
        disable_corrector: steps of "unipc" after which the corrector rests.

    The other arguments are those of the base class. diffusers' attributes ``init_noise_sigma`` and `add_noise` are here
    because multistep schedulers have them.
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        grid: str = FLOW_MATCH,
        single_shift: bool = False,
        explicit_timesteps: str = "keep",
        final_sigmas_type: str = "zero",
        integer_timesteps: bool = False,
        bit_exact: bool = False,
        algorithm: str = AB2,
        solver_order: int = 2,
        solver_type: str | None = None,
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        disable_corrector: list[int] | tuple[int, ...] = (),
    ) -> None:
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"RFMultistepScheduler: algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}"
            )
        if not 1 <= solver_order <= _MAX_ORDER:
            raise ValueError(
                f"RFMultistepScheduler: solver_order must be 1 to 3; got {solver_order!r}"
            )
        if solver_type is None:
            # For "ab2", too: diffusers' schedulers read no None.
            self.register_to_config(solver_type=KINDS.get(algorithm, KINDS[DPM])[0])
        elif algorithm != AB2 and solver_type not in KINDS[algorithm]:
            raise ValueError(
                f"RFMultistepScheduler: solver_type of {algorithm!r} must be one of {KINDS[algorithm]}; "
                f"got {solver_type!r}"
            )
        if invert_sigmas and algorithm != AB2:
            raise ValueError(
                f"RFMultistepScheduler: invert_sigmas needs algorithm='ab2'; got {algorithm!r}"
            )
        self._begin()

    @classmethod
    def _checked(cls, config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        if (
            "algorithm" not in config
            and "use_flow_sigmas" in config
            and config["grid"] != FLOW_MATCH
        ):
            config |= solver(config)
        algorithm = config.get("algorithm", AB2)
        if overrides.get("algorithm", algorithm) != algorithm:
            known = KINDS.get(overrides["algorithm"])
            if known is not None and config.get("solver_type") not in known:
                config.pop("solver_type", None)
            return config
        for field, allowed in _TAKEN.items():
            if config.get(field) not in allowed:
                raise ValueError(
                    f"{cls.__name__}: config.{field} must be one of {allowed}; got {config[field]!r}"
                )
        return config

    def _restart(self) -> None:
        super()._restart()
        # Of past calls, the newest first: the index, the state ("ab2" needs none) and the network's output there.
        self._past: list[tuple[int, Kept | None, KeptOutput]] = []
        self._order = 0  # of the last step

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The state at the next level.

        Args:
            model_output: the network's output at ``sample``, d x / d sigma; kept for the coming steps.
            timestep: an entry of `timesteps`; looked up in the first step if no begin index is set, and then ignored.
            sample: what the step before returned; "dpm++" and "unipc" keep it as well.
            generator: nothing is drawn; pipelines may pass it.
            return_dict: return an object with ``prev_sample``, else a tuple.

        Raises:
            ValueError: an integer timestep where times are not integers, or no `set_timesteps` yet.
            IndexError: a timestep that is not in the schedule, or a step after the last.
            RuntimeError: an output or a sample that is kept was written over.
        """
        index = self._stage(timestep)
        past = self._past
        outputs = [model_output, *(output.get(self, model_output) for _, _, output in past)]
        levels = self._sigmas.values()
        config = self._options
        if config["algorithm"] == AB2:
            steps = self._sigmas.steps()
            coefficients = rules.ab2(steps[index], steps[index - 1] if past else None)
            state = updates.linear(
                sample, outputs[: len(coefficients)], coefficients, dtype=model_output.dtype
            )
            self._past = [(index, None, KeptOutput(model_output))]
        else:
            state = self._data_step(index, levels, sample, outputs)
            keep = config["solver_order"] - (config["algorithm"] == DPM)
            if keep:
                self._past = [(index, Kept(sample), KeptOutput(model_output)), *past][:keep]
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)

    def _data_step(
        self, index: int, levels: list[float], sample: torch.Tensor, outputs: list[torch.Tensor]
    ) -> torch.Tensor:
        """A step of "dpm++" or "unipc": coefficients of m = x - sigma v, spelt out in x and v, and one sum."""
        config = self._options
        kind = config["solver_type"]
        order = self._step_order(index)
        past = [(constant(levels[i]), state.get(self)) for i, state, _ in self._past]
        sigmas = [constant(levels[i]) for i in (index + 1, index)] + [level for level, _ in past]
        if config["algorithm"] == DPM:
            of_state, *weights = rules.dpm(sigmas, order, kind)
        else:
            corrects = self._past and index - 1 not in config["disable_corrector"]
            predicted = self._order if corrects else 0
            of_state, *weights = rules.unipc(sigmas, order, kind, predicted=predicted)
        self._order = order
        of_state += weights[0]
        tensors, coefficients = outputs[:1], [-sigmas[1] * weights[0]]
        for (level, state), old, weight in zip(past, outputs[1:], weights[1:], strict=False):
            tensors += [state, old]
            coefficients += [weight, -level * weight]
        dtype = sample.dtype
        if config["algorithm"] == DPM:  # whose result is of the data estimate's dtype
            dtype = torch.promote_types(dtype, outputs[0].dtype)
        return updates.linear(sample, tensors, coefficients, of_state, dtype=dtype)

    def _step_order(self, index: int) -> int:
        """As many outputs as there are, fewer at the end where the config says so."""
        config = self._options
        count = len(self._sigmas.values()) - 1
        left = count - index
        order = min(config["solver_order"], len(self._past) + 1)
        if config["algorithm"] == UNIPC:
            return min(order, left) if config["lower_order_final"] else order
        lowered = config["lower_order_final"] and count < rules.FEW_STEPS
        if left == 1 and (
            lowered or config["euler_at_final"] or config["final_sigmas_type"] == "zero"
        ):
            return 1
        return min(order, 2) if left == 2 and lowered else order

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """`scale_noise` under the name and order of arguments that multistep schedulers have."""
        return self.scale_noise(original_samples, timesteps, noise)
