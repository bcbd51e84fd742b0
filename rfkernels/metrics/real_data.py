"""The real data of a run: what it was trained on and what it never saw, split as its training split them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["RealData", "real_data"]

# Samples of an endless data set stand for training and held-out data; those drawn in training have
# small indices.
_STREAM_SIZE, _STREAM_START = 2000, 2**40
_HOLDOUT = 0.1  # where the run held nothing out


class RealData(NamedTuple):
    """train (N, ...), held_out (M, ...), the training labels (N,) or None, and what it is called."""

    train: Tensor
    held_out: Tensor
    labels: Tensor | None
    name: str


def real_data(runs: Sequence[Any], dataset: str | Path | None = None) -> RealData:
    """The data of runs: the data set named, or what the first run that says so was trained on.

    Args:
        runs: of ``rf.load`` or results in memory, at least one.
        dataset: a name or path as ``rf.data.load_dataset`` takes it.

    Raises:
        ValueError: no run says what it was trained on, and no data set is given.
    """
    from rfkernels.data import DATASETS, load_dataset, split

    trained = next((run for run in runs if _described(run).get("name")), None)
    if dataset is None:
        described = {} if trained is None else _described(trained)
        dataset = described.get("name")
        if dataset not in DATASETS:
            what = (
                "the runs were trained on pairs"
                if trained is None
                else f"{dataset!r} is a file or folder"
            )
            raise ValueError(f"dataset: must be given, {what}; got none")
        # An endless toy is another one for every seed of its own.
        seed = described.get("seed")
        options = {} if described.get("size") is not None or seed is None else {"seed": seed}
        data = load_dataset(dataset, **options)
    else:
        shape = runs[0].sample_shape
        folder = {"image_size": shape[-1], "channels": shape[0]} if Path(dataset).is_dir() else {}
        data = load_dataset(str(dataset), **folder)
    if data.size is None:
        index = torch.arange(_STREAM_START, _STREAM_START + 2 * _STREAM_SIZE)
        x = data.rows(index).x
        return RealData(x[:_STREAM_SIZE], x[_STREAM_SIZE:], None, str(dataset))
    config = (trained or runs[0]).config
    config = getattr(config, "train", config)
    part, held_out = split(data, config.holdout or _HOLDOUT, config.seed)
    return RealData(part.x, held_out.x, part.labels, str(dataset))


def _described(run: Any) -> dict[str, Any]:
    """What config.json says of the run's data; a run in memory says nothing."""
    return getattr(run, "description", {}).get("data") or {}
