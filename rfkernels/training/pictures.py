"""Samples drawn while training: safetensors at each chosen step, PNG where Pillow is."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from rfkernels.ops.random import derive_seed, randn
from rfkernels.sampling import sample
from rfkernels.training.config import TrainConfig
from rfkernels.training.files import write_tensors
from rfkernels.training.sources import Source

__all__ = ["Pictures", "image_grid"]

COUNT = 64


class Pictures:
    """Writes `folder`/step-N.safetensors (and .png for images) from 64 starts that never change.

    Args:
        folder: where they go.
        sample_shape: shape of one sample.
        config: seed and steps.
        solver: what the run is sampled with.
        source: where the run's samples come from: the starts of a flow between data sets, and
            condition vectors, are its held-out ones, or its first where none are held out.
        num_classes: labels are these in turn; None for a run without.
        device: where to compute.
    """

    def __init__(
        self,
        folder: Path,
        sample_shape: tuple[int, ...],
        config: TrainConfig,
        *,
        solver: str,
        source: Source | None,
        num_classes: int | None,
        device: torch.device,
    ) -> None:
        self._folder, self._steps, self._solver = folder, config.sample_steps, solver
        shown = None if source is None else source.held_out() or source.draw(0, COUNT)
        if shown is not None and shown.x0 is not None:
            self._start = shown.x0[:COUNT]
        else:
            seed = derive_seed(config.seed, "samples")
            self._start = randn(COUNT, *sample_shape, seed=seed, device=device)
        count, self._condition = len(self._start), {}
        if num_classes is not None:
            self._condition["y"] = torch.arange(count, device=device) % num_classes
        elif shown is not None and shown.condition:
            count = min(count, len(shown.x1))
            self._start = self._start[:count]
            self._condition = {name: value[:count] for name, value in shown.condition.items()}

    @torch.no_grad()
    def __call__(self, velocity: nn.Module, step: int) -> None:
        x = sample(
            velocity,
            self._start,
            steps=self._steps,
            solver=self._solver,
            condition=self._condition,
        ).cpu()
        self._folder.mkdir(exist_ok=True)
        write_tensors(self._folder / f"step-{step}.safetensors", {"x": x})
        grid = image_grid(x)
        if grid is None:
            return
        try:
            from PIL import Image
        except ImportError:
            return  # the samples themselves are there
        Image.fromarray(grid.numpy()).save(self._folder / f"step-{step}.png")


def image_grid(x: torch.Tensor) -> torch.Tensor | None:
    """Images in [-1, 1], (N, C, H, W) with C 1 or 3, as one uint8 picture (rows * H, columns * W[,
    3]), nearly square.

    None for samples that are no images.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        return None
    columns = math.ceil(math.sqrt(len(x)))
    rows = math.ceil(len(x) / columns)
    count, channels, height, width = x.shape
    padded = torch.full((rows * columns, channels, height, width), -1.0, device=x.device)
    padded[:count] = x
    pixels = ((padded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = pixels.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = picture.reshape(rows * height, columns * width, channels)
    return (picture[..., 0] if channels == 1 else picture).contiguous()
