"""``edit``: change samples from what one condition says to what another says, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfkernels.editing.features import Features
from rfkernels.editing.flow_edit import FlowEdit
from rfkernels.editing.inversion import FireFlowEdit, RFEdit
from rfkernels.editing.rf_inversion import RFInversion
from rfkernels.editing.setting import Method, Setting
from rfkernels.editing.uni_edit import UniEdit
from rfkernels.sampling import arguments
from rfkernels.sampling.grids import Grid
from rfkernels.sampling.guidance import Guidance
from rfkernels.sampling.run import progress_bar
from rfkernels.sampling.solvers import get_solver

__all__ = ["METHODS", "Edited", "edit", "get_method"]

METHODS: dict[str, type] = {
    **{cls.name: cls for cls in (FlowEdit, RFInversion, UniEdit, RFEdit, FireFlowEdit)},
    "rf-solver": RFEdit,
}


@dataclass(frozen=True)
class Edited:
    """What :func:`edit` returns.

    Attributes:
        x: (B, ...) the edited samples, in the dtype of x1.
        nfe: evaluations of the velocity per sample; guidance counts twice.
        bank_bytes: memory that shared features took, at the peak; 0 without.
        bank_error: relative root mean square error of keeping them quantized; 0 for exact stores.
        bank_missed: how many features sampling looked for and inversion had not kept.
    """

    x: Tensor
    nfe: int
    bank_bytes: int = 0
    bank_error: float = 0.0
    bank_missed: int = 0


def edit(
    velocity: Callable[..., Tensor],
    x1: Tensor,
    *,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    method: str | Method = "flowedit",
    steps: int | None = None,
    grid: str | float | Sequence[float] | Tensor | Grid | None = None,
    source_guidance_scale: float | Tensor | Guidance | None = 1.0,
    target_guidance_scale: float | Tensor | Guidance | None = 1.0,
    uncondition: Mapping[str, Any] | None = None,
    features: Features | None = None,
    seed: int | Tensor = 0,
    progress: bool = False,
) -> Edited:
    """Change x1 from what ``source`` says to what ``target`` says. No gradients are recorded.

    The state is float32 (float64 for float64 x1), as in ``rfkernels.sample``, and the velocity is
    called as there: for a bfloat16 or float16 x1 it reads copies in that dtype. Its training mode is
    not touched: call ``model.eval()``.

    Args:
        velocity: velocity(x, t, **condition) with x (B, ...) and t (B,), 0 = noise, 1 = data. For
            ``features`` a module with attention blocks that exchange them, such as DiT.
        x1: (B, ...) the samples to edit, floating point; never modified.
        source: keyword arguments of the velocity that describe x1; {} for none.
        target: those that describe what is wanted.
        method: "flowedit", "rf-inversion", "uniedit", "rf-edit" (also "rf-solver"), "fireflow"; or an
            object that carries its options, such as ``FlowEdit(n_max=33)``.
        steps: intervals of the grid; may be left out where the grid lists its times.
        grid: as in ``rfkernels.sample``, ascending, shared by both directions.
        source_guidance_scale, target_guidance_scale: classifier-free guidance of either condition,
            as ``guidance_scale`` of ``rfkernels.sample``; 1.0 and None skip the unconditional call.
        uncondition: keyword arguments of the unconditional calls; required by guidance, {} for none.
        features: attention features to share, for "rf-edit" and "fireflow".
        seed: of the noise that "flowedit" and "rf-inversion" draw: an int, with which sample b is
            the b-th of the batch; or an int64 tensor (B,), with which each sample draws what it
            would draw alone.
        progress: show a bar on standard error.

    Returns:
        :class:`Edited`.

    Raises:
        TypeError, ValueError: an argument, or an answer of the velocity, of the wrong type or out of
            range; features for a method or a network that cannot share them.
    """
    arguments.check_callable("edit", "velocity", velocity, "velocity(x, t, **condition)")
    arguments.check_samples("edit", "x1", x1)
    for name, value in (("source", source), ("target", target)):
        if not isinstance(value, Mapping):
            raise TypeError(
                f"edit: {name} must be a dict of keyword arguments of the velocity; "
                f"got {type(value).__name__}"
            )
    method = get_method(method)
    check_features(features, method)
    times = arguments.make_times("edit", grid, steps, 0.0, 1.0, get_solver("euler"))
    seed = arguments.check_seed("edit", seed, x1)
    with torch.no_grad(), progress_bar(progress, f"edit ({method.name})") as bar:
        setting = Setting(
            velocity, x1.detach(), times, source, target, uncondition,
            source_guidance_scale, target_guidance_scale, seed, features, bar,
        )  # fmt: skip
        x = method.run(setting) if x1.numel() else x1.clone()
    bank = setting.bank
    if bank is None:
        return Edited(x, setting.nfe)
    return Edited(x, setting.nfe, bank.peak_bytes, bank.error, bank.missed)


def check_features(features: object, method: Method) -> None:
    """Refuses features that are none, or for a method that shares none.

    Raises:
        TypeError, ValueError: so it is.
    """
    if features is None:
        return
    if not isinstance(features, Features):
        raise TypeError(f"edit: features must be a Features object; got {type(features).__name__}")
    if not method.shares_features:
        raise ValueError(
            f"edit: features must be left out, since method {method.name!r} shares none"
        )


def get_method(method: str | Method) -> Method:
    """The method of that name with its defaults, or the object itself if it is a method.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
        TypeError: for an object without ``name``, ``shares_features`` and ``run``.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"edit: method must be one of {', '.join(METHODS)}; got {method!r}")
        return METHODS[method]()
    if isinstance(method, type) or not isinstance(method, Method):
        raise TypeError(
            "edit: method must be a name or an object such as FlowEdit(); "
            f"got {method if isinstance(method, type) else type(method).__name__}"
        )
    return method
