"""Folders of images: decoded when they are read, so that a set may be larger than memory."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from rfkernels.data.dataset import Dataset, Rows, epoch_order
from rfkernels.data.decode import (
    IMAGE_SUFFIXES,
    as_samples,
    check_image_options,
    decode_image,
    import_pillow,
)
from rfkernels.ops.random import derive_seed, rand

__all__ = ["ImageFolder", "load_image_folder"]

_IN_MEMORY = 2 << 30  # bytes of float32 below which a folder is held in memory
_THREADS = 4


class ImageFolder:
    """The images below a folder, in the order of their paths; only the paths are held in memory.

    An image is turned as its EXIF tag says, laid on white where it is transparent, cropped in the
    middle to a square and resized: (channels, image_size, image_size) in [-1, 1]. The images of each
    direct subfolder form a class (in the order of the sorted names); where an image lies in no
    subfolder there are no labels.

    Args:
        folder: searched with its subfolders.
        image_size, channels: of the samples; channels 1 (grey) or 3.
        mirror: whether `order` mirrors each image with probability 1/2, as a function of (seed,
            epoch, position). Index i + size is image i mirrored.
        on_corrupt: "error" (an image that cannot be decoded raises when it is read) or "skip": all
            are decoded once now, those that cannot be are left out, listed in `skipped` and counted
            in a warning.

    Attributes:
        files: the paths, in order.
        classes: names of the classes; None without labels.
        skipped: (path, reason) of the images left out.

    Raises:
        FileNotFoundError: no such folder. ValueError: no images, or an option out of range.
        ImportError: Pillow is not installed (the extra `data` brings it).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        image_size: int = 32,
        channels: int = 3,
        mirror: bool = False,
        on_corrupt: str = "error",
    ) -> None:
        import_pillow("load_image_folder")
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        check_image_options(image_size, channels)
        if on_corrupt not in ("error", "skip"):
            raise ValueError(f"on_corrupt: must be error or skip; got {on_corrupt!r}")
        suffixes = {f".{suffix}" for suffix in IMAGE_SUFFIXES}
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        if not files:
            raise ValueError(f"{folder}: holds no images ({', '.join(sorted(suffixes))})")
        self.name, self.mirror = folder.resolve().name, mirror
        self.sample_shape = (channels, image_size, image_size)
        parts = [file.relative_to(folder).parts for file in files]
        self.classes: tuple[str, ...] | None = None
        labels = torch.zeros(len(files), dtype=torch.int64, device="cpu")
        if all(len(p) > 1 for p in parts):
            self.classes = tuple(sorted({p[0] for p in parts}))
            number = {name: i for i, name in enumerate(self.classes)}
            labels = torch.tensor([number[p[0]] for p in parts], device="cpu")
        self.files, self._labels = tuple(files), labels
        self.skipped: tuple[tuple[Path, str], ...] = ()
        if on_corrupt == "skip":
            self._skip_corrupt()

    @property
    def size(self) -> int:
        return len(self.files)

    @property
    def has_labels(self) -> bool:
        return self.classes is not None

    @property
    def num_classes(self) -> int | None:
        return None if self.classes is None else len(self.classes)

    def rows(self, index: torch.Tensor) -> Rows:
        """The images of these indices, decoded now; i + size is image i mirrored.

        Raises:
            ValueError: one cannot be decoded; the message names its file.
        """
        numbers = index.tolist()
        decoded = [self._decode(self.files[i % self.size]) for i in numbers]
        pixels = [
            a[:, :, ::-1] if i >= self.size else a for a, i in zip(decoded, numbers, strict=True)
        ]
        labels = self._labels[index.cpu() % self.size] if self.has_labels else None
        return Rows(as_samples(pixels), labels)

    def order(self, rows: torch.Tensor, *, seed: int, epoch: int) -> torch.Tensor:
        """`rows` permuted by (seed, epoch) and, with `mirror`, half of them mirrored."""
        order = rows[epoch_order(len(rows), seed=seed, epoch=epoch)]
        if not self.mirror:
            return order
        draws = rand(len(rows), seed=derive_seed(seed, "mirror"), offset=epoch)
        return order + self.size * (draws < 0.5)

    def load(self) -> Dataset:
        """All images in memory, unmirrored."""
        pixels = np.empty((self.size, *self.sample_shape), dtype=np.uint8)
        with ThreadPoolExecutor(_THREADS) as pool:
            for row, image in enumerate(pool.map(self._decode, self.files)):
                pixels[row] = image
        x = torch.from_numpy(pixels).to(torch.float32).div_(127.5).sub_(1.0)
        return Dataset(x, self._labels if self.has_labels else None, self.name)

    def _decode(self, file: Path) -> np.ndarray:
        return decode_image(
            file, str(file), image_size=self.sample_shape[1], channels=self.sample_shape[0]
        )

    def _skip_corrupt(self) -> None:
        def fault(file: Path) -> str | None:
            try:
                self._decode(file)
            except ValueError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(_THREADS) as pool:
            faults = list(pool.map(fault, self.files))
        kept = [row for row, reason in enumerate(faults) if reason is None]
        if len(kept) == self.size:
            return
        self.skipped = tuple(
            (f, r) for f, r in zip(self.files, faults, strict=True) if r is not None
        )
        if not kept:
            raise ValueError(f"{self.name}: none of {self.size} images can be decoded; {faults[0]}")
        warnings.warn(
            f"{self.name}: {len(self.skipped)} of {self.size} images cannot be decoded and are left "
            f"out, the first {self.skipped[0][1]}",
            stacklevel=3,
        )
        self.files, self._labels = tuple(self.files[row] for row in kept), self._labels[kept]


def load_image_folder(
    folder: str | Path,
    *,
    image_size: int = 32,
    channels: int = 3,
    mirror: bool = False,
    on_corrupt: str = "error",
    in_memory: bool | None = None,
) -> Dataset | ImageFolder:
    """Every image below `folder` as (channels, image_size, image_size) in [-1, 1]; see `ImageFolder`
    for how they are cropped, what the labels are, and `mirror` and `on_corrupt`.

    Args:
        in_memory: True decodes all of them now (a `Dataset`), False each time one is read (an
            `ImageFolder`); None: now where they take at most 2 GiB and are not to be mirrored.

    Raises:
        ValueError: an image cannot be decoded (the message names it), no images, or an option out of
        range. FileNotFoundError: no such folder.
        ImportError: Pillow is not installed (the extra `data` brings it).
    """
    images = ImageFolder(
        folder, image_size=image_size, channels=channels, mirror=mirror, on_corrupt=on_corrupt
    )
    if in_memory is None:
        in_memory = not mirror and images.size * channels * image_size**2 * 4 <= _IN_MEMORY
    if in_memory and mirror:
        raise ValueError(
            "mirror: needs in_memory=False: what is in memory is not mirrored; got True"
        )
    return images.load() if in_memory else images
