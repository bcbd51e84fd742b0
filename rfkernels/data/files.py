"""Data sets from the user's own files: a folder of images, an .npz archive, a .safetensors file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rfkernels.data.dataset import Dataset

__all__ = ["load_arrays", "load_image_folder"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def _from_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> Dataset:
    """The data set in the entries `x` and, where there is one, `labels`."""
    if "x" not in tensors:
        raise ValueError(
            f"{file}: must hold an array named x; it holds {', '.join(tensors) or 'none'}"
        )
    x, labels = tensors["x"], tensors.get("labels")
    if x.dtype == torch.uint8:
        x = x.to(torch.float32) / 127.5 - 1.0
    elif x.is_floating_point():
        x = x.to(torch.float32)
    else:
        raise ValueError(f"{file}: x must be floating point, or uint8 images; got {x.dtype}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{file}: x holds values that are not finite")
    if labels is not None:
        labels = labels.to(torch.float32 if labels.is_floating_point() else torch.int64)
        if not labels.is_floating_point() and labels.numel() and int(labels.min()) < 0:
            raise ValueError(f"{file}: labels must not be negative; got {int(labels.min())}")
    return Dataset(x.contiguous(), labels, file.stem)


def load_arrays(file: str | Path) -> Dataset:
    """Reads `x` (N, ...) and the optional `labels` (N,) or (N, C) of an .npz or .safetensors file.

    Floating point x is taken as it is (as float32); uint8 x is scaled to [-1, 1]. Nothing is ever
    unpickled: an .npz with object arrays is refused.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        try:
            return _from_tensors(load_file(file), file)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    if file.suffix != ".npz":
        raise ValueError(f"{file}: must end in .npz or .safetensors")
    try:
        # The stream is ours to close: numpy leaves it open when the archive is torn.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("x", "labels") if key in archive.files}
            found = archive.files
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{file}: not a readable .npz file of plain arrays ({error})") from error
    if "x" not in arrays:
        raise ValueError(
            f"{file}: must hold an array named x; it holds {', '.join(found) or 'none'}"
        )
    try:
        tensors = {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}
    except TypeError as error:
        raise ValueError(f"{file}: arrays must be numbers ({error})") from error
    return _from_tensors(tensors, file)


def load_image_folder(folder: str | Path, *, image_size: int = 32, channels: int = 3) -> Dataset:
    """Every image below `folder`, centre-cropped to a square and resized, in [-1, 1], shape
    (channels, size, size).

    The images of each direct subfolder form a class (in the order of the sorted names); without
    subfolders there are no labels. All of them are held in memory.

    Raises:
        ImportError: Pillow is not installed (the extra `demo` brings it).
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            'load_image_folder: needs Pillow; install it with: pip install "rfkernels[demo]"'
        ) from error
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if channels not in (1, 3):
        raise ValueError(f"channels: must be 1 or 3; got {channels}")
    if image_size < 1:
        raise ValueError(f"image_size: must be at least 1; got {image_size}")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{folder}: holds no images ({', '.join(sorted(_SUFFIXES))})")
    pixels = np.empty((len(files), image_size, image_size, channels), dtype=np.uint8)
    for row, file in enumerate(files):
        try:
            with Image.open(file) as image:
                square = ImageOps.fit(
                    image.convert("L" if channels == 1 else "RGB"), (image_size, image_size)
                )
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file}: not a readable image ({error})") from error
        pixels[row] = np.asarray(square).reshape(image_size, image_size, channels)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).contiguous() / 127.5 - 1.0
    parts = [file.relative_to(folder).parts for file in files]
    labels = None
    if all(len(p) > 1 for p in parts):
        classes = sorted({p[0] for p in parts})
        labels = torch.tensor([classes.index(p[0]) for p in parts])
    return Dataset(x, labels, folder.resolve().name)
