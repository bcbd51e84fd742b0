"""Reading ahead in the background: the next batches are decoded by workers while the network runs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np
import torch

from rfkernels.data.dataset import Data, Rows, part_order

__all__ = ["Prefetch"]

_Arrays = tuple[np.ndarray, "np.ndarray | None"]


class Prefetch:
    """Data that is read by background workers, ahead of what is asked for.

    The samples are those of `data`, whatever is guessed: the order of the epoch is known when it
    begins (`order`), so after two requests the workers read the slices that follow at the same
    distance, which on several processes is each one's own share. A request that does not follow is
    read when it comes, by all workers.

    A fault of a sample is raised when that sample is asked for, as `data` raises it. A worker that
    dies, or gives nothing for `timeout` seconds, is a RuntimeError: no sample is ever left out.

    Args:
        data: a sized data set; for processes one that can be pickled, as those of this library can.
        workers: threads or processes.
        ahead: batches that are read ahead, and so held in memory.
        kind: "thread" (Pillow decodes without Python's lock) or "process" (for decoding that holds
            it; a script that uses them must be guarded by `if __name__ == "__main__"`).
        timeout: seconds after which a worker counts as stuck.
    """

    def __init__(
        self,
        data: Data,
        *,
        workers: int = 4,
        ahead: int = 2,
        kind: str = "thread",
        timeout: float = 600.0,
    ) -> None:
        if data.size is None:
            raise ValueError(f"data: must have a size; {data.name} is an endless stream")
        for argument, value, least in (("workers", workers, 1), ("ahead", ahead, 0)):
            if value < least:
                raise ValueError(f"{argument}: must be at least {least}; got {value}")
        if kind not in ("thread", "process"):
            raise ValueError(f"kind: must be thread or process; got {kind!r}")
        self.data, self.workers, self.ahead, self.timeout = data, workers, ahead, timeout
        self.name, self.size, self.sample_shape = data.name, data.size, data.sample_shape
        self.has_labels, self.num_classes = data.has_labels, getattr(data, "num_classes", None)
        self.mirror = getattr(data, "mirror", False)  # whether `order` gives mirrored variants
        self._pool: Executor
        self._read: Callable[[torch.Tensor], _Arrays]
        if kind == "thread":
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="rfkernels-prefetch")
            self._read = lambda index: _arrays(data, index)
        else:
            # A forked copy of a process with torch's threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, _begin_worker, (data,))
            self._read = _read_in_worker
        self._order = torch.empty(0, dtype=torch.int64, device="cpu")
        self._place, self._stride = -1, 0
        self._ahead: dict[tuple[int, int], list[Future[_Arrays]]] = {}

    def order(self, rows: torch.Tensor, *, seed: int, epoch: int) -> torch.Tensor:
        """The order of `data`, remembered so that it can be followed."""
        self._forget()
        self._order = part_order(self.data, rows, seed=seed, epoch=epoch)
        return self._order

    def rows(self, index: torch.Tensor) -> Rows:
        """The samples of these indices, from the workers.

        Raises:
            RuntimeError: a worker died or is stuck. Others as those of `data`.
        """
        index = index.cpu()
        place = self._find(index)
        parts = None if place is None else self._ahead.pop((place, len(index)), None)
        if parts is None:
            parts = self._submit(index)
        if place is not None:
            self._read_ahead(place, len(index))
        try:
            arrays = [part.result(timeout=self.timeout) for part in parts]
        except BrokenExecutor as error:
            raise RuntimeError(
                f"prefetch: a worker process died while it read {self.name} (killed, out of "
                "memory, or unable to import the data set's class?); the batch was not delivered. Fewer workers, or "
                "kind=thread, need less memory"
            ) from error
        except FutureTimeoutError as error:
            raise RuntimeError(
                f"prefetch: a worker gave no samples of {self.name} for {self.timeout:g} s"
            ) from error
        x = np.concatenate([part[0] for part in arrays])
        labels = [part[1] for part in arrays if part[1] is not None]
        return Rows(
            torch.from_numpy(x), torch.from_numpy(np.concatenate(labels)) if labels else None
        )

    def close(self) -> None:
        """Ends the workers; what they are reading is finished first."""
        self._forget()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, index: torch.Tensor) -> list[Future[_Arrays]]:
        pieces = torch.tensor_split(index, min(self.workers, max(len(index), 1)))
        try:
            return [self._pool.submit(self._read, piece) for piece in pieces]
        except BrokenExecutor as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return [failed]

    def _find(self, index: torch.Tensor) -> int | None:
        """Where in the order these indices stand, as a slice; None where they do not."""
        count = len(index)
        if not count:
            return None
        guess = self._place + self._stride
        if self._place >= 0 and torch.equal(self._order[guess : guess + count], index):
            return guess
        for place in torch.nonzero(self._order == index[0]).flatten().tolist():
            if torch.equal(self._order[place : place + count], index):
                return place
        return None

    def _read_ahead(self, place: int, count: int) -> None:
        """Submits the slices that follow; forgets others."""
        follows = self._place >= 0 and place > self._place
        self._stride = place - self._place if follows else count
        self._place = place
        wanted = [(place + k * self._stride, count) for k in range(1, self.ahead + 1)]
        wanted = [key for key in wanted if sum(key) <= len(self._order)]
        for key in self._ahead.keys() - set(wanted):
            for part in self._ahead.pop(key):
                part.cancel()
        for start, length in wanted:
            if (start, length) not in self._ahead:
                self._ahead[start, length] = self._submit(self._order[start : start + length])

    def _forget(self) -> None:
        for parts in self._ahead.values():
            for part in parts:
                part.cancel()
        self._ahead.clear()
        self._place, self._stride = -1, 0


def _arrays(data: Data, index: torch.Tensor) -> _Arrays:
    """Rows as arrays, which cross between processes at the cost of a copy."""
    rows = data.rows(index)
    return rows.x.numpy(), None if rows.labels is None else rows.labels.numpy()


_of_worker: list[Data] = []


def _begin_worker(data: Data) -> None:
    torch.set_num_threads(1)
    _of_worker.append(data)


def _read_in_worker(index: torch.Tensor) -> _Arrays:
    return _arrays(_of_worker[0], index)
