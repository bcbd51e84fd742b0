"""One door to every data set: a name, a file or a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rfkernels.data.dataset import Data
from rfkernels.data.digits import digits, mnist
from rfkernels.data.files import load_arrays, load_image_folder
from rfkernels.data.toys import TOYS, toy

__all__ = ["DATASETS", "load_dataset"]

DATASETS = ("digits", "mnist", *TOYS)


def load_dataset(name: str | Path, **options: Any) -> Data:
    """A data set by name, or from the path of a file or folder.

    Args:
        name: "digits" (1, 8, 8), "mnist" (1, 28, 28), a 2-D toy ("moons", "ring", "checkerboard",
            "spirals"), the path of an .npz or .safetensors file with arrays `x` and optionally
            `labels`, or of a folder of images.
        options: for a toy `size` (None: endless) and `seed`; for images `image_size` and
            `channels`.

    Raises:
        ValueError: neither a known name nor an existing path.
        ImportError: the set comes with a package that is not installed.
    """
    known = {"digits": digits, "mnist": mnist}
    path = Path(name)
    if name in known:
        allowed, maker = set(), known[name]
    elif name in TOYS:
        allowed, maker = {"size", "seed"}, lambda **chosen: toy(name, **chosen)
    elif path.is_dir():
        allowed, maker = (
            {"image_size", "channels"},
            lambda **chosen: load_image_folder(path, **chosen),
        )
    elif path.suffix in (".npz", ".safetensors"):
        allowed, maker = set(), lambda: load_arrays(path)
    else:
        raise ValueError(
            f"dataset: must be one of {', '.join(DATASETS)}, an .npz or .safetensors file, or a "
            f"folder of images; got {str(name)!r}"
        )
    unknown = sorted(options.keys() - allowed)
    if unknown:
        raise ValueError(
            f"{unknown[0]}: {name} has no such option; it has "
            f"{', '.join(sorted(allowed)) or 'none'}"
        )
    return maker(**options)
