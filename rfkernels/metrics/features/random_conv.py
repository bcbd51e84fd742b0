"""A small convolutional network with random weights that are a function of a seed: needs no file,
works on images of any size, and is the same everywhere.

Features of random filters rank noise, blur and shifts sensibly, though not as people do.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from rfkernels.metrics.features.network import FeatureNetwork
from rfkernels.ops.random import derive_seed, randn

__all__ = ["POOLINGS", "RandomConv"]

POOLINGS = {"average": functional.avg_pool2d, "max": functional.max_pool2d}
_SLOPE = 0.2
_SMALLEST = 4  # the side below which a layer is not pooled further


class RandomConv(FeatureNetwork):
    """Three 3x3 convolutions of 16, 32 and 64 filters, leaky ReLU, halved in between.

    Weights are normals of standard deviation sqrt(2 / (1 + 0.04) / fan-in) (He et al. 2015), biases
    0.1 times a normal. The first layer keeps the size and has a bias and no dead units, so that
    images that differ have activations that differ in direction too, almost surely: a distance of
    normalised activations is zero for equal images only.

    Args:
        seed: of the weights.
        size: images are resized to it first; None leaves them.
        pooling: "average" or "max" of 2x2, while a side has at least 8 pixels.
    """

    name = "random-conv"

    def __init__(
        self,
        seed: int = 0,
        size: int | None = None,
        pooling: Literal["average", "max"] = "average",
    ) -> None:
        super().__init__(size)
        if pooling not in POOLINGS:
            raise ValueError(f"random-conv: pooling must be average or max; got {pooling!r}")
        self.pooling = pooling
        self.convolutions = nn.ModuleList(
            skip_init(nn.Conv2d, a, b, 3, padding=1) for a, b in ((3, 16), (16, 32), (32, 64))
        )
        for i, layer in enumerate(self.convolutions):
            fan_in = layer.weight[0].numel()
            scale = math.sqrt(2 / (1 + _SLOPE**2) / fan_in)
            key = derive_seed(seed, f"random-conv {i}")
            layer.weight.data = scale * randn(*layer.weight.shape, seed=key)
            layer.bias.data = 0.1 * randn(*layer.bias.shape, seed=key, offset=1)
        self.frozen()

    def layers_of(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for layer in self.convolutions:
            if found and min(x.shape[2:]) >= 2 * _SMALLEST:
                x = POOLINGS[self.pooling](x, 2)
            x = functional.leaky_relu(layer(x), _SLOPE)
            found.append(x)
        return found
