"""benchmarks/schedulers.py: its pairs compute the same, and host reads are counted where they happen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip(
    "diffusers", minversion="0.42", reason="the schedulers are compared with 0.42's"
)

FOLDERS = (Path(__file__).resolve().parents[2] / "benchmarks",)


@pytest.fixture(scope="module")
def schedulers():
    import schedulers

    return schedulers


@pytest.mark.parametrize("case", ["euler", "heun", "dpm++", "unipc", "scale_noise"])
def test_a_pair_computes_the_same_and_ours_reads_nothing(schedulers, case):
    theirs, ours = schedulers.PAIRS["euler" if case == "scale_noise" else case]
    make = schedulers.noise_of if case == "scale_noise" else schedulers.run_of
    found = {}
    for name, scheduler in (("theirs", theirs), ("ours", ours)):
        call, steps = make(scheduler, (1, 2, 3, 4), torch.float32, "cpu")
        found[name] = call(), schedulers.reads_in(call, steps)
    assert schedulers.relative(found["ours"][0], found["theirs"][0]) < 1e-5
    assert found["ours"][1] == 0
    assert (found["theirs"][1] > 0) == (case in ("heun", "scale_noise"))


def test_reads_are_counted(schedulers):
    with schedulers.HostReads() as counted:
        values = torch.arange(3.0)
        values.sum().item()
        values.nonzero()
        values.to(torch.float64).add_(1)
    assert counted.count == 2


@pytest.mark.parametrize(
    ("count", "act"),
    [
        (1, lambda there, here: there.cpu()),
        (1, lambda there, here: there.to("cpu", torch.float64)),
        (1, lambda there, here: here.copy_(there)),
        (0, lambda there, here: there.double()),
        (0, lambda there, here: here.copy_(here.double())),
    ],
)
def test_copies_from_a_device_are_counted(schedulers, count, act):
    """On fake tensors, which have a device and no numbers, so that no GPU is needed."""
    with FakeTensorMode():
        there, here = torch.empty(3, device="cuda"), torch.empty(3)
        with schedulers.HostReads() as counted:
            act(there, here)
    assert counted.count == count
