"""diffusers: its models on `rf.attention`, and its networks as velocity fields.

    set_attention(model, precision="int8")   every attention layer of one model
    register_attention_backend()             then model.set_attention_backend("rfkernels")
    coverage()                               which models are covered, and how
    velocity_from_pretrained(folder)         a network as velocity(x, t, **condition), to train and sample

Imports diffusers only when a function needs it.
"""

from rfkernels.integrations.diffusers.attention import (
    attention_stats,
    register_attention_backend,
    reset_attention,
    set_attention,
)
from rfkernels.integrations.diffusers.coverage import Coverage, coverage
from rfkernels.integrations.diffusers.velocity import (
    DiffusersNetwork,
    DiffusersVelocity,
    velocity_from_pretrained,
)

__all__ = [
    "Coverage",
    "DiffusersNetwork",
    "DiffusersVelocity",
    "attention_stats",
    "coverage",
    "register_attention_backend",
    "reset_attention",
    "set_attention",
    "velocity_from_pretrained",
]
