"""Features of a small convolutional classifier trained on the data's own labels.

For data that networks trained on photographs say little about, such as digits. Its numbers compare
runs on the same data with the same seed, and nothing else.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from rfkernels.data.dataset import epoch_order
from rfkernels.metrics.features.network import FeatureNetwork, check_images, read_weights
from rfkernels.ops.random import derive_seed, randn

__all__ = ["Classifier", "train_classifier"]

_LARGEST = 64  # the side that larger images are resized to
_STEPS, _BATCH, _LEARNING_RATE = 600, 128, 2e-3


class Classifier(FeatureNetwork):
    """3x3 convolutions with ReLU, halved until a side is at most 2; 128 features (64 below 5 pixels).

    Args:
        channels: of the images, 1 or 3.
        size: their side, at least 3.
        classes: number of labels.
        seed: of the first weights.
    """

    name = "classifier"

    def __init__(self, channels: int, size: int, classes: int, seed: int = 0) -> None:
        super().__init__(size)
        self.channels = channels
        widths = [32]
        while size > 2:
            size = (size + 1) // 2
            widths.append(min(2 * widths[-1], 128))
        pairs = zip([channels, *widths], widths, strict=False)
        self.convolutions = nn.ModuleList(
            skip_init(nn.Conv2d, a, b, 3, stride=1 if i == 0 else 2, padding=1)
            for i, (a, b) in enumerate(pairs)
        )
        self.head = skip_init(nn.Linear, widths[-1], classes)
        for i, layer in enumerate([*self.convolutions, self.head]):
            scale = math.sqrt(2 / layer.weight[0].numel())
            key = derive_seed(seed, f"classifier {i}")
            layer.weight.data = scale * randn(*layer.weight.shape, seed=key)
            layer.bias.data.zero_()

    def layers_of(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.convolutions:
            x = functional.relu(layer(x))
            found.append(x)
        return found

    def logits(self, images: Tensor) -> Tensor:
        """(B, classes)."""
        return self.head(self(images))


def train_classifier(
    images: Tensor, labels: Tensor, *, seed: int = 0, cache: str | Path | None = None
) -> Classifier:
    """A classifier of these images: 600 steps of Adam on batches of 128, the rate falling to 0.

    The result is a function of the images, the labels and the seed (on one machine and thread
    count). Seconds for digits of 8x8.

    Args:
        images: (N, 1 or 3, H, H) in [-1, 1], larger than 64 pixels resized to that.
        labels: (N,) int64 class labels.
        seed: of the weights and of the order of the images.
        cache: a folder that keeps the weights, as ``classifier-<hash>.safetensors``, the hash that
            of images, labels and seed; None trains anew.

    Raises:
        TypeError, ValueError: images that are none, or labels that are no class labels.
    """
    from rfkernels.training.files import tensors_sha256, write_tensors

    check_images("classifier", images)
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise TypeError("classifier: labels must be an integer tensor of class labels")
    if labels.shape != (len(images),) or len(images) == 0:
        raise ValueError(
            f"classifier: labels must have the shape ({len(images)},), one per image; got "
            f"{tuple(labels.shape)}"
        )
    classes = int(labels.max()) + 1
    if classes < 2 or int(labels.min()) < 0:
        raise ValueError("classifier: labels must name at least two classes, counted from 0")
    model = Classifier(images.shape[1], min(max(images.shape[2:]), _LARGEST), classes, seed)
    file = None
    if cache is not None:
        told = {"x": images, "labels": labels, "seed": torch.tensor([seed, _STEPS])}
        file = Path(cache) / f"classifier-{tensors_sha256(told)[:16]}.safetensors"
        if file.is_file():
            model.load_state_dict(read_weights("classifier", str(file)))
            return model.frozen()
    _fit(model, images.detach(), labels.long(), derive_seed(seed, "classifier order"))
    model.frozen()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, model.state_dict())
    return model


@torch.enable_grad()
def _fit(model: Classifier, images: Tensor, labels: Tensor, seed: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    step = epoch = 0
    while step < _STEPS:
        order = epoch_order(len(images), seed=seed, epoch=epoch)
        epoch += 1
        for rows in order.split(_BATCH)[: _STEPS - step]:
            loss = functional.cross_entropy(model.logits(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            step += 1
