"""diffusers: its models on `rf.attention`, and its networks as velocity fields.

    set_attention(model, precision="int8")   every attention layer of one model
    register_attention_backend()             then model.set_attention_backend("rfkernels")
    coverage()                               which models are covered, and how
    velocity_from_pretrained(folder)         a network as velocity(x, t, **condition), to train and sample
    allow_exchange(model)                    its attention features can be shared by rf.editing.edit
    edit(pipe, image, source, target)        training-free editing on a whole pipeline

    RFEulerScheduler, RFHeunScheduler, RFMidpointScheduler, RFFireFlowScheduler, RFMultistepScheduler
                                             pipe.scheduler = RF...Scheduler.from_config(pipe.scheduler.config)

Imports diffusers only when something needs it.
"""

from __future__ import annotations

from rfkernels.integrations.diffusers.attention import (
    attention_stats,
    register_attention_backend,
    reset_attention,
    set_attention,
)
from rfkernels.integrations.diffusers.coverage import Coverage, coverage
from rfkernels.integrations.diffusers.exchange import allow_exchange, forbid_exchange
from rfkernels.integrations.diffusers.schedulers import __all__ as _SCHEDULERS
from rfkernels.integrations.diffusers.velocity import (
    DiffusersNetwork,
    DiffusersVelocity,
    velocity_from_pretrained,
)

__all__ = [
    "Coverage",
    "DiffusersNetwork",
    "DiffusersVelocity",
    "allow_exchange",
    "attention_stats",
    "coverage",
    "forbid_exchange",
    "register_attention_backend",
    "reset_attention",
    "set_attention",
    "velocity_from_pretrained",
]


# Loaded when they are asked for: most uses need no editing.
_EDITING = ("PipelineEdit", "edit")


def __getattr__(name: str) -> object:
    if name in _EDITING:
        from rfkernels.integrations.diffusers import editing

        return getattr(editing, name)
    if name in _SCHEDULERS:
        from rfkernels.integrations.diffusers import schedulers

        return getattr(schedulers, name)
    # A pipeline that is loaded looks here for the base of its scheduler's class.
    if name == "SchedulerMixin":
        from diffusers import SchedulerMixin

        return SchedulerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_EDITING, *_SCHEDULERS])
