"""What `rfkernels train` makes of names and options: data sets and networks, new or those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rfkernels.cli.options import given, parse_settings

__all__ = ["count_classes", "data_name", "new_network", "open_data", "saved_network"]

# Above this many pixels a fully connected network is the wrong tool.
_MLP_SIDE = 16


def open_data(dataset: str, image_size: int | None) -> Any:
    """A data set by name or path."""
    from rfkernels.data import load_dataset

    return load_dataset(dataset, **given(image_size=image_size))


def data_name(described: dict[str, Any] | None, option: str, run: Path) -> str | None:
    """The name of the data set that config.json describes; None where the run has none.

    Raises:
        ValueError: it was a file or folder, which config.json does not know where to find.
    """
    from rfkernels.data import DATASETS

    if described is None:
        return None
    name = described.get("name")
    if name not in DATASETS:
        raise ValueError(
            f"{option}: {run} was trained on {name!r}, a file or folder; give it again with --{option}"
        )
    return name


def count_classes(data: Any) -> int:
    """How many classes a data set with labels has.

    Raises:
        ValueError: no labels, or vectors.
    """
    import torch

    if not data.has_labels:
        raise ValueError(f"conditional: needs data with labels; {data.name} has none")
    classes = getattr(data, "num_classes", None)
    if classes is not None:
        return classes
    labels = data.rows(torch.arange(4096)).labels  # of an endless toy only a look at them tells
    if labels.is_floating_point():
        raise ValueError(
            f"conditional: the labels of {data.name} are vectors, which the command does not serve"
        )
    return int(labels.max()) + 1


def new_network(
    name: str | None,
    model_options: Sequence[str] | None,
    *,
    sample_shape: Sequence[int],
    seed: int,
    num_classes: int | None = None,
    flow_map: bool = False,
) -> Any:
    """A new network by name and NAME=VALUE options, its weights a function of the run's seed."""
    import rfkernels.models as models
    from rfkernels.ops.random import derive_seed

    shape = tuple(sample_shape)
    options = parse_settings("model-option", model_options)
    if num_classes is not None:
        options.setdefault("num_classes", num_classes)
    if flow_map:
        options.setdefault("flow_map", True)
    if name is None:
        name = "unet" if len(shape) == 3 and max(shape[1:]) > _MLP_SIDE else "mlp"
    return models.build(name, seed=derive_seed(seed, "init"), sample_shape=shape, **options)


def saved_network(saved: dict[str, Any], seed: int, run: Path) -> Any:
    """The network that config.json describes, with the weights that it began with if they were
    drawn."""
    import rfkernels.models as models
    from rfkernels.ops.random import derive_seed

    described = saved["model"]
    if "name" not in described:
        raise ValueError(
            f"resume: {run} trained a network of your own; resume it in Python, with "
            f"{'train_flow' if saved['kind'] == 'train' else 'train_recipe'}"
        )
    return models.build(described["name"], seed=derive_seed(seed, "init"), **described["options"])
