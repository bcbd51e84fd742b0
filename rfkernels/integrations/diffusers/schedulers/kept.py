"""Tensors that a scheduler needs again in a later call, guarded against who writes over them."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from rfkernels.sampling.field import writes

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _address(tensor: torch.Tensor) -> int:
    """Where its memory begins; 0 for subclasses, for traced tensors and within the transforms of torch.func, which have
    none."""
    if type(tensor) is not torch.Tensor or is_dynamo_compiling() or _wrapped(tensor):
        return 0
    return tensor.data_ptr()


class _Counted:
    """A tensor and how often it was written to when it was kept."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._writes = writes(tensor)

    def _written(self) -> bool:
        now = writes(self.tensor)
        counted = now is not None and self._writes is not None  # not in compiled calls
        return counted and now != self._writes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._writes = writes(self.tensor)  # a copy of a tensor counts anew


class Kept(_Counted):
    """A sample as it was in the call that kept it.

    Some pipelines step a part of a tensor and write the new state into its place (Kandinsky 5, SkyReels V2): of a part, a
    copy is kept. A whole tensor is kept as it is, and it is an error if it was written over since.
    """

    def __init__(self, sample: torch.Tensor) -> None:
        # Made in inference mode, parts cannot be told and changes are not counted.
        copied = sample._base is not None or sample.is_inference()
        super().__init__(sample.clone() if copied else sample)

    def get(self, scheduler: object) -> torch.Tensor:
        """The sample.

        Raises:
            RuntimeError: it was written over; the message names the scheduler.
        """
        if self._written():
            raise RuntimeError(
                f"{type(scheduler).__name__}.step: sample must not be written over while it is still needed; "
                "got one that was (pass a copy of it)"
            )
        return self.tensor


class KeptOutput(_Counted):
    """A network's output, which networks that answer in the same memory every time write over: replayed CUDA graphs,
    static buffers."""

    def get(self, scheduler: object, new: torch.Tensor) -> torch.Tensor:
        """The output.

        Raises:
            RuntimeError: ``new``, that of a later call, was written over it; the message names the scheduler.
        """
        old = self.tensor
        # The very same tensor, if nobody wrote to it, is a constant field's.
        if self._written() if old is new else _address(old) == _address(new) != 0:
            raise RuntimeError(
                f"{type(scheduler).__name__}.step: model_output must not overwrite an earlier one, which is "
                "still needed; got the same memory again (clone the network's output)"
            )
        return old
