"""Distances by name, for recipes that compare end points: `perceptual:NETWORK`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

__all__ = ["NamedDistance", "resolve_distances"]

_PREFIX = "perceptual:"


@dataclass(frozen=True)
class NamedDistance:
    """rfkernels.metrics.PerceptualDistance by the name of its network, so that config.json says
    which distance it was and a run resumes without being told again.

    Args:
        name: "perceptual:efficientnet-lite0", "perceptual:random-conv", ...

    Raises:
        ValueError, ImportError: no such network, or its packages are not installed.
    """

    name: str

    def __post_init__(self) -> None:
        _ = self._distance  # what cannot be made is refused before a run begins

    @cached_property
    def _distance(self) -> torch.nn.Module:
        from rfkernels.metrics.perceptual import PerceptualDistance

        return PerceptualDistance(self.name.removeprefix(_PREFIX)).requires_grad_(False)

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._distance(prediction, target)


def resolve_distances(options: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options with the distances in place of their names; the names are strings that a
    user gave, or the descriptions in a run's config.json."""
    return {key: _resolved(value) for key, value in options.items()}


def _resolved(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_PREFIX):
        return NamedDistance(value)
    own = f"{NamedDistance.__module__}.{NamedDistance.__qualname__}"
    if isinstance(value, Mapping) and value.get("object") == own:
        return NamedDistance(value["name"])
    return value
