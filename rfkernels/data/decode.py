"""Bytes to arrays: the few formats that data sets may hold, each with an explicit decoder.

Images through Pillow, arrays as .npy without objects, JSON, text, integers. Nothing here unpickles.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = [
    "ARRAY_SUFFIXES",
    "IMAGE_SUFFIXES",
    "as_samples",
    "check_image_options",
    "decode_array",
    "decode_image",
    "decode_integer",
    "decode_json",
    "decode_text",
    "import_pillow",
]

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff")
ARRAY_SUFFIXES = ("npy",)


def import_pillow(who: str) -> Any:
    """Pillow's Image module.

    Raises:
        ImportError: it is not installed (the extra `data` brings it).
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f'{who}: needs Pillow; install it with: pip install "rfkernels[data]"'
        ) from error
    return Image


def check_image_options(image_size: int, channels: int) -> None:
    """Raises ValueError for a size below 1 or channels other than 1 and 3."""
    if channels not in (1, 3):
        raise ValueError(f"channels: must be 1 or 3; got {channels}")
    if image_size < 1:
        raise ValueError(f"image_size: must be at least 1; got {image_size}")


def decode_image(
    source: bytes | str | Path, where: str, *, image_size: int, channels: int
) -> np.ndarray:
    """An image as uint8 (channels, image_size, image_size): turned as its EXIF tag says, transparent
    parts on white, 16-bit grey scaled to 8 bits, cropped in the middle to a square, resized.

    Args:
        source: the bytes of the file, or its path.
        where: what errors call it.

    Raises:
        ValueError: it is not a whole image that Pillow can read.
    """
    image_module = import_pillow("images")
    from PIL import ImageOps

    try:
        with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # Pillow would clip, not scale, the 16 bits
                image = image_module.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = image_module.new("RGBA", image.size, "white")
                image = image_module.alpha_composite(white, image)
            image = image.convert("L" if channels == 1 else "RGB")
            square = ImageOps.fit(image, (image_size, image_size))
    # What Pillow's readers raise on torn files of the various formats.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        image_module.DecompressionBombError,
    ) as error:
        raise ValueError(f"{where}: not a readable image ({error})") from error
    return np.asarray(square).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def decode_array(source: bytes, where: str) -> np.ndarray:
    """A .npy array of uint8 or floating point numbers; objects are refused, not unpickled."""
    try:
        array = np.load(io.BytesIO(source), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{where}: not a readable .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fu" or array.ndim == 0:
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{where}: must be an array of uint8 or floating point; got {kind}")
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        raise ValueError(f"{where}: must be an array of uint8 or floating point; got {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{where}: holds values that are not finite")
    return array


def decode_text(source: bytes, where: str) -> str:
    """UTF-8 text, without the white space around it."""
    try:
        return source.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error})") from error


def decode_json(source: bytes, where: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(decode_text(source, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def decode_integer(source: bytes, where: str) -> int:
    """A class label: a whole number from 0, in decimal digits."""
    text = decode_text(source, where)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{where}: must hold a whole number from 0; got {text[:40]!r}")
    return int(text)


def as_samples(arrays: list[np.ndarray]) -> torch.Tensor:
    """Decoded arrays of one shape as float32 (B, ...): uint8 scaled from [0, 255] to [-1, 1]."""
    stacked = np.stack(arrays)
    if stacked.dtype == np.uint8:
        return torch.from_numpy(stacked).to(torch.float32) / 127.5 - 1.0
    return torch.from_numpy(stacked).to(torch.float32)
