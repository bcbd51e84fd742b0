"""Files of a run, whole or absent and durable, and their SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rfkernels._whole_file import replacing, write_whole

__all__ = [
    "plain_tensors",
    "read_json",
    "sha256",
    "sync_folder",
    "tensors_sha256",
    "write_json",
    "write_lines",
    "write_tensors",
]


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable (a no-op on Windows, which opens no folders)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_lines(file: Path, lines: Iterable[str]) -> None:
    """Replaces a text file atomically."""
    write_whole(file, "".join(lines).encode())
    sync_folder(file.parent)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Replaces a JSON file atomically."""
    write_lines(file, [json.dumps(value, indent=2, allow_nan=False), "\n"])


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must hold a JSON object; got {type(value).__name__}")
    return value


def plain_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as safetensors takes them: contiguous, on the CPU, sharing no memory."""
    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        pointer = value.untyped_storage().data_ptr()
        if pointer in seen:
            value = value.clone()
        seen.add(pointer)
        plain[name] = value
    return plain


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replaces a safetensors file atomically.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    with replacing(file) as temporary:
        try:
            save_file(plain_tensors(tensors), temporary)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{file}: cannot be written ({error})") from error
    sync_folder(file.parent)


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names, types, shapes and values of tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        plain = value.detach().to("cpu").contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
