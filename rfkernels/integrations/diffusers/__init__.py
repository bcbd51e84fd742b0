"""diffusers: its models on `rf.attention`.

    set_attention(model, precision="int8")   every attention layer of one model
    register_attention_backend()             then model.set_attention_backend("rfkernels")
    coverage()                               which models are covered, and how

Imports diffusers only when a function needs it.
"""

from rfkernels.integrations.diffusers.attention import (
    attention_stats,
    register_attention_backend,
    reset_attention,
    set_attention,
)
from rfkernels.integrations.diffusers.coverage import Coverage, coverage

__all__ = [
    "Coverage",
    "attention_stats",
    "coverage",
    "register_attention_backend",
    "reset_attention",
    "set_attention",
]
