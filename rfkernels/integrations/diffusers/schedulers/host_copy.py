"""A schedule's tensors beside their numbers on the host, so that steps and look-ups read no device.

Both classes notice when their tensor was changed in place and then read it once more.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.compiler import is_dynamo_compiling

_TOLERANCE = 1e-6  # of num_train_timesteps: a few units in the last place of a float32 time


def _counting(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that counts its changes, which those made in inference mode do not; also of an array or a list."""
    if not isinstance(tensor, torch.Tensor):
        tensor = torch.as_tensor(tensor, device="cpu")
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class HostCopy:
    """A 1-D tensor and its entries as Python numbers; copies and pickles of it are independent.

    Args:
        tensor: on any device; what users assign may be an array or a list.
        known: its entries, where they are on the host already; else they are read at first use.
    """

    def __init__(self, tensor: torch.Tensor, known: np.ndarray | None = None) -> None:
        self.tensor = _counting(tensor)
        self._read_at = self.tensor._version
        self._values = None if known is None else known.tolist()

    def values(self) -> list[float]:
        """The entries."""
        if self._values is None or self._read_at != self.tensor._version:
            self._values = self.tensor.tolist()
            self._read_at = self.tensor._version
            self._changed()
        return self._values

    def _changed(self) -> None:
        """What was derived from the entries is stale."""

    def __getstate__(self) -> dict[str, object]:
        if self._read_at != self.tensor._version:
            self._values = None
            self._changed()
        return self.__dict__

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.tensor = _counting(self.tensor)
        self._read_at = self.tensor._version  # a copy of a tensor counts anew


class Levels(HostCopy):
    """Noise levels and the steps between them."""

    def __init__(self, tensor: torch.Tensor, known: np.ndarray | None = None) -> None:
        super().__init__(tensor, known)
        self._steps: list[float] | None = None if known is None else np.diff(known).tolist()

    def _changed(self) -> None:
        self._steps = None

    def steps(self) -> list[float] | torch.Tensor:
        """Each level's difference to the next, in the levels' dtype.

        A tensor while torch.compile traces, which can neither count changes nor have a graph for every index.
        """
        if is_dynamo_compiling():
            return self.tensor.diff()
        if self._steps is None or self._read_at != self.tensor._version:
            self.values()
            self._steps = self.tensor.diff().tolist()
        return self._steps


class TimeTable(HostCopy):
    """Times with their places; of equal times the second place counts, the first where there is one only."""

    def __init__(self, tensor: torch.Tensor, known: np.ndarray | None = None) -> None:
        super().__init__(tensor, known)
        self._exact: dict[float, int] | None = None
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._on_device: tuple[torch.Tensor, torch.Tensor, list[float]] | None = None

    def _changed(self) -> None:
        self._exact = self._sorted = self._on_device = None

    def _places_by_time(self) -> dict[float, int]:
        values = self.values()
        if self._exact is None:
            self._exact = {}
            repeated = set()
            for place, time in enumerate(values):
                if time not in self._exact:
                    self._exact[time] = place
                elif time not in repeated:
                    repeated.add(time)
                    self._exact[time] = place
        return self._exact

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct times, ascending, and the place of each."""
        exact = self._places_by_time()
        if self._sorted is None:
            times = sorted(exact)
            places = [exact[time] for time in times]
            self._sorted = np.asarray(times, dtype=np.float64), np.asarray(places)
        return self._sorted

    def find(self, time: float | torch.Tensor, scale: int) -> int:
        """The place of one time.

        Args:
            time: a number or a tensor of one element; an entry of the tensor itself is not read from its device.
            scale: num_train_timesteps.

        Raises:
            IndexError: none is within rounding of it.
        """
        if isinstance(time, torch.Tensor):
            place = self._entry(time)
            time = time.item() if place is None else self.values()[place]
        return self._places([time], scale)[0]

    def _entry(self, time: torch.Tensor) -> int | None:
        """Which entry of the tensor a view is."""
        whole = self.tensor
        if (
            type(time) is not torch.Tensor
            or time.is_cpu
            or time.numel() != 1
            or time.dtype != whole.dtype
            or time.device != whole.device
            or time.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        ):
            return None
        place = time.storage_offset() - whole.storage_offset()
        return place if whole.is_contiguous() and 0 <= place < whole.numel() else None

    def _places(self, times: list[float], scale: int) -> list[int]:
        exact = self._places_by_time()
        try:
            return [exact[time] for time in times]
        except KeyError:
            return self._nearest(np.asarray(times, dtype=np.float64), scale)

    def _nearest(self, times: np.ndarray, scale: int) -> list[int]:
        distinct, places = self._table()
        after = np.searchsorted(distinct, times).clip(max=len(distinct) - 1)
        before = (after - 1).clip(min=0)
        nearer = np.where(
            np.abs(distinct[before] - times) < np.abs(distinct[after] - times), before, after
        )
        missed = ~(np.abs(distinct[nearer] - times) <= _TOLERANCE * scale)
        if missed.any():
            raise IndexError(
                f"timestep must be an entry of the scheduler's timesteps; got {float(times[missed][0])!r}"
            )
        return places[nearer].tolist()

    def levels(self, times: torch.Tensor, levels: Levels, scale: int) -> float | torch.Tensor:
        """The levels at B times, (B,) float32 and on their device; a float when there is one time.

        Raises:
            IndexError: a time on the host that is not there; on an accelerator its level is NaN instead.
        """
        times = times.flatten()
        if times.is_cpu:
            values = levels.values()
            found = [values[place] for place in self._places(times.tolist(), scale)]
            return (
                found[0]
                if len(found) == 1
                else torch.tensor(found, dtype=torch.float32, device="cpu")
            )
        distinct, level = self._device_table(times.device, levels)
        times = times.to(distinct.dtype)
        after = torch.searchsorted(distinct, times).clamp_(max=len(distinct) - 1)
        before = (after - 1).clamp_(min=0)
        nearer = torch.where(
            (distinct[before] - times).abs() < (distinct[after] - times).abs(), before, after
        )
        known = (distinct[nearer] - times).abs() <= _TOLERANCE * scale
        return torch.where(known, level[nearer], torch.nan)

    def _device_table(
        self, device: torch.device, levels: Levels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        distinct, places = self._table()
        values = levels.values()
        kept = self._on_device
        if kept is None or kept[0].device != device or kept[2] is not values:
            level = np.asarray(values, dtype=np.float32)[places]
            tensors = (torch.from_numpy(a).to(device) for a in (distinct.astype(np.float32), level))
            kept = self._on_device = (*tensors, values)
        return kept[:2]
