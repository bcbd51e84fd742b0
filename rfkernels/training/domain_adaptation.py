"""Domain adaptation of a classifier by a flow between features (Liu, Gong, Liu, "Flow Straight and
Fast", 2023): the features of a new domain are carried to where the classifier was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import rfkernels.models as models
from rfkernels.sampling import sample
from rfkernels.training.config import TrainConfig
from rfkernels.training.train import train_flow
from rfkernels.training.trainer import RunResult

__all__ = ["FeatureAdapter", "adapt_features"]


@dataclass(frozen=True)
class FeatureAdapter:
    """Carries features of the new domain to the training domain: ``adapter(features)``.

    Attributes:
        velocity: the flow between features divided by `scale`, t = 0 the new domain, t = 1 the
            training domain.
        scale: what features are divided by.
        steps: equal Euler steps; the paper takes 100.
        run: the training; None for an adapter that was put together from a saved network.
    """

    velocity: Callable[..., torch.Tensor]
    scale: float
    steps: int = 100
    run: RunResult | None = None

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D) features of the new domain, as the classifier's last layer wants them."""
        weight = (
            next(self.velocity.parameters(), None) if isinstance(self.velocity, nn.Module) else None
        )
        start = features / self.scale
        if weight is not None:  # features of another precision are its caller's affair
            start = start.to(weight.dtype)
        return (sample(self.velocity, start, steps=self.steps) * self.scale).to(features.dtype)


def adapt_features(
    training_features: torch.Tensor,
    new_features: torch.Tensor,
    config: TrainConfig | None = None,
    *,
    model: nn.Module | None = None,
    steps: int = 100,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> FeatureAdapter:
    """Trains a flow from a new domain's features to those that a classifier was trained on.

    Neither set needs labels, and their rows need not correspond. The features are the inputs of
    the classifier's last layer; both sets are divided by the standard deviation of
    `training_features`, one number. Nothing ties a class of the new domain to the same class of the
    old one but its place, so the domains must be near each other: a shift that carries one class
    onto another cannot be undone without labels.

    Args:
        training_features: (N, D), of the domain the classifier knows; x1 of the flow.
        new_features: (M, D), of the domain to classify; x0 of the flow.
        config: a TrainConfig; None for 2000 steps of 128 samples, AdamW at 2e-3 with weight decay
            0.1 and coupling "ot". The paper pairs at random (coupling "independent") and takes
            AdamW at 1e-4, weight decay 0.1, batches of 16, 50,000 steps and the one-cycle schedule
            (schedule="cosine" with warmup_steps=15_000). On 8x8 digits of half the contrast both
            couplings repair the classifier; on digits turned by 25 degrees, further away, random
            pairs lowered its accuracy (0.51 -> 0.42) where minibatch transport raised it (0.64).
        model: the network to train; None for an MLPVelocity of width 256, seeded by config.seed.
        steps: of the adapter.
        run, resume, progress: as in `train_flow`.

    Returns:
        FeatureAdapter, with the averaged network. From a run folder it is
        ``FeatureAdapter(rfkernels.load(run).model, training_features.std().item())``.

    Raises:
        ValueError: features that are no (N, D) matrices of equal D, or do not vary. Otherwise as
        `train_flow`.
    """
    for name, value in (("training_features", training_features), ("new_features", new_features)):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{name}: must be a floating point tensor; got {got}")
        if value.dim() != 2 or value.shape[1] != training_features.shape[-1]:
            raise ValueError(
                f"{name}: must be (N, {training_features.shape[-1]}); got {tuple(value.shape)}"
            )
    scale = training_features.std().item()
    if not scale > 0:
        raise ValueError(f"training_features: must vary; got a standard deviation of {scale}")
    if config is None:
        config = TrainConfig(
            steps=2000, batch_size=128, learning_rate=2e-3, weight_decay=0.1, coupling="ot"
        )
    if model is None:
        shape = tuple(training_features.shape[1:])
        model = models.build("mlp", seed=config.seed, sample_shape=shape, width=256, depth=3)
        model = model.to(training_features.device)
    result = train_flow(
        model,
        training_features.detach() / scale,
        config,
        x0=new_features.detach() / scale,
        run=run,
        resume=resume,
        progress=progress,
    )
    return FeatureAdapter(result.ema, scale, steps, result)
