"""Schedulers from the configs of other schedulers: what `config` says, in diffusers' way of loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict

from rfkernels.integrations.diffusers.schedulers.config import COMPATIBLE, OURS, adapted


class FlowConfig(FlowMatchEulerDiscreteScheduler):
    """A scheduler with `from_config` for every scheduler of flows.

    diffusers' own is the base because some pipelines ask whether theirs is one (Bria, EasyAnimate); all that it does is done
    anew.
    """

    _compatibles: ClassVar[list[str]] = list(COMPATIBLE)

    @property
    def _options(self) -> dict[str, Any]:
        """The config's attributes, which is where diffusers' schedulers read it: `scheduler.config.field = value` counts."""
        return vars(self._internal_dict)

    @classmethod
    def from_config(
        cls,
        config: FrozenDict | dict[str, Any] = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A scheduler from the config of another one of flows: ours, the FlowMatch family, or UniPC, DPM-Solver++, DEIS
        and SA-Solver with ``use_flow_sigmas``; their ``flow_shift`` is ``shift`` here and may be given by either name.

        Fields of that config, too, may be given by keyword.

        Raises:
            ValueError: a config of a diffusion schedule, or with an option that has no counterpart here.
        """
        config = kwargs.pop("pretrained_model_name_or_path", config)  # diffusers' old name
        if config is not None and not isinstance(config, Mapping):
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        if config is not None:
            if "flow_shift" in kwargs:
                given = kwargs.pop("flow_shift")
                if kwargs.setdefault("shift", given) != given:
                    raise ValueError(
                        f"{cls.__name__}: shift and flow_shift are one value; "
                        f"got {kwargs['shift']!r} and {given!r}"
                    )
            changed = {key: kwargs[key] for key in kwargs if key in config and key not in OURS}
            config = cls._checked(adapted(cls.__name__, {**config, **changed}), kwargs)
            for key in changed.keys() - cls._get_init_keys(cls):
                del kwargs[key]
            if "shift" in kwargs and "flow_shift" in config:
                config["flow_shift"] = kwargs["shift"]  # for the way back
            config.setdefault("_class_name", cls.__name__)  # so that it is known whose it is
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        scheduler.set_shift(scheduler.config.shift)  # edits of flow_shift count from here
        return made

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """Whose fields may stand in a config; for `compatibles` and to keep diffusers from warning of them."""
        from rfkernels.integrations.diffusers import schedulers

        own = [getattr(schedulers, name) for name in schedulers.__all__]
        return [*super()._get_compatibles(), *own]

    @classmethod
    def _checked(cls, config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        """A subclass refuses here what it cannot do."""
        return config
