"""A perceptual distance between images: differences of a fixed network's activations.

The form of LPIPS (Zhang et al. 2018): activations f of every layer l are divided by their norm over
the channels c, and

    d(a, b) = sum over l of the mean over positions of the sum over c of w_lc (fa - fb)^2.

By default all w are 1 / (number of layers). With VGG-16 and LPIPS's own weights, from files that the
user has, d is LPIPS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rfkernels.metrics.features import (
    EfficientNetLite0,
    FeatureNetwork,
    Inception,
    RandomConv,
    Vgg16,
)
from rfkernels.metrics.features.network import check_images, read_weights, resized

__all__ = ["PerceptualDistance"]

# Under the root of the norm: keeps the gradient finite where all channels are 0.
_EPS = 1e-10

Layers = Callable[[Tensor], Any]


class PerceptualDistance(nn.Module):
    """``distance(prediction, target) -> (B,)`` for images (B, 1 or 3, H, W) in [-1, 1].

    Differentiable in both arguments, never negative, and exactly 0 for equal images, with a zero
    gradient there. As ``DistillConfig(distance=PerceptualDistance(...))`` it is the loss of a
    student. The network moves to the device of the images at the first call.

    Args:
        network: "efficientnet-lite0" (ImageNet, from the extra ``features``), "random-conv" (random
            filters, needs nothing, any size), "vgg16:PATH", "inception:PATH", a `FeatureNetwork`, or
            a callable from images to one tensor or a sequence of tensors (B, C, H, W).
        size: both images are resized to (size, size) first, bilinear. None keeps the network's own:
            224 for efficientnet-lite0, 299 for inception, the images' for the others.
        weights: w, one number >= 0 a layer; or a file of LPIPS's linear layers
            (``lin0.model.1.weight`` ...), one number a channel; None takes 1 / (number of layers).
        pooling: "average" (smoother gradients) or "max" where random-conv and vgg16 pool; None is
            "average". LPIPS has "max". The other networks have pooling of their own.
        seed: of random-conv.

    Raises:
        ValueError: for an unknown network, or an option that it does not have.
        ImportError: efficientnet-lite0 without its packages.
        FileNotFoundError: weights that are not there.

    Example:
        >>> distance = PerceptualDistance("random-conv")
        >>> x = torch.zeros(2, 1, 8, 8)
        >>> distance(x, x)
        tensor([0., 0.])
    """

    def __init__(
        self,
        network: str | FeatureNetwork | Layers = "efficientnet-lite0",
        *,
        size: int | None = None,
        weights: Sequence[float] | str | Path | None = None,
        pooling: Literal["average", "max"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        kind, _, path = network.partition(":") if isinstance(network, str) else ("", "", "")
        if pooling is not None and kind not in ("random-conv", "vgg16"):
            raise ValueError(f"pooling: is an option of random-conv and vgg16; got {pooling!r}")
        if size is not None and size < 1:
            raise ValueError(f"size: must be at least 1; got {size}")
        # Of a network that is given; the others are made for their size.
        self.size = None if isinstance(network, str) else size
        own = {} if size is None else {"size": size}
        if network == "efficientnet-lite0":
            self.network: Any = EfficientNetLite0(**own)
        elif network == "random-conv":
            self.network = RandomConv(seed, size, pooling or "average")
        elif kind == "vgg16" and path:
            self.network = Vgg16(path, size, pooling or "average")
        elif kind == "inception" and path:
            self.network = Inception(path, **own)
        elif isinstance(network, str):
            raise ValueError(
                "network: must be efficientnet-lite0, random-conv, vgg16:PATH, inception:PATH or a "
                f"callable; got {network!r}"
            )
        elif not callable(network):
            raise TypeError(f"network: must be a name or a callable; got {type(network).__name__}")
        else:
            self.network = network
        self.weights = None
        if weights is not None:
            self.weights = nn.ParameterList(_columns(weights)).requires_grad_(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B,) float32 distances of images (B, 1 or 3, H, W).

        Raises:
            TypeError, ValueError: for tensors that are no images, or of different shapes.
        """
        check_images("prediction", prediction)
        if not isinstance(target, Tensor) or target.shape != prediction.shape:
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(
                f"target: must have the shape of prediction, {tuple(prediction.shape)}; got {got}"
            )
        self.to(prediction.device)
        first, second = self._layers(prediction), self._layers(target)
        weights = [1 / len(first)] * len(first) if self.weights is None else list(self.weights)
        if len(weights) != len(first):
            raise ValueError(f"weights: must be one a layer, {len(first)}; got {len(weights)}")
        total = prediction.new_zeros(len(prediction), dtype=torch.float32)
        for weight, a, b in zip(weights, first, second, strict=True):
            difference = (_normalised(a) - _normalised(b)).square()
            total = total + (weight * difference).sum(1).mean((1, 2))
        return total

    def _layers(self, images: Tensor) -> list[Tensor]:
        x = resized(images.float(), self.size)
        if isinstance(self.network, FeatureNetwork):
            return self.network.layers(x)
        found = self.network(x)
        layers = [found] if isinstance(found, Tensor) else list(found)
        if not layers or any(layer.ndim != 4 for layer in layers):
            shapes = [tuple(layer.shape) for layer in layers]
            raise ValueError(f"network: must give tensors (B, C, H, W); got {shapes}")
        return layers


def _normalised(layer: Tensor) -> Tensor:
    """Activations (B, C, H, W) divided by their norm over the channels."""
    layer = layer.float()
    return layer * (layer.square().sum(1, keepdim=True) + _EPS).rsqrt()


def _columns(weights: Sequence[float] | str | Path) -> list[Tensor]:
    """Weights that multiply (B, C, H, W): 0-d, or (1, C, 1, 1) from a file of LPIPS."""
    if not isinstance(weights, (str, Path)):
        if len(weights) == 0 or min(weights) < 0:
            raise ValueError(f"weights: must be numbers >= 0, one a layer; got {tuple(weights)}")
        return [torch.tensor(float(w)) for w in weights]
    state = read_weights("weights", str(weights))
    found = []
    while (name := f"lin{len(found)}.model.1.weight") in state:
        found.append(state[name])
    if not found or any(w.ndim != 4 or w.shape[1] != w.numel() for w in found):
        raise ValueError(f"weights: {weights} must hold lin0.model.1.weight (1, C, 1, 1) and so on")
    return found
