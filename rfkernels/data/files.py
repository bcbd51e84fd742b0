"""Data sets from the user's own files: an .npz archive, a .safetensors file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rfkernels.data.dataset import Dataset

__all__ = ["load_arrays"]


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
