"""Where results go: nothing that exists is overwritten unless the user says so, and a file is whole or absent."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from rfkernels._whole_file import write_whole

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_file",
    "check_folder",
    "console",
    "fresh_folder",
    "resumable",
    "say",
    "write_arrays",
    "write_csv",
    "write_json",
]

# Of the processes that torchrun starts, the first one speaks.
console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")


def check_file(option: str, file: Path, suffixes: Sequence[str], *, force: bool) -> None:
    """Refuses a file of an unknown kind, in a folder that is not there or read-only, or one that would be overwritten.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: which of these.
    """
    if file.suffix.lower() not in suffixes:
        raise ValueError(f"{option}: must end in {', '.join(suffixes)}; got {file.name}")
    if file.is_dir():
        raise FileExistsError(f"{option}: {file} is a folder; give a file")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{option}: the folder {file.parent} does not exist")
    _check_writable(option, file.parent)
    if file.exists() and not force:
        raise FileExistsError(
            f"{option}: {file} exists; give another name, or --force to replace it"
        )


def check_folder(option: str, folder: Path) -> None:
    """Refuses a folder that holds anything, or a file of that name, or a place that is read-only.

    Raises:
        FileExistsError: there is something that could be overwritten.
        PermissionError: nothing can be written there.
    """
    if folder.is_dir():
        if any(folder.iterdir()):
            raise FileExistsError(f"{option}: {folder} is not empty; give another folder")
    elif folder.exists():
        raise FileExistsError(f"{option}: {folder} is a file, not a folder")
    _check_writable(option, next((p for p in (folder, *folder.parents) if p.exists()), Path()))


def _check_writable(option: str, folder: Path) -> None:
    # Before the work, not after it.
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option}: cannot write to the folder {folder}")


def fresh_folder(name: str) -> Path:
    """`name` in the current folder, or the first of name-2, name-3, ... that is not there yet."""
    folder, number = Path(name), 1
    while folder.exists():
        number += 1
        folder = Path(f"{name}-{number}")
    return folder


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row under the keys of the first row; None is an empty cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, stream.getvalue().encode())


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON; a number that is not finite is refused."""
    write_whole(file, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_arrays(file: Path, values: Mapping[str, torch.Tensor]) -> None:
    """A file of arrays, .safetensors or .npz by its name."""
    values = {name: value.contiguous() for name, value in values.items()}
    if file.suffix.lower() == ".safetensors":
        from safetensors.torch import save

        write_whole(file, save(values))
        return
    import numpy

    stream = io.BytesIO()
    numpy.savez(stream, **{name: value.numpy() for name, value in values.items()})
    write_whole(file, stream.getvalue())


def say(text: str) -> None:
    """A line of text as it is: paths may hold brackets, which rich would take for markup."""
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Ctrl-C inside: says how to go on with what was saved, and leaves with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"Interrupted. What was done is saved; to go on: {command}")
        raise typer.Exit(130) from None
