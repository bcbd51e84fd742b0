"""What all our diffusers schedulers share: config, noise levels and times, the place in the run, noise for a sample.

The attributes and methods are those of diffusers' FlowMatchEulerDiscreteScheduler, and so are the numbers. sigma is
diffusers' time (1 noise, 0 data, sigma = 1 - t) and a model's output is d x / d sigma = -velocity. Levels and times are kept
on the host as well, so that no step reads a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils import logging

from rfkernels.integrations.diffusers.schedulers import grid as grids
from rfkernels.integrations.diffusers.schedulers import noising
from rfkernels.integrations.diffusers.schedulers.config import (
    DPM,
    FINAL_SIGMAS,
    FLOW_MATCH,
    GRIDS,
    UNIPC,
)
from rfkernels.integrations.diffusers.schedulers.from_config import FlowConfig
from rfkernels.integrations.diffusers.schedulers.host_copy import Levels, TimeTable

SchedulerOutput = FlowMatchEulerDiscreteSchedulerOutput
_RESAMPLINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_CHOICES = {
    "time_shift_type": ("exponential", "linear"),
    "grid": GRIDS,
    "explicit_timesteps": ("keep", "shift"),
    "final_sigmas_type": FINAL_SIGMAS,
}
_NOT_ON = {  # options that a grid would pass over
    FLOW_MATCH: (),
    UNIPC: ("invert_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    DPM: ("invert_sigmas", "shift_terminal", *_RESAMPLINGS),
}
logger = logging.get_logger(f"diffusers.{__name__}")  # so that diffusers' verbosity governs it


class FlowScheduler(FlowConfig):
    """Base of the schedulers; a subclass defines `step` and, if it evaluates elsewhere than on the grid, `_laid_out`.

    The first fourteen fields are diffusers' own, in its order and with its defaults.

    Args:
        num_train_timesteps: the network's time at sigma = 1, and the length of the table that training draws from.
        shift: static shift of the levels, s sigma / (1 + (s - 1) sigma).
        use_dynamic_shifting: shift by e^mu instead, mu given to `set_timesteps`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: read by pipelines, which compute mu from them.
        invert_sigmas: the run ascends from 0 to 1 (Mochi).
        shift_terminal: stretch the levels so that the last one is this.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: at most one; resample between the ends.
        time_shift_type: of the dynamic shift, "exponential" or "linear".
        stochastic_sampling: draw fresh noise in every step; RFEulerScheduler alone.
        grid: which scheduler's default levels: "flow-match", "unipc" or "dpm++" (in flow form). `from_config` sets it.
        single_shift: with a static shift, diffusers shifts the default levels twice, because the ends it lays them
            between are shifted already; True shifts once. Only the grid "flow-match" has this.
        explicit_timesteps: what times without sigmas mean: "keep" uses them as they are while the levels are shifted
            (diffusers 0.42), "shift" replaces them by the shifted sigma * num_train_timesteps (0.40).
        final_sigmas_type: where the grid "unipc" ends: "zero", or "sigma_min", its last level once more.
        integer_timesteps: times cut off to int64, as diffusers' multistep schedulers have them; the network is then
            told a time up to 1 / num_train_timesteps away from the sample's.
        bit_exact: round like diffusers in every dtype: Euler's steps and `scale_noise`. Without it, float32 steps are equal
            to diffusers' to the bit where nothing is drawn, and 16-bit ones are rounded once, where diffusers rounds the
            step size, its product and the sum.

    Raises:
        ValueError: unknown or contradictory options.
        ImportError: beta sigmas without SciPy.
    """

    order = 1
    _stochastic = False  # whether the class knows stochastic_sampling

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
    ) -> None:
        self._begin()

    def _begin(self) -> None:
        """Checks the config and lays out the table of num_train_timesteps levels."""
        self._check_options()
        config = self._options
        count, shift = config["num_train_timesteps"], config["shift"]
        levels = torch.arange(count, 0, -1, dtype=torch.float32, device="cpu") / count
        if not config["use_dynamic_shifting"]:
            levels = shift * levels / (1 + (shift - 1) * levels)
        self.set_shift(shift)
        self.num_inference_steps: int | None = None
        self.sigmas = levels
        self.timesteps = levels * count
        self.sigma_min, self.sigma_max = levels[-1].item(), levels[0].item()
        self._restart()

    def _check_options(self) -> None:
        """Refuses options that are unknown or contradict each other."""
        config, name = self._options, type(self).__name__
        if config["use_beta_sigmas"]:
            try:
                import scipy.stats  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    f"{name}: use_beta_sigmas needs SciPy; pip install scipy"
                ) from error
        asked = [flag for flag in _RESAMPLINGS if config[flag]]
        if len(asked) > 1:
            raise ValueError(
                f"{name}: at most one of {', '.join(_RESAMPLINGS)} may be set; got {asked}"
            )
        for field, allowed in _CHOICES.items():
            if config[field] not in allowed:
                raise ValueError(
                    f"{name}: {field} must be one of {', '.join(allowed)}; got {config[field]!r}"
                )
        for field in _NOT_ON[config["grid"]]:
            if config[field]:
                raise ValueError(f"{name}: {field} needs grid='flow-match'; got {config['grid']!r}")
        if config["grid"] == DPM and (
            config["final_sigmas_type"] != "zero"
            or (config["use_dynamic_shifting"] and config["time_shift_type"] != "exponential")
        ):
            fields = "final_sigmas_type", "time_shift_type"
            got = ", ".join(repr(config[field]) for field in fields)
            raise ValueError(
                f"{name}: grid='dpm++' ends at zero and shifts exponentially; got {got}"
            )
        if config["stochastic_sampling"] and not self._stochastic:
            raise ValueError(
                f"{name}: stochastic_sampling must be False (RFEulerScheduler has it); got True"
            )

    def _restart(self) -> None:
        """Forgets where the run was; subclasses forget what they kept of it."""
        self._step_index: int | None = None
        self._begin_index: int | None = None

    # Where the run is

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels, one more than there are steps; on the device given to `set_timesteps`. May be assigned."""
        return self._sigmas.tensor

    @sigmas.setter
    def sigmas(self, levels: torch.Tensor) -> None:
        self._sigmas = Levels(levels)

    @property
    def timesteps(self) -> torch.Tensor:
        """The network's times, one for every call of `step`. May be assigned."""
        return self._times.tensor

    @timesteps.setter
    def timesteps(self, times: torch.Tensor) -> None:
        self._times = TimeTable(times)

    @property
    def shift(self) -> float:
        """The static shift in force; on a multistep scheduler's grid `config.flow_shift` counts, if it was edited since."""
        flow_shift, grid = self._options.get("flow_shift"), self._options["grid"]
        return self._shift if grid == FLOW_MATCH or flow_shift == self._flow_shift else flow_shift

    def set_shift(self, shift: float) -> None:
        """Sets the static shift of the next `set_timesteps`; the ends of the default grid stay as constructed."""
        self._shift, self._flow_shift = shift, self._options.get("flow_shift")

    @property
    def step_index(self) -> int | None:
        """How many steps were taken from the start of the schedule; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the first step is, when the pipeline said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says where the first step is; without it the first `step` looks its timestep up."""
        self._begin_index = begin_index

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """Where a time stands in the schedule: the second place if there are several, so that a run that starts within
        the schedule skips no level. A time that is off by rounding is found (254 for 254.00002).

        An entry of `timesteps` itself is found without reading the device.

        Raises:
            IndexError: no such time.
        """
        table = self._times if schedule_timesteps is None else TimeTable(schedule_timesteps)
        return table.find(timestep, self._options["num_train_timesteps"])

    def _now(self, timestep: float | torch.Tensor) -> int:
        """The index of this step; later calls ignore the time, as in diffusers."""
        if not (isinstance(timestep, torch.Tensor) and timestep.is_floating_point()):
            self._refuse_index(timestep)
        index = self._step_index
        if index is None:
            begin = self._begin_index
            index = self._found(timestep) if begin is None else begin
        return index

    def _found(self, timestep: float | torch.Tensor) -> int:
        """Where a run begins that says so by its first time. Of times cut off to integers neighbours may be equal: then
        the first place at which a step begins."""
        index = self.index_for_timestep(timestep)
        if self._options["integer_timesteps"]:
            times = self._times.values()
            starts = range(0, len(times), type(self).order)
            same = (i for i in starts if times[i] == times[index])
            index = next(same, index)
        return index

    def _stage(self, timestep: float | torch.Tensor) -> int:
        """`_now` for the classes that lay out calls of their own, which the table of the constructor does not."""
        if self.num_inference_steps is None:
            raise ValueError(
                f"{type(self).__name__}.step: set_timesteps must come first; got no schedule"
            )
        if self._step_index is None:  # users' loops set it so to begin anew without set_timesteps
            begin = self._begin_index
            self._restart()
            self._begin_index = begin
        index, calls = self._now(timestep), len(self._times.values())
        if index >= calls:
            raise IndexError(
                f"{type(self).__name__}.step: the run has {calls} calls; got another one"
            )
        return index

    def _refuse_index(self, timestep: object) -> None:
        """The integers that diffusers refuses, unless this schedule's times are integers."""
        index = isinstance(timestep, int) or (
            isinstance(timestep, torch.Tensor)
            and timestep.dtype in (torch.int64, torch.int32)
            and timestep.is_cpu
        )
        if index and not self._options["integer_timesteps"]:
            raise ValueError(
                f"{type(self).__name__}.step: timestep must be an entry of timesteps, not its index; "
                f"got {timestep!r}"
            )

    # The schedule

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """Levels t under the dynamic shift: e^mu / (e^mu + (1/t - 1)^sigma), or mu for e^mu when linear."""
        return grids.time_shift(self._options["time_shift_type"], mu, sigma, t)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Levels t with 1 - t scaled so that the last one is ``shift_terminal``."""
        return grids.stretch_to_terminal(t, self._options["shift_terminal"])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lays out a run: levels, shifted as the config says, and the network's times.

        Args:
            num_inference_steps: intervals of the run; may be left out where sigmas or timesteps say it.
            device: where `sigmas` and `timesteps` go.
            sigmas: levels before the shift.
            mu: of the dynamic shift.
            timesteps: the network's times, see ``explicit_timesteps``; not for second-order layouts' midpoints, which
                are made here.

        Raises:
            ValueError: lengths that differ, no mu for a dynamic shift, or timesteps with a grid that has none.
            TypeError: nothing given.
        """
        config, name = self._options, type(self).__name__
        if config["use_dynamic_shifting"] and mu is None and config["grid"] in (FLOW_MATCH, UNIPC):
            raise ValueError(
                f"{name}.set_timesteps: mu must be given with use_dynamic_shifting; got None"
            )
        if timesteps is not None and config["grid"] != FLOW_MATCH:
            raise ValueError(
                f"{name}.set_timesteps: timesteps need grid='flow-match'; got grid={config['grid']!r}"
            )
        if sigmas is None and timesteps is None and num_inference_steps is None:
            raise TypeError(
                f"{name}.set_timesteps: one of num_inference_steps, sigmas and timesteps must be given; got none"
            )
        lengths = {
            "num_inference_steps": num_inference_steps,
            "sigmas": None if sigmas is None else len(sigmas),
            "timesteps": None if timesteps is None else len(timesteps),
        }
        lengths = {key: length for key, length in lengths.items() if length is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{name}.set_timesteps: lengths must agree; got {lengths}")
        if timesteps is not None and sigmas is None and config["explicit_timesteps"] == "keep":
            logger.warning(
                "timesteps without sigmas: the times are used as given, the levels made of them are shifted; "
                "give sigmas too, or construct with explicit_timesteps='shift'"
            )
        self.num_inference_steps = next(iter(lengths.values()))
        levels, times = grids.build(
            dict(config),
            self.shift,
            (self.sigma_max, self.sigma_min),
            self.num_inference_steps,
            sigmas=sigmas,
            mu=mu,
            timesteps=timesteps,
        )
        levels, times = self._laid_out(levels, times)
        self._sigmas = Levels(torch.from_numpy(levels).to(device=device), levels)
        self._times = TimeTable(torch.from_numpy(times).to(device=device), times)
        # Pipelines multiply steps by it to find their entry (image to image), and where they gave levels or times they take
        # the entries for the steps.
        given = sigmas is not None or timesteps is not None
        self.order = 1 if given else type(self).order
        self._restart()

    def _laid_out(self, levels: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(levels, times) of the calls of the network, from those of the grid; one call a step by default."""
        return levels, times

    # Noise

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """sigma * noise + (1 - sigma) * sample, one kernel call for the whole batch.

        Args:
            sample: data (B, ...).
            timestep: (B,) or (1,) times of the schedule, on any device. They count only while no begin index is set;
                else the level of the coming step, or of the begin index, is used for all.
            noise: like sample.

        Returns:
            In the wider dtype of the two. The levels are not rounded to it first, unless ``bit_exact``.

        Raises:
            AttributeError: timestep is no tensor (diffusers raises this too).
            TypeError: no noise.
            IndexError: a time that is not in the schedule. Times on an accelerator are not read, so there the samples of
                unknown times become NaN.
        """
        if not isinstance(timestep, torch.Tensor):
            raise AttributeError(
                f"{type(self).__name__}.scale_noise: timestep must be a tensor; got {type(timestep).__name__}"
            )
        if not isinstance(noise, torch.Tensor):
            raise TypeError(
                f"{type(self).__name__}.scale_noise: noise must be a tensor; got {type(noise).__name__}"
            )
        config = self._options
        if self._begin_index is None:
            level = self._times.levels(timestep, self._sigmas, config["num_train_timesteps"])
        else:
            index = self._begin_index if self._step_index is None else self._step_index
            level = self._sigmas.values()[index]
        return noising.mixed(sample, noise, level, bit_exact=config["bit_exact"])

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sample: flows need no scaling. Bria's pipeline asks it of every scheduler but diffusers' own."""
        return sample

    def __len__(self) -> int:
        return self._options["num_train_timesteps"]
