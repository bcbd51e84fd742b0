"""Names of the reference networks: build one from a name and options, describe one by them (for
config.json)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rfkernels.models.denoisers import (
    DenoiserVelocity,
    EDMVelocity,
    NetworkWrapper,
    VEVelocity,
    VPVelocity,
)
from rfkernels.models.diffusers_unet import DiffusersUNet
from rfkernels.models.dit import DiT
from rfkernels.models.mlp import MLPVelocity
from rfkernels.models.noise_prediction import NoisePrediction
from rfkernels.models.time_scaled import TimeScaled
from rfkernels.models.unet import UNet

__all__ = ["available", "build", "describe"]

_MODELS: dict[str, type[nn.Module]] = {
    "mlp": MLPVelocity,
    "dit": DiT,
    "unet": UNet,
    "diffusers-unet": DiffusersUNet,
}
# Networks around another network, which is the option `network`: a module, or its description.
_WRAPPERS: dict[str, type[NetworkWrapper]] = {
    "denoiser-velocity": DenoiserVelocity,
    "edm-velocity": EDMVelocity,
    "noise-prediction": NoisePrediction,
    "time-scaled": TimeScaled,
    "ve-velocity": VEVelocity,
    "vp-velocity": VPVelocity,
}


def available() -> tuple[str, ...]:
    """The names that `build` knows."""
    return (*_MODELS, *_WRAPPERS)


def build(name: str, *, seed: int | None = None, **options: Any) -> nn.Module:
    """A new network by name: "mlp", "dit", "unet", "diffusers-unet", or a wrapper of another
    network such as "edm-velocity".

    Args:
        name: which network.
        seed: the initial weights become a function of this seed and the caller's random state stays
            as it was; None draws them from torch's global generator.
        options: keyword arguments of the class, e.g. sample_shape=(1, 8, 8), width=384,
            num_classes=10; `network` of a wrapper may be what `describe` says of it.

    Raises:
        ValueError: unknown name, or an option that the network does not have.
    """
    if name not in available():
        raise ValueError(f"name: must be one of {', '.join(available())}; got {name!r}")
    cls = _MODELS.get(name) or _WRAPPERS[name]
    inner = options.get("network")
    if name in _WRAPPERS and isinstance(inner, Mapping):
        options["network"] = build(inner["name"], seed=seed, **inner["options"])
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        unknown = sorted(options.keys() - parameters.keys())
        if unknown:
            raise ValueError(
                f"{unknown[0]}: {name} has no such option; it has {', '.join(parameters)}"
            )
    missing = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and key not in options
    ]
    if missing:
        raise ValueError(f"{missing[0]}: {name} needs it; got {', '.join(options) or 'no options'}")
    for key in ("width", "depth", "patch", "blocks", "num_classes", "condition_dim"):
        value = options.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{key}: must be a whole number; got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{key}: must be at least 1; got {value}")
    if seed is None:
        return cls(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**options)


def describe(model: nn.Module) -> dict[str, Any] | None:
    """{"name": ..., "options": ...} such that build(name, **options) makes this architecture; None
    for others.

    A subclass of a reference network counts as other: its code is not this library's.
    """
    for name, cls in _MODELS.items():
        if type(model) is cls:
            return {"name": name, "options": dict(model.options)}
    for name, cls in _WRAPPERS.items():
        if type(model) is cls:
            options = {"network": describe(model.network), **model.options}
            # A network, or a schedule, of the user's own.
            return None if None in options.values() else {"name": name, "options": options}
    return None
