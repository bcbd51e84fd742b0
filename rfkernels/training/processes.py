"""The processes that train together: who this one is, and how they agree.

torchrun or accelerate starts them and torch.distributed connects them; nothing here moves weights
or gradients (`parallel.py` does, by DDP and FSDP2).
"""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

__all__ = [
    "Processes",
    "agreed",
    "barrier",
    "join_processes",
    "leave_processes",
    "on_first",
    "processes",
]

T = TypeVar("T")


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


def join_processes(device: torch.device | str) -> torch.device:
    """Joins the processes that torchrun or accelerate launched, if it did; returns this one's device.

    Args:
        device: "cuda" becomes the GPU of this process's local rank, and the processes talk by NCCL;
            on a CPU they talk by gloo.
    """
    device = torch.device(device)
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    if not launched or not dist.is_available():
        return device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave_processes() -> None:
    """Undoes `join_processes`."""
    if dist.is_available() and dist.is_initialized():
        _control.cache_clear()
        # Networks in shards hold the group in reference cycles; one that is freed while Python ends
        # can abort the process.
        gc.collect()
        dist.destroy_process_group()
        # gloo's threads outlive the group where DDP or a DTensor still holds it, and drop the tensors
        # of the last collective after its result is there. One that asks for the GIL while Python ends
        # aborts the process (pytorch/pytorch#190489; 1 of 60 processes here): they get it meanwhile.
        time.sleep(0.2)


@functools.cache
def _control(_world: object) -> dist.ProcessGroup | None:
    """A group for flags in host memory, so that agreeing never waits for a GPU."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def agreed(flag: int) -> int:
    """The largest of the processes' flags; the flag itself alone."""
    if processes().count == 1:
        return flag
    value = torch.tensor(flag, device="cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_control(dist.group.WORLD))
    return int(value)


def barrier() -> None:
    """Waits until every process is here."""
    agreed(0)


def on_first(call: Callable[[], T]) -> T | None:
    """call() in the first process, None in the others, which wait for it.

    Raises:
        What the call raises, in the first process; RuntimeError in the others.
    """
    here = processes()
    result, error = None, None
    if here.rank == 0:
        try:
            result = call()
        except BaseException as caught:
            error = caught
    failed = agreed(int(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("the first process failed; its message says why")
    return result
