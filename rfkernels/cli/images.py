"""The images that `rfkernels invert` and `rfkernels edit` are given, in the shape of a run's samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from rfkernels.data.dataset import Data

__all__ = ["check_labels", "first_rows", "open_images"]


def open_images(source: str, shape: tuple[int, ...]) -> Data:
    """A folder of images, resized to the run's; a file of arrays; or a data set by its name.

    Raises:
        ValueError: samples of another shape.
    """
    from rfkernels.data import as_dataset, load_dataset

    images = Path(source).is_dir() and len(shape) == 3
    size = {"image_size": shape[-1], "channels": shape[0]} if images else {}
    data = as_dataset(load_dataset(source, **size))
    if tuple(data.sample_shape) != tuple(shape):
        raise ValueError(
            f"in: samples must have the run's shape, {shape}; got {tuple(data.sample_shape)}"
        )
    return data


def check_labels(data: Data, index: torch.Tensor, option: str, classes: int) -> None:
    """For the images ``index``, which go by their own labels, since ``option`` gave none.

    Raises:
        ValueError: there are none, or others than the run's.
    """
    if not data.has_labels:
        raise ValueError(f"{option}: must be given for images without labels; got None")
    found = getattr(data, "num_classes", None)
    if found is None or found <= classes:
        return
    # The set has others; these images may not.
    greatest = max(int(data.rows(rows).labels.max()) for rows in index.split(256))
    if greatest >= classes:
        raise ValueError(
            f"{option}: must be given for images with labels beyond the run's, 0 to {classes - 1}; "
            f"got the label {greatest}"
        )


def first_rows(data: Data, source: str, n: int | None) -> torch.Tensor:
    """(n,) numbers of the first n images; None is all.

    Raises:
        ValueError: all of a set that has no end.
    """
    import torch

    if data.size is None and n is None:
        raise ValueError(f"n: must be given for {source}, which has no end; got None")
    return torch.arange(data.size if n is None else min(n, data.size or n))
