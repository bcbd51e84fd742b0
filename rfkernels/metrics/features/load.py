"""Feature networks by name, and their features of many images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rfkernels.metrics.features.classifier import train_classifier
from rfkernels.metrics.features.efficientnet import EfficientNetLite0
from rfkernels.metrics.features.inception import Inception
from rfkernels.metrics.features.network import Pixels
from rfkernels.metrics.features.random_conv import RandomConv
from rfkernels.metrics.features.vgg import Vgg16

__all__ = ["FEATURES", "extract", "load_features"]

Features = Callable[[Tensor], Tensor]

FEATURES = (
    "pixels",
    "classifier",
    "efficientnet-lite0",
    "efficientnet-lite0:SIZE",
    "inception:PATH",
    "vgg16:PATH",
    "random-conv",
)


def load_features(
    name: str | Features,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Features:
    """The features of that name: a callable from (B, C, H, W) images in [-1, 1] to (B, D).

    ``pixels``: the numbers themselves, for points too. ``classifier``: a small network trained on
    images and labels. ``efficientnet-lite0``: ImageNet features, from the extra ``features``;
    a size such as ``efficientnet-lite0:96`` takes less time than its 224. ``inception:PATH``: FID's,
    from a file of weights that the user has; ``vgg16:PATH`` likewise. ``random-conv``: random
    filters of a seed.

    Args:
        name: one of `FEATURES`, or a callable, which is returned as it is.
        images, labels: training data, for ``classifier`` alone.
        seed: of ``classifier`` and ``random-conv``.
        cache: a folder where ``classifier`` keeps its weights.
        device: where the network goes.

    Raises:
        ValueError: an unknown name, or ``classifier`` without labels.
        ImportError, FileNotFoundError: weights that are not there.
    """
    if not isinstance(name, str):
        if not callable(name):
            raise TypeError(f"features: must be a name or a callable; got {type(name).__name__}")
        return name
    kind, colon, path = name.partition(":")
    network: nn.Module
    if name == "pixels":
        return Pixels()
    if name == "classifier":
        if images is None or labels is None or labels.is_floating_point():
            raise ValueError("features: classifier needs data with class labels; got none")
        network = train_classifier(images, labels, seed=seed, cache=cache)
    elif kind == "efficientnet-lite0" and (not colon or path.isdecimal()):
        network = EfficientNetLite0(int(path)) if colon else EfficientNetLite0()
    elif name == "random-conv":
        network = RandomConv(seed)
    elif kind == "inception" and colon and path:
        network = Inception(path)
    elif kind == "vgg16" and colon and path:
        network = Vgg16(path)
    else:
        raise ValueError(f"features: must be one of {', '.join(FEATURES)}; got {name!r}")
    return network if device is None else network.to(device)


@torch.no_grad()
def extract(features: Features, samples: Tensor, batch: int = 256) -> Tensor:
    """(n, D) features of (n, ...) samples on the CPU, `batch` of them at a time.

    Raises:
        ValueError: features that are no (B, D) for B samples.
    """
    if isinstance(features, Pixels):
        return features(samples.cpu())
    parts = []
    for part in samples.split(batch):
        found = features(part)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(part):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"features: must give one row per sample, ({len(part)}, D); got {got}")
        parts.append(found.cpu())
    return torch.cat(parts)
