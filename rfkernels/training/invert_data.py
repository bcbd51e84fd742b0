"""`invert_data`: pairs of real data, whose x0 is where a flow carries them backwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rfkernels.data import Data, as_dataset
from rfkernels.ops.interpolate import interpolate
from rfkernels.ops.random import derive_seed
from rfkernels.sampling import invert
from rfkernels.training.checks import check_class_labels
from rfkernels.training.option_checks import number, require, whole
from rfkernels.training.pairs import PairStore
from rfkernels.training.train import Samples, describe_data
from rfkernels.training.trainer import device_of
from rfkernels.training.write_pairs import describe_pairs, write_pairs

__all__ = ["invert_data"]


def invert_data(
    velocity: Callable[..., torch.Tensor],
    data: Samples,
    *,
    folder: str | Path,
    seed: int = 0,
    noise_level: float = 1e-3,
    solver: str = "heun",
    steps: int | None = 64,
    batch: int = 1000,
    conditional: bool | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = False,
) -> PairStore:
    """Integrates `velocity` backwards from every sample of a data set, and stores both ends.

    Pair i is (x0, x1) with x1 row i of the data as it is, and x0 the state at t = 0 of the flow
    through (1 - e) x1 + e n at t = 1 - e, with e the noise level (1e-3 in the paper's code) and n
    standard normal, a function of (seed, i). x0 is stored, since it is no draw.

    Training on such pairs shows a reflowed model real data without giving up the deterministic
    coupling that its losses need (Lee, Lin, Fanti, "Improving the Training of Rectified Flows",
    2024, configuration G: all 50,000 training images of CIFAR-10 with 128 evaluations each, then
    5,000 steps of fine-tuning). The inverted ends are only as normal as the flow is good: look at
    their mean and spread before training on them.

    Args:
        velocity: a flow, velocity(x, t, **condition), t = 0 source, 1 data; a network is used in
            evaluation mode.
        data: a data set of known size, a tensor (N, ...), or a pair (samples, labels).
        folder: where the shards go.
        seed: of the noise n.
        noise_level: e, in [0, 1); 0 starts from the data as they are.
        solver, steps: as in `rfkernels.invert`; None steps for an adaptive solver.
        batch: samples solved at a time.
        conditional: whether labels reach the velocity, and are stored, as `y`; None: when the data
            has labels and the velocity a `null_label`.
        device: where to compute; default the device of the network.
        resume: keep the finished shards of an interrupted call with the same arguments. False
            refuses a folder that holds pairs.
        progress: show a bar.

    Returns:
        PairStore, for `train_recipe` and `distill`.

    Raises:
        ValueError, TypeError: arguments that do not fit, or pairs of other arguments in the folder.
        FileExistsError: the folder holds pairs and `resume` is false. OSError: too little space.
    """
    dataset = as_dataset(data)
    if dataset.size is None:
        raise ValueError("data: must be a data set of known size; got an endless stream")
    whole("batch", batch, 1)
    level = number("noise_level", noise_level)
    require(0 <= level < 1, "noise_level", "must be in [0, 1)", noise_level)
    if conditional is None:
        conditional = dataset.has_labels and getattr(velocity, "null_label", None) is not None
    if conditional and not dataset.has_labels:
        raise ValueError("conditional: True needs data with labels; got data without")
    device = device_of(velocity) if device is None else torch.device(device)
    noise = derive_seed(seed, "inversion noise")

    def solve(index: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = dataset.rows(index)
        x1 = rows.x.to(device, torch.float32)
        start = x1
        if level > 0:
            start = interpolate(x1, 1 - level, seed=noise, offset=index.to(device)).xt
        x0 = invert(
            velocity,
            start,
            steps=steps,
            solver=solver,
            t_end=1 - level,
            condition={"y": rows.labels.to(device)} if conditional else None,
        )
        return {"x1": x1.cpu(), "x0": x0.cpu()}

    conditions = {"y": _labels(dataset)} if conditional else {}
    check_class_labels(velocity, conditions.get("y"))
    manifest = describe_pairs(
        velocity,
        dataset.size,
        tuple(dataset.sample_shape),
        conditions,
        batch=batch,
        seed=seed,
        x0="stored",
        data=describe_data(dataset),
        noise_level=level,
        solver=solver,
        steps=steps,
    )
    return write_pairs(
        "invert_data",
        velocity,
        solve,
        folder=Path(folder),
        manifest=manifest,
        conditions=conditions,
        batch=batch,
        resume=resume,
        progress=progress,
    )


def _labels(data: Data) -> torch.Tensor:
    """Every label, (N, ...), read a piece at a time since samples may come from files."""
    pieces = torch.arange(data.size, device="cpu").split(1024)
    return torch.cat([data.rows(index).labels.cpu() for index in pieces])
