"""Samples that a scheduler needs again in a later call, guarded against pipelines that write over them."""

from __future__ import annotations

from typing import Any

import torch

from rfkernels.sampling.field import writes


class Kept:
    """A sample as it was in the call that kept it.

    Some pipelines step a part of a tensor and write the new state into its place (Kandinsky 5, SkyReels V2): of a part, a
    copy is kept. A whole tensor is kept as it is, and it is an error if it was written over since.
    """

    def __init__(self, sample: torch.Tensor) -> None:
        # Made in inference mode, parts cannot be told and changes are not counted.
        copied = sample._base is not None or sample.is_inference()
        self._sample = sample.clone() if copied else sample
        self._writes = writes(self._sample)

    def get(self, scheduler: object) -> torch.Tensor:
        """The sample.

        Raises:
            RuntimeError: it was written over; the message names the scheduler.
        """
        now = writes(self._sample)
        counted = now is not None and self._writes is not None  # not in compiled calls
        if counted and now != self._writes:
            raise RuntimeError(
                f"{type(scheduler).__name__}.step: sample must not be written over while it is still needed; "
                "got one that was (pass a copy of it)"
            )
        return self._sample

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._writes = writes(self._sample)  # a copy of a tensor counts anew
