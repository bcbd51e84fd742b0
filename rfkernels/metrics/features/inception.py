"""The Inception-v3 whose last pooled layer FID is computed on (Szegedy et al. 2016; Heusel et al. 2017).

The graph is that of the 2015 TensorFlow weights: average pools in the blocks leave padding out of
the mean, and the last block pools by maximum. Layers carry torchvision's names, as the usual
conversions of those weights do: ``Conv2d_1a_3x3.conv.weight``, ``Conv2d_1a_3x3.bn.running_mean``,
..., ``Mixed_7c.branch_pool.bn.bias``. The classifier (``fc``, ``AuxLogits``) is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from rfkernels.metrics.features.network import FeatureNetwork, read_weights

__all__ = ["Inception"]


class _Convolution(nn.Module):
    """Convolution without bias, batch normalisation (eps 0.001), ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], **options) -> None:
        super().__init__()
        self.conv = skip_init(nn.Conv2d, inputs, outputs, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def _mean_pool(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _stretched(x: Tensor, axis: int, size: int) -> Tensor:
    """x interpolated along an axis at the positions 0, s, 2 s, ..., s = its length / size."""
    position = torch.arange(size, device=x.device) * (x.shape[axis] / size)
    low = position.long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    share = (position - low).to(x.dtype).view(-1, *[1] * (x.ndim - 1 - axis))
    a = x.index_select(axis, low)
    return a + (x.index_select(axis, high) - a) * share


class _Block(nn.Module):
    """Named convolutions, run in chains whose ends are joined along the channels."""

    chains: Sequence[Sequence[str]] = ()

    def _run(self, x: Tensor) -> list[Tensor]:
        ends = []
        for chain in self.chains:
            y = x
            for name in chain:
                y = getattr(self, name)(y)
            ends.append(y)
        return ends


class _A(_Block):
    chains = (
        ("branch1x1",),
        ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    )

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(inputs, 64, 1)
        self.branch5x5_1 = _Convolution(inputs, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*self._run(x), self.branch_pool(_mean_pool(x))], 1)


class _B(_Block):
    chains = (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*self._run(x), functional.max_pool2d(x, 3, stride=2)], 1)


class _C(_Block):
    chains = (
        ("branch1x1",),
        ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
        tuple(f"branch7x7dbl_{i}" for i in range(1, 6)),
    )

    def __init__(self, inputs: int, middle: int) -> None:
        super().__init__()
        wide, tall = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Convolution(inputs, 192, 1)
        self.branch7x7_1 = _Convolution(inputs, middle, 1)
        self.branch7x7_2 = _Convolution(middle, middle, **wide)
        self.branch7x7_3 = _Convolution(middle, 192, **tall)
        self.branch7x7dbl_1 = _Convolution(inputs, middle, 1)
        self.branch7x7dbl_2 = _Convolution(middle, middle, **tall)
        self.branch7x7dbl_3 = _Convolution(middle, middle, **wide)
        self.branch7x7dbl_4 = _Convolution(middle, middle, **tall)
        self.branch7x7dbl_5 = _Convolution(middle, 192, **wide)
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*self._run(x), self.branch_pool(_mean_pool(x))], 1)


class _D(_Block):
    chains = (
        ("branch3x3_1", "branch3x3_2"),
        tuple(f"branch7x7x3_{i}" for i in range(1, 5)),
    )

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(inputs, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(inputs, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*self._run(x), functional.max_pool2d(x, 3, stride=2)], 1)


class _E(_Block):
    chains = (
        ("branch1x1",),
        ("branch3x3_1", "branch3x3_2a"),
        ("branch3x3_1", "branch3x3_2b"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3b"),
    )

    def __init__(self, inputs: int, *, largest: bool) -> None:
        super().__init__()
        wide, tall = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.largest = largest
        self.branch1x1 = _Convolution(inputs, 320, 1)
        self.branch3x3_1 = _Convolution(inputs, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, **wide)
        self.branch3x3_2b = _Convolution(384, 384, **tall)
        self.branch3x3dbl_1 = _Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Convolution(384, 384, **wide)
        self.branch3x3dbl_3b = _Convolution(384, 384, **tall)
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        pool = functional.max_pool2d(x, 3, 1, 1) if self.largest else _mean_pool(x)
        return torch.cat([*self._run(x), self.branch_pool(pool)], 1)


class Inception(FeatureNetwork):
    """2048 features, the mean of the last block; five layers for distances.

    Pixels in [-1, 1] become (p - 128) / 128 with p = 127.5 (x + 1), not rounded to whole numbers.
    They are resized as TensorFlow 1 did it: bilinear, output pixel i at i times (input side / output
    side), which PyTorch's own resizing is not. So FIDs compare with those of the original graph.

    Args:
        weights: a .safetensors file, or a state dict that ``torch.load(weights_only=True)`` reads;
            None leaves weights of any value, to be loaded by ``load_state_dict``.
        size: images are resized to it; 299 is what FID means. At least 75.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a size too small, or weights of another network.
    """

    name = "inception"

    def __init__(self, weights: str | Path | None = None, size: int = 299) -> None:
        if size < 75:
            raise ValueError(f"inception: size must be at least 75; got {size}")
        super().__init__(size)
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c = _C(768, 128), _C(768, 160)
        self.Mixed_6d, self.Mixed_6e = _C(768, 160), _C(768, 192)
        self.Mixed_7a = _D(768)
        self.Mixed_7b, self.Mixed_7c = _E(1280, largest=False), _E(2048, largest=True)
        if weights is not None:
            self._load(weights)
        self.frozen()

    def resize(self, x: Tensor) -> Tensor:
        for axis in (2, 3):
            if x.shape[axis] != self.size:
                x = _stretched(x, axis, self.size)
        return x

    def layers_of(self, x: Tensor) -> list[Tensor]:
        x = (127.5 * x - 0.5) / 128
        x = first = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, stride=2))
        x = second = self.Conv2d_4a_3x3(x)
        x = third = self.Mixed_5d(
            self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, stride=2)))
        )
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = fourth = self.Mixed_6e(self.Mixed_6d(x))
        return [first, second, third, fourth, self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))]

    def _load(self, weights: str | Path) -> None:
        unused = ("fc.", "AuxLogits.")
        state = {
            name: value
            for name, value in read_weights(self.name, str(weights)).items()
            if not name.startswith(unused)
        }
        found = self.load_state_dict(state, strict=False)
        missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
        if missing or found.unexpected_keys:
            wrong = f"lacks {missing[0]}" if missing else f"has {found.unexpected_keys[0]}"
            raise ValueError(f"inception: {weights} holds another network's weights: it {wrong}")
