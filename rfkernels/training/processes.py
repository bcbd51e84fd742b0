"""The processes that train together (torchrun, accelerate), as far as the training code must know."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist

__all__ = ["Processes", "processes"]


class Processes(NamedTuple):
    """This process's rank among `count`; (0, 1) alone."""

    rank: int = 0
    count: int = 1

    def share(self, total: int) -> slice:
        """This process's part of `total` samples; `count` divides `total`."""
        part = total // self.count
        return slice(self.rank * part, (self.rank + 1) * part)


def processes() -> Processes:
    """torch.distributed's rank and world size, where a process group is there."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()
