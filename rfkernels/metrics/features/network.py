"""The frame of a feature network: images in [-1, 1] are checked, resized and handed to its layers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FeatureNetwork", "Pixels", "check_images", "read_weights", "resized"]

# Numbers per sample that pixels are averaged down to: the Frechet distance takes the cube of it.
_MOST_NUMBERS = 1024


def check_images(owner: str, images: Tensor) -> None:
    """Refuses what is no batch of images (B, 1 or 3, H, W).

    Raises:
        TypeError: for something that is no floating point tensor.
        ValueError: for another shape.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{owner}: images must be a tensor; got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"{owner}: images must be floating point in [-1, 1]; got {images.dtype}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(
            f"{owner}: images must have the shape (B, 1 or 3, H, W); got {tuple(images.shape)}"
        )


def resized(images: Tensor, size: int | None) -> Tensor:
    """Bilinear resize (half-pixel centres, no antialiasing) to (size, size); None leaves them."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)


class FeatureNetwork(nn.Module):
    """A fixed network: images (B, 1 or 3, H, W) in [-1, 1] -> features (B, D).

    It stays in evaluation mode and takes no gradient of its own; gradients flow to the images.
    Subclasses define `layers_of`, and `features_of` where the features are not the spatial mean of
    the last layer.

    Attributes:
        name: what tables and cached files call it.
        size: images are resized to (size, size), bilinear; None takes them as they are.
        channels: what the network takes; one grey channel is repeated where it takes three.
    """

    name = "features"
    channels = 3

    def __init__(self, size: int | None) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"{self.name}: size must be at least 1; got {size}")
        self.size = size

    def train(self, _mode: bool = True) -> FeatureNetwork:
        """Stays in evaluation mode: running statistics must not follow the samples."""
        return super().train(False)

    def frozen(self) -> FeatureNetwork:
        """Itself, in evaluation mode and without gradients of its weights."""
        return self.eval().requires_grad_(False)

    def layers(self, images: Tensor) -> list[Tensor]:
        """The activations that a perceptual distance compares, (B, C_l, H_l, W_l) each."""
        return self.layers_of(self._prepared(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.features_of(self._prepared(images))

    def resize(self, x: Tensor) -> Tensor:
        """Images at the network's size."""
        return resized(x, self.size)

    def layers_of(self, x: Tensor) -> list[Tensor]:
        """As `layers`, of prepared images."""
        raise NotImplementedError

    def features_of(self, x: Tensor) -> Tensor:
        """(B, D) features of prepared images."""
        return self.layers_of(x)[-1].mean((2, 3))

    def _prepared(self, images: Tensor) -> Tensor:
        check_images(self.name, images)
        weight = next((w for w in self.parameters() if w.is_floating_point()), images)
        x = self.resize(images.to(weight.device, weight.dtype))
        if x.shape[1] == self.channels:
            return x
        if self.channels != 3:
            raise ValueError(
                f"{self.name}: images must have {self.channels} channels; got {x.shape[1]}"
            )
        return x.expand(-1, 3, -1, -1)


class Pixels(nn.Module):
    """The numbers of a sample themselves, (B, ...) -> (B, D).

    Images of more than 1024 numbers are averaged over squares of pixels, down to at most that many.
    """

    name = "pixels"
    size = None

    def forward(self, x: Tensor) -> Tensor:
        factor = 1
        while x.ndim == 4 and x[0].numel() > _MOST_NUMBERS * factor**2:
            factor += 1
        return (x if factor == 1 else functional.avg_pool2d(x, factor)).flatten(1)


def read_weights(owner: str, file: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a state dict read with ``weights_only=True``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds anything else than named tensors.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # every reader has kinds of its own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{owner}: {path} is no file of weights ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{owner}: {path} must hold a state dict of tensors")
    return dict(state)
