"""diffusers' `UNet2DModel` behind this library's call velocity(x, t, y); needs the extra
`diffusers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rfkernels.models.embeddings import refuse_condition

__all__ = ["DiffusersUNet"]


class DiffusersUNet(nn.Module):
    """A `diffusers.UNet2DModel` built from its own options, called as velocity(x, t, y=None).

    Args:
        sample_shape: (C, H, W).
        num_classes: class labels 0..num_classes-1, num_classes being the null label; None for
            unconditional.
        options: keyword arguments of `UNet2DModel`, except sample_size, in_channels, out_channels
            and num_class_embeds, which follow from the two above.

    `forward(x, t, y=None)`: t (B,) in [0, 1] (0 = source, 1 = data) reaches the network as 1000 t.

    Raises:
        ImportError: diffusers is not installed.
    """

    def __init__(
        self, sample_shape: Sequence[int], num_classes: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ImportError(
                "DiffusersUNet: needs diffusers; install it with: pip install "
                '"rfkernels[diffusers]"'
            ) from error
        self.sample_shape = tuple(int(n) for n in sample_shape)
        if len(self.sample_shape) != 3:
            raise ValueError(
                f"sample_shape: DiffusersUNet takes (channels, height, width); got "
                f"{self.sample_shape}"
            )
        derived = {
            "sample_size",
            "in_channels",
            "out_channels",
            "num_class_embeds",
        } & options.keys()
        if derived:
            raise ValueError(
                f"{sorted(derived)[0]}: follows from sample_shape and num_classes; do not give it"
            )
        if "flow_map" in options:
            raise ValueError(
                "flow_map: DiffusersUNet is a velocity, since UNet2DModel has no second time; use "
                "mlp, dit or unet"
            )
        channels, height, width = self.sample_shape
        self.options = {
            "sample_shape": list(self.sample_shape),
            "num_classes": num_classes,
            **options,
        }
        self.null_label = num_classes
        self.unet = UNet2DModel(
            sample_size=(height, width),
            in_channels=channels,
            out_channels=channels,
            num_class_embeds=None if num_classes is None else num_classes + 1,
            **options,
        )

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.null_label is None:
            refuse_condition(y, "this DiffusersUNet")
        elif y is None:
            y = torch.full((len(x),), self.null_label, dtype=torch.int64, device=x.device)
        return self.unet(x, t * 1000.0, class_labels=y).sample
