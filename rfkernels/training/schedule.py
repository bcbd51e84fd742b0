"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from rfkernels.training.config import TrainConfig

__all__ = ["learning_rate"]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of `step` (from 0): linear warm-up, then constant or half a cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    rest = max(config.steps - config.warmup_steps, 1)
    return (
        config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - config.warmup_steps) / rest))
    )
