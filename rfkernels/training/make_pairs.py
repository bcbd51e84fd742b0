"""`make_pairs`: solves a teacher's ODE from fresh noise and keeps where it ends, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from rfkernels.ops.random import randn
from rfkernels.sampling import sample
from rfkernels.training.checks import check_class_labels
from rfkernels.training.pairs import PairStore
from rfkernels.training.trainer import device_of
from rfkernels.training.write_pairs import describe_pairs, write_pairs

__all__ = ["make_pairs"]


def make_pairs(
    velocity: Callable[..., torch.Tensor],
    count: int,
    shape: Sequence[int],
    *,
    folder: str | Path,
    seed: int = 0,
    solver: str = "heun",
    steps: int | None = 20,
    batch: int = 1000,
    labels: torch.Tensor | None = None,
    condition: Mapping[str, torch.Tensor] | None = None,
    guidance_scale: float | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = False,
) -> PairStore:
    """Draws `count` noises, integrates `velocity` from t = 0 to t = 1, and stores the ends.

    The noise of pair i is randn(*shape, seed=seed, offset=i): it is drawn again when the pairs are
    read. The disk needed is said, and checked against what is free, before anything is computed.
    Processes of torch.distributed share the shards; the pairs are the same for any number of them.

    Args:
        velocity: the teacher, velocity(x, t, **condition); a network is used in evaluation mode.
        count: how many pairs.
        shape: of one sample.
        folder: where the shards go.
        seed: of the noise.
        solver, steps: as in `rfkernels.sample`; None steps for an adaptive solver.
        batch: samples solved at a time.
        labels: (count,) or (count, C), short for condition={"y": labels}.
        condition: tensors with `count` rows, handed to the teacher and stored with the pairs.
        guidance_scale: classifier-free guidance; the unconditional call leaves the condition out.
        device: where to compute; default the device of the network.
        resume: keep the finished shards of an interrupted call with the same arguments. False
            refuses a folder that holds pairs.
        progress: show a bar.

    Raises:
        ValueError, TypeError: arguments that do not fit, or pairs of other arguments in the folder.
        FileExistsError: the folder holds pairs and `resume` is false.
        OSError: too little space.
    """
    folder, shape = Path(folder), tuple(int(n) for n in shape)
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count: must be a whole number; got {count!r}")
    if count < 1 or batch < 1:
        raise ValueError(f"count: count and batch must be at least 1; got {count} and {batch}")
    conditions = _conditions(count, labels, condition)
    check_class_labels(velocity, conditions.get("y"))
    if guidance_scale is not None and not conditions:
        raise ValueError("guidance_scale: needs labels or a condition; got none")
    device = device_of(velocity) if device is None else torch.device(device)
    guided = guidance_scale is not None

    def solve(index: torch.Tensor) -> dict[str, torch.Tensor]:
        x0 = randn(len(index), *shape, seed=seed, offset=index.to(device))
        x1 = sample(
            velocity,
            x0,
            steps=steps,
            solver=solver,
            condition={name: value[index].to(device) for name, value in conditions.items()},
            uncondition={} if guided else None,
            guidance_scale=guidance_scale,
        )
        return {"x1": x1.cpu()}

    manifest = describe_pairs(
        velocity,
        count,
        shape,
        conditions,
        batch=batch,
        seed=seed,
        x0="drawn",
        solver=solver,
        steps=steps,
        guidance_scale=guidance_scale,
    )
    return write_pairs(
        "make_pairs",
        velocity,
        solve,
        folder=folder,
        manifest=manifest,
        conditions=conditions,
        batch=batch,
        resume=resume,
        progress=progress,
    )


def _conditions(
    count: int, labels: torch.Tensor | None, condition: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    found = dict(condition or {})
    if labels is not None:
        if "y" in found:
            raise ValueError("labels: are the condition y; give one of the two")
        found["y"] = labels
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"condition: {name} must be a tensor; got {type(value).__name__}")
        if value.dim() == 0 or len(value) != count:
            raise ValueError(
                f"condition: {name} must have {count} rows; got the shape {tuple(value.shape)}"
            )
    return {name: value.detach().cpu() for name, value in found.items()}
