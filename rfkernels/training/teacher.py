"""The teacher of reflow and distillation, from a result, a run folder or a network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rfkernels.ops.random import randn
from rfkernels.sampling import sample
from rfkernels.training.checks import check_class_labels
from rfkernels.training.config import DistillConfig, ReflowConfig
from rfkernels.training.load import LoadedRun, load
from rfkernels.training.pairs import PairStore
from rfkernels.training.parallel import is_sharded
from rfkernels.training.trainer import RunResult, device_of

__all__ = ["Teacher", "check_flow", "find_teacher", "pair_labels"]

AnyTeacher = RunResult | LoadedRun | str | Path | nn.Module


@dataclass
class Teacher:
    """A teacher's network and what is known of it.

    Attributes:
        model: in evaluation mode, never trained.
        sample_shape: shape of one sample.
        num_classes: class labels it takes, None for none.
        conditional: whether it was trained with a condition.
        trainable: which weights its student trains, by name.
        only_solver: the one solver that it can be sampled with; None for a velocity.
    """

    model: nn.Module
    sample_shape: tuple[int, ...]
    num_classes: int | None
    conditional: bool
    trainable: dict[str, bool]
    only_solver: str | None = None

    def student(self) -> nn.Module:
        """A copy to train, with the weights trainable that were so in the teacher's training."""
        student = copy.deepcopy(self.model)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(self.trainable[name])
        return student


def find_teacher(
    teacher: AnyTeacher, sample_shape: Sequence[int] | None, pairs: PairStore | None = None
) -> Teacher:
    """The teacher in a RunResult, a LoadedRun, a run folder (their EMA networks) or a network.

    A network that does not say the shape of a sample has that of its `pairs`.
    """
    if isinstance(teacher, (str, Path)):
        teacher = load(teacher)
    if isinstance(teacher, RunResult):
        model, weights = teacher.ema, teacher.model
        shape, classes, conditional = teacher.sample_shape, teacher.num_classes, teacher.conditional
    elif isinstance(teacher, LoadedRun):
        model = weights = teacher.model
        shape, classes, conditional = teacher.sample_shape, teacher.num_classes, teacher.conditional
    elif isinstance(teacher, nn.Module):
        model = weights = teacher
        null_label = getattr(teacher, "null_label", None)
        classes = null_label if isinstance(null_label, int) else None
        shape, conditional = getattr(teacher, "sample_shape", None), classes is not None
    else:
        raise TypeError(
            "teacher: must be a RunResult, a run folder, a LoadedRun or a torch.nn.Module; "
            f"got {type(teacher).__name__}"
        )
    config = getattr(teacher, "config", None)
    if getattr(config, "reverse", False):
        raise ValueError(
            "teacher: must lead from noise to data; got a student of the way back (reverse=True)"
        )
    if sample_shape is not None:
        given = tuple(int(n) for n in sample_shape)
        if shape is not None and given != tuple(shape):
            raise ValueError(
                f"sample_shape: the teacher's samples have the shape {tuple(shape)}; got {given}"
            )
        shape = given
    if shape is None and pairs is not None:
        shape = pairs.sample_shape
    if shape is None:
        raise ValueError(
            "sample_shape: give the shape of one sample, for a teacher that is a bare network"
        )
    if is_sharded(model):
        raise ValueError(
            "teacher: must be whole in every process; this one is in shards (parallel='fsdp'): give "
            "the folder of its run"
        )
    trainable = {name: p.requires_grad for name, p in weights.named_parameters()}
    if not trainable:
        raise ValueError("teacher: has no weights to train")
    if not any(trainable.values()):  # frozen to be a teacher; its student is not
        trainable = dict.fromkeys(trainable, True)
    return Teacher(
        copy.deepcopy(model).eval().requires_grad_(False),
        tuple(shape),
        classes,
        conditional,
        trainable,
        None if getattr(config, "learns_velocity", True) else config.sample_solver,
    )


def pair_labels(teacher: Teacher, labels: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """The labels of the pairs: those given, or every class equally often; None for no condition."""
    if labels is not None:
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"labels: must be a tensor or None; got {type(labels).__name__}")
        if labels.dim() == 0 or len(labels) != count:
            raise ValueError(
                f"labels: must have one row per pair, {count}; got {tuple(labels.shape)}"
            )
        check_class_labels(teacher.model, labels)
        return labels
    if teacher.num_classes is not None:
        return torch.arange(count, device="cpu") % teacher.num_classes
    if teacher.conditional:
        raise ValueError(
            "labels: the teacher was trained with condition vectors; give one per pair"
        )
    return None


@torch.no_grad()
def check_flow(
    teacher: Teacher, labels: torch.Tensor | None, config: ReflowConfig | DistillConfig
) -> None:
    """Solves one tiny flow, so that a solver, guidance or labels that cannot work are refused."""
    if teacher.only_solver not in (None, config.solver):
        raise ValueError(
            f"solver: must be {teacher.only_solver!r} with this teacher, which is no velocity; got "
            f"{config.solver!r}"
        )
    guided = config.guidance_scale is not None
    if guided and labels is None:
        raise ValueError(
            f"guidance_scale: needs a conditional teacher or labels; got {config.guidance_scale} "
            "without"
        )
    device = device_of(teacher.model)
    x0 = randn(1, *teacher.sample_shape, seed=0, device=device)
    sample(
        teacher.model,
        x0,
        steps=None if config.pair_steps is None else 1,
        solver=config.solver,
        condition={} if labels is None else {"y": labels[:1].to(device)},
        uncondition={} if guided else None,
        guidance_scale=config.guidance_scale,
    )
