"""The optimizer of a run, by name, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rfkernels.optim import SGDP, AdamP
from rfkernels.optim.shards import is_dtensor
from rfkernels.training.config import TrainConfig
from rfkernels.training.parallel import put

__all__ = ["load_optimizer", "make_optimizer", "optimizer_tensors"]


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names.

    "adamw" (Loshchilov and Hutter, 2019) is torch's fused kernel, Adam without weight decay;
    "adamp" and "sgdp" are those of rfkernels.optim, SGDP with the first of `config.betas` as its
    momentum.
    """
    if config.optimizer == "adamp":
        return AdamP(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
    if config.optimizer == "sgdp":
        return SGDP(
            parameters,
            lr=config.learning_rate,
            momentum=config.betas[0],
            weight_decay=config.weight_decay,
        )
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state, keyed "<parameter>:<entry>"; empty before the first step."""
    return {
        f"{name}:{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restores what `optimizer_tensors` gave."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(":")
        state.setdefault(name, {})[entry] = value
    for name, parameter in model.named_parameters():
        for entry, value in state.get(name, {}).items():
            if is_dtensor(parameter) and value.shape == parameter.shape:
                kept = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            else:
                # Fresh memory of torch's own: a tensor that lies in a mapped file has another
                # alignment.
                on_cpu = entry == "step" and not parameter.is_cuda
                kept = torch.empty_like(value, device="cpu" if on_cpu else parameter.device)
            put(kept, value)
            optimizer.state[parameter][entry] = kept
