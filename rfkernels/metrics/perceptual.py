"""A perceptual distance between images: differences of a fixed network's activations.

The form of LPIPS (Zhang et al. 2018): activations f of every layer are divided by their norm over
channels, and

    d(a, b) = 1/L sum over layers l of w_l mean over positions of sum over channels (fa - fb)^2.

Its weights w are one a layer, not learnt one a channel, so its values are not those of LPIPS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rfkernels.metrics.features import EfficientNetLite0, FeatureNetwork, Inception, RandomConv
from rfkernels.metrics.features.network import check_images, resized

__all__ = ["PerceptualDistance"]

# Under the root of the norm: keeps the gradient finite where all channels are 0.
_EPS = 1e-10

Layers = Callable[[Tensor], Any]


class PerceptualDistance(nn.Module):
    """``distance(prediction, target) -> (B,)`` for images (B, 1 or 3, H, W) in [-1, 1].

    Differentiable in both arguments, never negative, and exactly 0 for equal images, with a zero
    gradient there. As ``DistillConfig(distance=PerceptualDistance(...))`` it is the loss of a student.
    The network moves to the device of the images at the first call.

    Args:
        network: "efficientnet-lite0" (ImageNet, from the extra ``features``), "random-conv" (random
            filters, needs nothing, any size), "inception:PATH", a `FeatureNetwork`, or a callable
            from images to one tensor or a sequence of tensors (B, C, H, W).
        size: both images are resized to (size, size) first, bilinear. None keeps the network's own:
            224 for efficientnet-lite0, 299 for inception, the images' for the others.
        weights: one number >= 0 a layer; None takes 1 for all.
        pooling: "average" (smoother gradients than "max") where random-conv pools; None is
            "average". The other networks have pooling of their own.
        seed: of random-conv.

    Raises:
        ValueError: for an unknown network, or an option that it does not have.
        ImportError: efficientnet-lite0 without its packages.

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
        weights: Sequence[float] | None = None,
        pooling: Literal["average", "max"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if pooling is not None and network != "random-conv":
            raise ValueError(f"pooling: is an option of random-conv; got {pooling!r}")
        if weights is not None and (len(weights) == 0 or min(weights) < 0):
            raise ValueError(f"weights: must be numbers >= 0, one a layer; got {tuple(weights)}")
        if size is not None and size < 1:
            raise ValueError(f"size: must be at least 1; got {size}")
        # Of a network that is given; the others are made for their size.
        self.size = None if isinstance(network, str) else size
        self.weights = None if weights is None else tuple(float(w) for w in weights)
        own = {} if size is None else {"size": size}
        if network == "efficientnet-lite0":
            self.network: Any = EfficientNetLite0(**own)
        elif network == "random-conv":
            self.network = RandomConv(seed, size, pooling or "average")
        elif isinstance(network, str) and network.startswith("inception:"):
            self.network = Inception(network.partition(":")[2], **own)
        elif isinstance(network, str):
            raise ValueError(
                "network: must be efficientnet-lite0, random-conv, inception:PATH or a callable; "
                f"got {network!r}"
            )
        elif not callable(network):
            raise TypeError(f"network: must be a name or a callable; got {type(network).__name__}")
        else:
            self.network = network

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
        if isinstance(self.network, nn.Module):
            self.network.to(prediction.device)
        first, second = self._layers(prediction), self._layers(target)
        weights = self.weights or (1.0,) * len(first)
        if len(weights) != len(first):
            raise ValueError(f"weights: must be one a layer, {len(first)}; got {len(weights)}")
        total = prediction.new_zeros(len(prediction), dtype=torch.float32)
        for weight, a, b in zip(weights, first, second, strict=True):
            difference = _normalised(a) - _normalised(b)
            total = total + weight * difference.square().sum(1).mean((1, 2))
        return total / len(first)

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
