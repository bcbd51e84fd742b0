"""Schedulers for diffusers' pipelines, of which every update is one kernel call; see docs/diffusers.md.

Importing this imports nothing of diffusers; the classes do, when they are first asked for.
"""

from __future__ import annotations

import importlib

_WHERE = {
    "RFEulerScheduler": "euler",
    "RFFireFlowScheduler": "fireflow",
    "RFHeunScheduler": "heun",
    "RFMidpointScheduler": "midpoint",
    "RFMultistepScheduler": "multistep",
}
_PUBLIC = "rfkernels.integrations.diffusers"

__all__ = list(_WHERE)


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{name}: needs diffusers 0.35 or later; install it with: pip install "rfkernels[diffusers]"'
        ) from error
    cls = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    # A saved pipeline names this module, and loads the class from it.
    cls.__module__ = _PUBLIC
    return cls


def __dir__() -> list[str]:
    return sorted(__all__)
