"""What a recipe is: the options of one published method, and the objective they make.

A recipe supplies pairs, times, target and loss. Everything else (networks, data, pairs of a
teacher, the loop, checkpoints, resuming, processes) is `train_recipe` and what it calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from rfkernels.training.config import TrainConfig, check_pair_options, check_train
from rfkernels.training.objective import Objective, Setting

__all__ = ["PairRecipe", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A method that trains on a data set. Subclasses are frozen dataclasses with its options.

    Attributes:
        train: the loop's options, the same for every recipe.

    Class attributes:
        name: how the command and config.json call it.
        teacher: "none"; "start" (a network to start from, only); or "required" (evaluated while
            training, or to make the pairs).
        flow_map: whether the network takes `span`, (B,) float32: network(x, t, span=h) is the
            average velocity over [t, t + h], and x + h network(x, t, span=h) the state at t + h.
        sample_solver: what to sample the result with.
        learns_velocity: whether the network called without a span is the velocity, which other
            solvers integrate.
    """

    name: ClassVar[str]
    teacher: ClassVar[str] = "none"
    flow_map: ClassVar[bool] = False
    sample_solver: ClassVar[str] = "euler"
    learns_velocity: ClassVar[bool] = True

    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_train(self.train)

    @abstractmethod
    def objective(self, setting: Setting) -> Objective:
        """The samples, times, target and loss."""

    def check_network(self, network: nn.Module) -> None:  # noqa: B027 (most take any network)
        """Refuses a network that the recipe cannot train, before anything is written."""

    def probe(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """The keyword arguments, besides the condition, of a trial call of the network at (x,
        t)."""
        return {"span": torch.zeros_like(t)} if self.flow_map else {}


@dataclass(frozen=True, kw_only=True)
class PairRecipe(Recipe):
    """A method that trains on pairs (x0, x1) of a teacher's flow.

    Attributes:
        pairs: how many to make, where none are given.
        solver, pair_steps: how the teacher's ODE is solved; no steps (None) for an
            adaptive solver.
        pair_batch: samples solved at a time.
        guidance_scale: classifier-free guidance of the teacher while making pairs; None for none.
        train: the loop's options; its seed is also the one of the pairs.
    """

    teacher: ClassVar[str] = "required"

    pairs: int = 10_000
    solver: str = "heun"
    pair_steps: int | None = 20
    pair_batch: int = 1000
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pair_options(self)
