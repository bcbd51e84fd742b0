"""The convolutions of VGG-16 (Simonyan, Zisserman 2015), from weights that the user has: LPIPS is a distance on them.

Layers carry torchvision's names, ``features.0.weight`` to ``features.28.bias``; the classifier is
not used. Images are scaled as LPIPS scales them, close to ImageNet's mean and deviation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from rfkernels.metrics.features.network import FeatureNetwork, read_weights
from rfkernels.metrics.features.random_conv import POOLINGS

__all__ = ["Vgg16"]

# (place in torchvision's sequence, inputs, outputs) of the convolutions between two poolings.
_STAGES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
_SMALLEST = 16  # four poolings
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Vgg16(FeatureNetwork):
    """512 features, the spatial mean of the last layer; five layers, the last before each pooling.

    Args:
        weights: a .safetensors file, or a state dict that ``torch.load(weights_only=True)`` reads;
            None leaves weights of any value, to be loaded by ``load_state_dict``.
        size: images are resized to it first, bilinear; None leaves them. At least 16.
        pooling: "max" as trained and as LPIPS has it, or "average", whose gradients are smoother and
            which 2-rectified flow++ trains with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights of another network, or an unknown pooling.
    """

    name = "vgg16"

    def __init__(
        self,
        weights: str | Path | None = None,
        size: int | None = None,
        pooling: Literal["average", "max"] = "max",
    ) -> None:
        super().__init__(size)
        if pooling not in POOLINGS:
            raise ValueError(f"vgg16: pooling must be average or max; got {pooling!r}")
        self.pooling = pooling
        self.features = nn.ModuleDict(
            {
                str(place): skip_init(nn.Conv2d, a, b, 3, padding=1)
                for stage in _STAGES
                for place, a, b in stage
            }
        )
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            column = torch.tensor(values).view(1, 3, 1, 1)
            self.register_buffer(name, column, persistent=False)
        if weights is not None:
            self.load_state_dict(_of_this_network(self, weights))
        self.frozen()

    def layers_of(self, x: Tensor) -> list[Tensor]:
        if min(x.shape[2:]) < _SMALLEST:
            height, width = x.shape[2:]
            raise ValueError(
                f"vgg16: images must have at least {_SMALLEST} pixels a side; got {height} by {width}"
            )
        x = (x - self.shift) / self.scale
        found: list[Tensor] = []
        for stage in _STAGES:
            if found:
                x = POOLINGS[self.pooling](x, 2)
            for place, _, _ in stage:
                x = functional.relu(self.features[str(place)](x))
            found.append(x)
        return found


def _of_this_network(network: Vgg16, weights: str | Path) -> dict[str, Tensor]:
    state = read_weights(network.name, str(weights))
    wanted = network.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    for name in (*wanted, *state):
        if name not in state or name not in wanted or state[name].shape != wanted[name].shape:
            raise ValueError(
                f"vgg16: {weights} holds another network's weights: {name} is not the same"
            )
    return state
