"""One door to every data set: a name, a file, a folder of images or of shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rfkernels.data.dataset import Data
from rfkernels.data.digits import digits, mnist
from rfkernels.data.emoji import emoji
from rfkernels.data.files import load_arrays
from rfkernels.data.huggingface import load_huggingface
from rfkernels.data.images import load_image_folder
from rfkernels.data.shards import TarShards
from rfkernels.data.toys import TOYS, toy

__all__ = ["DATASETS", "load_dataset"]

DATASETS = ("digits", "mnist", *TOYS, "emoji")

_IMAGES = {"image_size", "channels"}
_CONDITION = {"condition", "caption_dim", "num_classes"}


def load_dataset(name: str | Path, **options: Any) -> Data:
    """A data set by name, or from the path of a file or folder.

    Args:
        name: "digits" (1, 8, 8), "mnist" (1, 28, 28), "emoji" (3, 32, 32), a 2-D toy ("moons",
            "ring", "checkerboard", "spirals"), or a path:

            - an .npz or .safetensors file with arrays `x` and optionally `labels`;
            - a folder of images (subfolders are classes);
            - tar shards: a folder of *.tar, one .tar, or a pattern such as "data/train-*.tar";
            - a data set of the Hugging Face `datasets` package: a folder that `save_to_disk` wrote,
              or a .parquet or .arrow file.
        options: for a toy `size` (None: endless) and `seed`; for emoji `image_size`, `font`,
            `sequences` and `background`; for images, shards and Hugging Face sets `image_size`,
            `channels` and what `load_image_folder`, `TarShards` and `load_huggingface` take.

    Raises:
        ValueError: neither a known name nor an existing path, or an option that it has not.
        ImportError: the set comes with, or is read by, a package that is not installed.
    """
    allowed, maker = _maker(name)
    unknown = sorted(options.keys() - allowed)
    if unknown:
        raise ValueError(
            f"{unknown[0]}: {name} has no such option; it has "
            f"{', '.join(sorted(allowed)) or 'none'}"
        )
    return maker(**options)


def _maker(name: str | Path) -> tuple[set[str], Callable[..., Data]]:
    """(names of the options, what takes them) of a data set."""
    path = Path(name)
    known: dict[str, Callable[..., Data]] = {"digits": digits, "mnist": mnist}
    if name in known:
        return set(), known[str(name)]
    if name == "emoji":
        return {"image_size", "font", "sequences", "background"}, _emoji
    if name in TOYS:
        return {"size", "seed"}, lambda **chosen: toy(str(name), **chosen)
    shards = _IMAGES | _CONDITION | {"x", "mix", "ignore", "cache"}
    hugging = _IMAGES | _CONDITION | {"x", "cache"}
    if path.is_dir():
        if (path / "dataset_info.json").is_file():
            return hugging, lambda **chosen: load_huggingface(path, **chosen)
        if any(path.glob("*.tar*")):
            return shards, lambda **chosen: TarShards(path, **chosen)
        more = {"mirror", "on_corrupt", "in_memory"}
        return _IMAGES | more, lambda **chosen: load_image_folder(path, **chosen)
    if path.suffix == ".tar":
        return shards, lambda **chosen: TarShards(name, **chosen)
    if path.suffix in (".parquet", ".arrow"):
        return hugging, lambda **chosen: load_huggingface(path, **chosen)
    if path.suffix in (".npz", ".safetensors"):
        return set(), lambda: load_arrays(path)
    raise ValueError(
        f"dataset: must be one of {', '.join(DATASETS)}, an .npz, .safetensors, .tar, .parquet or "
        f".arrow file, or a folder of images or shards; got {str(name)!r}"
    )


def _emoji(image_size: int = 32, **options: Any) -> Data:
    return emoji(image_size, **options)
