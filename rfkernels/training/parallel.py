"""How processes share the training of one network: each a replica (DDP), or each a shard (FSDP2).

PyTorch's own engines do the work. What is here is what the loop needs of them: a loss whose
backward pass leaves the mean gradient everywhere, and whole tensors for checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from rfkernels.optim.shards import is_dtensor, local_part
from rfkernels.training.objective import Batch, Objective
from rfkernels.training.processes import processes

__all__ = [
    "Parallel",
    "broadcast",
    "is_sharded",
    "local",
    "make_parallel",
    "put",
    "shard",
    "whole",
]


class Parallel:
    """One process alone; the base of the other two."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.model, self.objective = model, objective

    def loss(self, batch: Batch) -> torch.Tensor:
        """The objective's loss on this process's samples."""
        return self.objective.loss(self.model, batch)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around the loss and backward pass of a micro-batch; gradients meet in the last one."""
        return nullcontext()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a 0-d tensor over the processes."""
        return value


class _Together(Parallel):
    def mean(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


class _Loss(nn.Module):
    """The loss as a module, so that DDP sees one forward pass a step however often a recipe calls
    the network."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.compute = objective.loss

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.compute(self.model, batch)


class Replicas(_Together):
    """DistributedDataParallel: every process has the whole network."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__(model, objective)
        on_gpu = next(model.parameters()).is_cuda
        self._ddp = nn.parallel.DistributedDataParallel(
            _Loss(model, objective),
            device_ids=[next(model.parameters()).device] if on_gpu else None,
            gradient_as_bucket_view=True,
        )

    def loss(self, batch: Batch) -> torch.Tensor:
        return self._ddp(batch)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._ddp.no_sync()


class Shards(_Together):
    """fully_shard (FSDP2): weights, gradients and optimizer state are split along dimension 0."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        self.model.set_requires_gradient_sync(last)
        return nullcontext()


def broadcast(model: nn.Module) -> None:
    """Every process gets the first one's weights and buffers."""
    if processes().count > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)


def shard(model: nn.Module) -> None:
    """Splits the weights over the processes, block by block, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    first = next(model.parameters())
    mesh = init_device_mesh(first.device.type, (dist.get_world_size(),))
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            for block in part:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only a part of the weights."""
    return any(is_dtensor(p) for p in model.parameters())


def make_parallel(model: nn.Module, objective: Objective, kind: str) -> Parallel:
    """The way in which the processes there are share the network; for "fsdp" it is sharded
    already."""
    if processes().count == 1:
        return Parallel(model, objective)
    return Shards(model, objective) if kind == "fsdp" else Replicas(model, objective)


def local(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this process has of each; the tensor itself where it is whole."""
    return [local_part(t) for t in tensors]


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors of sharded ones, in every process."""
    return {n: t.full_tensor() if is_dtensor(t) else t for n, t in tensors.items()}


@torch.no_grad()
def put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Writes a whole value into a tensor that may be sharded.

    Raises:
        ValueError: of another shape.
    """
    if value.shape != tensor.shape:
        raise ValueError(f"must have the shape {tuple(tensor.shape)}; got {tuple(value.shape)}")
    if is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(
            value.to(tensor.device), tensor.device_mesh, list(tensor.placements)
        )
    tensor.copy_(value)
