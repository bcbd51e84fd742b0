"""Reading ahead changes no sample; faults and dead workers are errors, never gaps or hangs."""

import threading
import time
from pathlib import Path

import pytest
import torch

from rfkernels.data import Dataset, Prefetch, Rows, part_order


class Numbers:
    """Sample i is the number i; the label too."""

    name, size, sample_shape, has_labels, num_classes = "numbers", 60, (1,), True, 60

    def __init__(self):
        self.read, self.lock = [], threading.Lock()

    def rows(self, index):
        with self.lock:
            self.read += index.tolist()
        return Rows(index[:, None].float(), index.clone())


class Faulty(Numbers):
    def rows(self, index):
        if 7 in index.tolist():
            raise ValueError("a.tar: 7.png at byte 512: not a readable image")
        return Rows(index[:, None].float(), None)


class Stuck(Numbers):
    release = threading.Event()

    def rows(self, index):
        self.release.wait(20)
        return Rows(index[:, None].float(), None)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_samples_are_those_of_the_data():
    data = Numbers()
    with Prefetch(data, workers=3, ahead=2) as ahead:
        for epoch in (0, 1):
            order = ahead.order(torch.arange(60), seed=1, epoch=epoch)
            assert torch.equal(order, part_order(data, torch.arange(60), seed=1, epoch=epoch))
            for start in range(0, 60, 8):
                rows = ahead.rows(order[start : start + 8])
                assert torch.equal(rows.labels, order[start : start + 8])
                assert torch.equal(rows.x[:, 0].long(), order[start : start + 8])
        odd = torch.tensor([3, 3, 59, 0])  # no slice of the order
        assert torch.equal(ahead.rows(odd).labels, odd)


@pytest.mark.parametrize("stride", [5, 10])
def test_it_reads_ahead_what_this_process_will_ask_for(stride):
    data = Numbers()
    with Prefetch(data, workers=2, ahead=2) as ahead:
        order = ahead.order(torch.arange(60), seed=0, epoch=0)
        ahead.rows(order[10:15])  # as after a resumption
        ahead.rows(order[10 + stride : 15 + stride])
        coming = [10 + k * stride for k in (2, 3)]
        wanted = {i for start in coming for i in order[start : start + 5].tolist()}
        wait_for(lambda: wanted <= set(data.read))
        data.read.clear()
        rows = ahead.rows(order[coming[0] : coming[0] + 5])
        assert torch.equal(rows.labels, order[coming[0] : coming[0] + 5])
        wait_for(lambda: len(data.read) == 5)
        # What was read ahead is not read again; only the slice after next is new.
        assert set(data.read) == set(order[10 + 4 * stride : 15 + 4 * stride].tolist())


def test_a_fault_comes_when_its_sample_is_asked_for():
    with Prefetch(Faulty(), workers=2, ahead=3) as ahead:
        order = ahead.order(torch.arange(60), seed=0, epoch=0)
        at = int((order == 7).nonzero()) // 4 * 4
        for start in range(0, 60, 4):
            if start == at:
                with pytest.raises(ValueError, match=r"a\.tar: 7\.png at byte 512"):
                    ahead.rows(order[start : start + 4])
            else:
                index = order[start : start + 4]
                assert torch.equal(ahead.rows(index).x[:, 0].long(), index)


def test_processes_read_the_same_and_a_dead_one_is_an_error(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)  # workers get the path, too
    from deadly_numbers import Deadly

    with Prefetch(Deadly(), workers=2, ahead=1, kind="process") as ahead:
        index = torch.tensor([5, 1, 2])
        assert torch.equal(ahead.rows(index).x[:, 0].long(), index)
        for _ in range(2):  # and it stays one
            with pytest.raises(RuntimeError, match="prefetch: a worker process died while it read"):
                ahead.rows(torch.tensor([6, 7]))


def test_a_stuck_worker_is_an_error():
    with Prefetch(Stuck(), workers=1, timeout=0.05) as ahead:
        with pytest.raises(RuntimeError, match="gave no samples of numbers for 0"):
            ahead.rows(torch.arange(2))
        Stuck.release.set()


def test_options():
    data = Dataset(torch.zeros(3, 2))
    with Prefetch(data) as ahead:
        assert ahead.rows(torch.arange(3)).labels is None
    for options, message in (
        ({"workers": 0}, "workers: must be at least 1"),
        ({"ahead": -1}, "ahead: must be at least 0"),
        ({"kind": "fork"}, "kind: must be thread or process"),
    ):
        with pytest.raises(ValueError, match=message):
            Prefetch(data, **options)
