"""Tensors that are split over processes (DTensor), told apart without importing what makes them.

`torch.distributed.tensor` takes some 0.6 s to import, and a program that shards nothing never does.
"""

from __future__ import annotations

import sys

import torch

__all__ = ["is_dtensor", "local_part"]


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether this process has only its part of the tensor, or a replica among others."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What this process has of a tensor; the tensor itself where it is whole, and None of None."""
    return tensor.to_local() if tensor is not None and is_dtensor(tensor) else tensor
